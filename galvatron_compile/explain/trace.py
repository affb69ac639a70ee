"""Predicted and measured: both timelines on one axis, both memories, and where the time went."""

from __future__ import annotations

from collections.abc import Sequence

from galvatron_compile.explain import svg
from galvatron_compile.explain.parts import Column, Grid, Key, Section, numbers
from galvatron_compile.explain.pipeline import COLOURS
from galvatron_compile.explain.streams import BENEATH, Window, time_axis
from galvatron_compile.explain.trace_lines import LEFT, timelines
from galvatron_compile.prediction import stage_noun
from galvatron_compile.quantities import count, duration, percent, size
from galvatron_compile.timeline import NAMES, Held
from galvatron_compile.trace import OTHER, Row, Trace, has_optimizer

TITLE = "Predicted and measured"
MEMORY_TITLE = "Memory, predicted and measured"
_CURVE_GAP = 22.0
_CURVES = ("curve", "curve measured")
_LONG_TABLE = 24


def sections(trace: Trace) -> tuple[Section, ...]:
    keys = _keys(trace)
    first = Section(
        TITLE,
        _lead(trace),
        timelines(trace),
        keys,
        (_table(trace.rows),),
        tuple(_notes(trace)),
    )
    return first, _memory(trace), _by_group(trace)


def _lead(trace: Trace) -> str:
    step = trace.rows[0]
    batches = count(trace.plan.num_micro_batches, "micro-batch", "micro-batches")
    if step.predicted is None or step.measured is None or step.ratio is None:
        measured = duration(trace.recordings.step_ms)
        return f"{batches} on the clock: the step took {measured}. {trace.missing}"
    apart = step.ratio - 1
    far = f"{percent(abs(apart))} {'more' if apart > 0 else 'less'} than predicted"
    text = (
        f"{batches} on one axis: predicted {duration(step.predicted)}, measured "
        f"{duration(step.measured)}, {far}."
    )
    widest = max(trace.rows[1:], key=lambda row: abs((row.measured or 0) - (row.predicted or 0)))
    gap = (widest.measured or 0.0) - (widest.predicted or 0.0)
    if abs(gap) > 0.01 * step.predicted:
        direction = "more" if gap > 0 else "less"
        text += f" The greatest difference is in {widest.name}: {duration(abs(gap))} {direction}."
    return text + (f" {trace.missing}" if trace.missing else "")


def _notes(trace: Trace) -> list[str]:
    recordings = trace.recordings
    steps = recordings.all_step_ms
    notes = [
        f"Measured on {recordings.hardware} with torch {recordings.torch} at "
        f"{recordings.recorded_at}: the median of {count(len(steps), 'step')} "
        f"({duration(min(steps))} to {duration(max(steps))}) after {recordings.warm_up} to warm "
        "up. Times of the table are means over all ranks, which add up to the step."
    ]
    if recordings.group_size > 1:
        ranks = ", ".join(str(trace.measured(g).rank) for g in range(trace.num_groups))
        whose = f"every {stage_noun(trace.plan)}'s" if trace.num_groups > 1 else "the"
        notes.append(f"Measured is drawn for {whose} rank that computed longest: {ranks}.")
    notes.append(
        "Thin bars are communication: measured from its start to the end of the wait for it, which "
        "may be later than its arrival. A layer's own collectives are part of the layer."
    )
    if not has_optimizer(recordings):
        notes.append(
            "The optimizer was not recorded (profile takes one), and is left out on both sides."
        )
    if not recordings.has_one_clock:
        notes.append(
            "Ranks read different clocks, which were compared by messages: rows may be shifted "
            "against each other by the time of one."
        )
    return notes


def _keys(trace: Trace) -> tuple[Key, ...]:
    both = [trace.spans(group) for group in range(trace.num_groups)]
    kinds = {span.kind for pair in both for spans in pair for span in spans}
    names = dict(NAMES)
    if "recompute" in kinds:
        kinds.add("backward")
        names["backward"] = "backward, forward again included"
    keys = [Key(COLOURS[kind], names[kind]) for kind in COLOURS if kind in kinds]
    present = {kind.split("_")[0] for kind in kinds}
    keys += [Key(*BENEATH[kind]) for kind in BENEATH if kind in present]
    return (*keys, Key("idle", "nothing computed"))


# Memory.


def _memory(trace: Trace) -> Section:
    peaks = trace.peaks
    if all(row.measured is None for row in peaks):
        return Section(MEMORY_TITLE, "The recording has no memory.")
    greatest = max(value for row in peaks for value in row[1:] if value is not None)
    window = Window(0.0, trace.total_ms, LEFT, svg.WIDTH)
    ends = trace.rows[0][1:]
    curve = 64.0 if len(peaks) <= 4 else 36.0
    parts, top = [], 8.0
    for group, row in enumerate(peaks):
        floor = top + curve
        parts.append(svg.line(LEFT, floor, svg.WIDTH, floor, "grid"))
        parts.append(svg.line(LEFT, top, svg.WIDTH, top, "grid"))
        for steps, colour, end_ms in zip(trace.memory(group), _CURVES, ends, strict=True):
            if steps:
                held = [*steps, Held(end_ms or 0.0, steps[-1].num_bytes)]
                corners = _stairs(held, window, floor, curve / greatest)
                parts.append(svg.polyline(corners, colour))
        parts.append(svg.text(LEFT - 10, top, size(greatest), "axis", "end"))
        parts.append(svg.text(LEFT - 10, top + curve / 2, row.name, "label", "end"))
        parts.append(svg.text(LEFT - 10, floor, "0", "axis", "end"))
        top = floor + _CURVE_GAP
    parts += time_axis(window, top - 6, window.end_ms, 7)
    keys = [Key("line-measured", "measured")]
    if any(row.predicted is not None for row in peaks):
        keys.insert(0, Key("line-predicted", "predicted"))
    reserve = max(trace.reserve_bytes, default=0)
    notes = ["What tensors take, counted in a step of its own, where every operator is slower."]
    if reserve:
        notes.append(
            f"The framework's reserve ({size(reserve)}) is left out of the prediction: a recording "
            "cannot see it."
        )
    return Section(
        MEMORY_TITLE,
        _memory_lead(peaks),
        svg.figure(top + 18, parts, MEMORY_TITLE),
        tuple(keys),
        (_table(peaks, memory=True),) if len(peaks) > 1 else (),
        tuple(notes),
    )


def _stairs(
    steps: Sequence[Held], window: Window, floor: float, scale: float
) -> list[tuple[float, float]]:
    """Corners of the steps; of those in half a unit of width the highest and the last."""
    columns: dict[int, list[float]] = {}
    for held in steps:
        height = floor - scale * held.num_bytes
        columns.setdefault(int(2 * window.x(held.time_ms)), []).append(height)
    corners: list[tuple[float, float]] = []
    for column, heights in columns.items():
        if corners:
            corners.append((column / 2, corners[-1][1]))
        corners += [(column / 2, y) for y in dict.fromkeys((min(heights), heights[-1]))]
    return corners


def _memory_lead(peaks: Sequence[Row]) -> str:
    worst = max(peaks, key=lambda row: row.measured or 0.0)
    assert worst.measured is not None
    who = "Every rank holds" if len(peaks) == 1 else f"{worst.name.capitalize()} holds the most:"
    text = f"{who} {size(worst.measured)} at its peak"
    if worst.predicted is None or worst.ratio is None:
        return f"{text}; the plan predicts no memory over time."
    apart = worst.ratio - 1
    return (
        f"{text}, {percent(abs(apart))} {'more' if apart > 0 else 'less'} than the predicted "
        f"{size(worst.predicted)}."
    )


# Tables.


def _table(rows: Sequence[Row], memory: bool = False) -> Grid:
    scale, unit = (2.0**20, "MiB") if memory else (1.0, "ms")
    both = numbers([value for row in rows for value in row[1:]], scale)
    cells = tuple(
        (row.name, *both[2 * place : 2 * place + 2], _ratio(row)) for place, row in enumerate(rows)
    )
    columns = (
        Column("peak of" if memory else "cause"),
        Column(f"predicted {unit}", "number"),
        Column(f"measured {unit}", "number"),
        Column("measured / predicted", "number"),
    )
    return Grid(columns, cells, emphasised=None if memory else 0)


def _ratio(row: Row) -> str:
    return "–" if row.ratio is None else f"{row.ratio:.2f}"


def _by_group(trace: Trace) -> Section:
    rows = [(group, row) for group in range(trace.num_groups) for row in trace.causes(group)]
    both = numbers([value for _, row in rows for value in row[1:]])
    cells = [
        (trace.who(group), row.name, *both[2 * place : 2 * place + 2], _ratio(row))
        for place, (group, row) in enumerate(rows)
    ]
    columns = (
        Column("where"), Column("cause"), Column("predicted ms", "number"),
        Column("measured ms", "number"), Column("measured / predicted", "number"),
    )  # fmt: skip
    folded = f"All {count(len(cells), 'row')}" if len(cells) > _LONG_TABLE else ""
    return Section(
        "Where the time goes, predicted and measured",
        f"One rank of every {stage_noun(trace.plan)}. {OTHER.capitalize()} lie reading the batch, "
        "the loss and the loop that runs the actions, which are not predicted.",
        tables=(Grid(columns, tuple(cells), folded=folded),),
    )
