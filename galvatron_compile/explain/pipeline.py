"""The pipeline's timeline: a row of boxes per group, its communication and memory beneath it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from galvatron_compile.errors import PlanError
from galvatron_compile.explain import svg
from galvatron_compile.explain.parts import Key, Section
from galvatron_compile.explain.streams import BENEATH, HEIGHT, Window, beneath, time_axis
from galvatron_compile.plans import Plan, Stage
from galvatron_compile.prediction import Prediction, schedule_name, stage_noun
from galvatron_compile.quantities import count, duration, percent, size
from galvatron_compile.timeline import NAMES, Span, Timeline, blocks, simulate

TITLE = "The pipeline's timeline"
COLOURS = {
    "forward": "action-F",
    "backward": "action-B",
    "backward_input": "action-I",
    "backward_weight": "action-W",
    "optimizer": "action-S",
    "step_once": "action-S",
}
_LEFT, _GAP, _TOP = 76.0, 34.0, 6.0
_WHOLE = 150  # actions in a row that are still told apart when all of them are drawn
_DIGIT = 6.2  # advance of a digit of the boxes' small print
_MOSTLY = 0.6  # of the step, from which leaving out the rest is not worth it
_PART = 64  # actions in a row of each part when they are not
_WITH_TIPS = 3_000
_FEW = 8  # groups whose communication and memory are drawn too


class Box(NamedTuple):
    """What is drawn as one: a stage's work on a micro-batch in one direction."""

    span: Span
    chunk: int

    @property
    def colour(self) -> str:
        return f"{COLOURS[self.span.kind]}{' pale' if self.chunk % 2 else ''}"


class Drawing(NamedTuple):
    """rows: the boxes of every group. step, box: heights of a group's part and of its boxes.
    detailed: whether communication and memory lie beneath the boxes."""

    timeline: Timeline
    rows: tuple[tuple[Box, ...], ...]
    windows: tuple[Window, ...]
    step: float
    box: float
    detailed: bool

    @property
    def bottom(self) -> float:
        return _TOP + self.step * len(self.rows)

    def top(self, group: int) -> float:
        """Of a group's boxes."""
        room = 0.0 if self.detailed else (self.step - self.box) / 2
        return _TOP + self.step * group + room


def section(plan: Plan, prediction: Prediction) -> Section:
    try:
        timeline = simulate(plan)
    except PlanError as error:
        return Section(TITLE, f"This schedule cannot be drawn: {error}.")
    if plan.pp == 1 and not timeline.memory:
        batches = count(plan.num_micro_batches, "micro-batch", "micro-batches")
        return Section(
            TITLE, f"There is no pipeline: every rank runs all layers, for {batches} in turn."
        )
    drawing = _drawing(plan, timeline)
    return Section(
        TITLE,
        _lead(plan, prediction, timeline),
        _figure(plan, drawing),
        tuple(_keys(drawing)),
        notes=tuple(_notes(plan, drawing)),
    )


def _drawing(plan: Plan, timeline: Timeline) -> Drawing:
    stages = plan.stages or (Stage(0, len(plan.layers)),)
    chunk_of = [
        number // plan.pp for number, s in enumerate(stages) for _ in range(s.first, s.last)
    ]
    rows = tuple(
        tuple(Box(span, chunk) for span, chunk in blocks(row, chunk_of)) for row in timeline.rows
    )
    num = len(rows)
    detailed = bool(timeline.memory) and num <= _FEW
    step = 32.0 if num <= 6 else 22.0 if num <= 16 else 14.0 if num <= 32 else 10.0
    box = 24.0 if detailed else step - (4 if step > 20 else 2)
    step = box + HEIGHT + 10.0 if detailed else step
    windows = tuple(_windows(timeline.total_ms, rows))
    return Drawing(timeline, rows, windows, step, box, detailed)


def _keys(drawing: Drawing) -> Iterator[Key]:
    present = {box.span.kind for row in drawing.rows for box in row}
    names = {**NAMES, "backward": "backward, forward again included"}
    if not any(span.kind == "recompute" for row in drawing.timeline.rows for span in row):
        names = NAMES
    yield from (Key(COLOURS[kind], names[kind]) for kind in COLOURS if kind in present)
    if drawing.detailed:
        kinds = {span.kind.split("_")[0] for row in drawing.timeline.rows for span in row}
        yield from (Key(*BENEATH[kind]) for kind in BENEATH if kind in kinds)
    yield Key("idle", "idle")


def _notes(plan: Plan, drawing: Drawing) -> Iterator[str]:
    timeline, windows = drawing.timeline, drawing.windows
    if plan.virtual > 1:
        yield "A group's second, fourth, … stage is drawn paler."
    if drawing.detailed:
        peaks = [max(held.num_bytes for held in steps) for steps in timeline.memory]
        each = ", ".join(size(peak) for peak in peaks)
        yield (
            "The thin bars are communication beside the computation above them. The line is the "
            f"memory that a rank holds, from nothing to {size(max(peaks))}; its peaks are {each}."
        )
    if len(windows) > 1:
        shown = sum(window.end_ms - window.start_ms for window in windows)
        yield (
            f"Only the first and the last {_time(timeline, windows[0].end_ms)} are drawn, "
            f"{percent(shown / timeline.total_ms)} of the step; the middle repeats."
        )


def _time(timeline: Timeline, time_ms: float) -> str:
    return f"{time_ms:.0f} units" if timeline.assumed else duration(time_ms)


def _lead(plan: Plan, prediction: Prediction, timeline: Timeline) -> str:
    batches = count(plan.num_micro_batches, "micro-batch", "micro-batches")
    who = f"{plan.pp} {stage_noun(plan)}s, {batches}, {schedule_name(plan)} schedule"
    idle = f"they idle {percent(timeline.idle_share)} of the time"
    if plan.pp == 1:
        who = f"No pipeline: every rank runs all layers, for {batches} in turn"
        idle = f"nothing is computed {percent(timeline.idle_share)} of the time"
    if timeline.assumed:
        return (
            f"{who}: {idle} if all layers take equally long and backward twice as long as "
            "forward, which is assumed here, since the plan predicts no times."
        )
    text = f"{who}, simulated action by action: {duration(timeline.total_ms)}; {idle}."
    if prediction.step_ms is not None:
        apart = timeline.total_ms / prediction.step_ms - 1
        text += (
            f" The step time above ({duration(prediction.step_ms)}) is the search's closed form, "
            f"from which the simulation is {abs(100 * apart):.1f} % "
            f"{'above' if apart > 0 else 'below'}."
            if abs(apart) >= 0.0005
            else " That agrees with the search's closed form."
        )
    return text


def _windows(total_ms: float, rows: Sequence[Sequence[Box]]) -> list[Window]:
    """All of the step, or its first and last part where it has too many boxes."""
    longest = max(len(row) for row in rows)
    turns = [box.span.start_ms for box in rows[0] if COLOURS[box.span.kind][-1] in "BI"]
    earliest = min(
        (b.span.start_ms for row in rows for b in row if COLOURS[b.span.kind][-1] in "BI"),
        default=0.0,
    )
    # The ramp up, and some of the middle.
    part = max(_PART * total_ms / longest, (turns[0] if turns else 0.0) + 0.3 * earliest)
    if longest <= _WHOLE or 2 * part >= _MOSTLY * total_ms:
        return [Window(0.0, total_ms, _LEFT, svg.WIDTH)]
    half = (svg.WIDTH - _LEFT - _GAP) / 2
    return [
        Window(0.0, part, _LEFT, _LEFT + half),
        Window(total_ms - part, total_ms, svg.WIDTH - half, svg.WIDTH),
    ]


def _figure(plan: Plan, drawing: Drawing) -> str:
    num, step, windows = len(drawing.rows), drawing.step, drawing.windows
    timeline = drawing.timeline
    drawn = sum(w.shows(box.span) for w in windows for row in drawing.rows for box in row)
    parts: list[str] = []
    for window in windows:
        for group in range(num):
            width = window.right - window.left
            parts.append(svg.rect(window.left, drawing.top(group), width, drawing.box, "idle"))
        draw = _separate if drawn <= _WITH_TIPS else _merged
        parts += draw(drawing, window)
        if drawing.detailed:
            parts += beneath(timeline, window, [drawing.top(g) + drawing.box for g in range(num)])
        if not timeline.assumed:
            about = max(2, round((window.right - window.left) / 150))
            parts += time_axis(window, drawing.bottom, timeline.total_ms, about)
    if len(windows) > 1:
        middle = (windows[0].right + windows[1].left) / 2
        parts.append(svg.text(middle, (_TOP + drawing.bottom) / 2, "…", "gap", "middle"))
    every = 1 if step >= 14 else 4
    for group in range(0, num, every):
        label = f"{stage_noun(plan)} {group}" if plan.pp > 1 else "every rank"
        middle = drawing.top(group) + drawing.box / 2
        parts.append(svg.text(_LEFT - 10, middle, label, "label", "end"))
    return svg.figure(drawing.bottom + 26, parts, f"{TITLE}: {num} {stage_noun(plan)}s")


def _visible(row: Sequence[Box], window: Window) -> list[tuple[Box, float, float]]:
    """Boxes with their left edge and width, a hairline apart."""
    found = []
    for box in row:
        if window.shows(box.span):
            left, right = window.x(box.span.start_ms), window.x(box.span.end_ms)
            found.append((box, left, max(right - left - 0.6, 0.3)))
    return found


def _separate(drawing: Drawing, window: Window) -> list[str]:
    last = max(box.span.micro_batch for row in drawing.rows for box in row)
    room = len(str(last)) * _DIGIT  # all boxes of a kind have numbers, or none
    timeline, height = drawing.timeline, drawing.box
    parts = []
    for group, row in enumerate(drawing.rows):
        y = drawing.top(group)
        for box, left, width in _visible(row, window):
            span = box.span
            what = "" if span.micro_batch < 0 else f" of micro-batch {span.micro_batch}"
            time = _time(timeline, span.end_ms - span.start_ms)
            when = f"{_time(timeline, span.start_ms)} on, for {time}"
            parts.append(
                svg.rect(left, y, width, height, box.colour, f"{NAMES[span.kind]}{what}: {when}")
            )
            if span.micro_batch >= 0 and height >= 12 and room <= width:
                place = left + width / 2, y + height / 2
                label = str(span.micro_batch)
                parts.append(svg.text(*place, label, f"on-{box.colour}", "middle"))
    return parts


def _merged(drawing: Drawing, window: Window) -> list[str]:
    boxes = defaultdict[str, list[tuple[float, float, float, float]]](list)
    for group, row in enumerate(drawing.rows):
        for box, left, width in _visible(row, window):
            boxes[box.colour].append((left, drawing.top(group), width, drawing.box))
    return [svg.rects(found, colour) for colour, found in boxes.items()]
