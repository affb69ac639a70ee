"""The trace as a picture: predicted and measured timelines of every group, and their memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from galvatron_compile.explain.pipeline import COLOURS
from galvatron_compile.explain.streams import BENEATH
from galvatron_compile.explain.trace_lines import lines
from galvatron_compile.pictures import new_figure, write
from galvatron_compile.quantities import duration, size
from galvatron_compile.timeline import NAMES
from galvatron_compile.trace import Trace

PAINTS = {
    "action-F": "#4477aa", "action-B": "#44aa99", "action-I": "#44aa99", "action-W": "#ddcc77",
    "action-S": "#aa4499",
}  # fmt: skip
"""Paul Tol's colours, as in page.css."""
BESIDE = {"gather": "#cc6677", "reduce": "#dda032", "send": "#882255"}
IDLE = "#e8ebef"
_BOX, _BAR, _STEP = 0.6, 0.14, 1.0
_ROOM = 0.012  # of the axis, from which a box has room for its number


def draw(trace: Trace, path: Path) -> None:
    """Write the picture; the file's ending chooses the format (png, svg, pdf).

    UnsupportedError without matplotlib, for a format that it does not write, or for a place that
    cannot be written.
    """
    num = trace.num_groups
    has_memory = any(row.measured is not None for row in trace.peaks)
    heights = [2.0 * num] + [1.3] * (num if has_memory else 0)
    figure = new_figure(path, (11, 1.3 + 0.42 * sum(heights)), "--trace-png")
    panels = figure.subplots(len(heights), 1, sharex=True, height_ratios=heights, squeeze=False)
    axes = [panel for (panel,) in panels]
    _timelines(axes[0], trace)
    for group, axis in enumerate(axes[1:]):
        _memory(axis, trace, group)
    axes[-1].set_xlabel("ms")
    axes[-1].set_xlim(0, trace.total_ms)
    figure.suptitle(_title(trace), fontsize=10)
    write(figure, path)


def _title(trace: Trace) -> str:
    step = trace.rows[0]
    measured = f"measured {duration(trace.recordings.step_ms)}"
    if step.predicted is None:
        return f"{trace.recordings.plan}: {measured}, nothing predicted"
    return f"{trace.recordings.plan}: predicted {duration(step.predicted)}, {measured}"


def _timelines(axis: Any, trace: Trace) -> None:
    drawn, ticks, used = lines(trace), [], dict[str, str]()
    place = 0.0
    for before, line in zip([drawn[0], *drawn], drawn, strict=False):
        place += 0.3 * (line.group - before.group)
        axis.broken_barh([(0, trace.total_ms)], (place, _BOX), color=IDLE, linewidth=0)
        for span, _ in line.boxes:
            paint, width = PAINTS[COLOURS[span.kind]], span.end_ms - span.start_ms
            used.setdefault(NAMES[span.kind], paint)
            axis.broken_barh(
                [(span.start_ms, width)], (place, _BOX), color=paint, edgecolor="white",
                linewidth=0.4,
            )  # fmt: skip
            if span.micro_batch >= 0 and width > trace.total_ms * _ROOM:
                middle = span.start_ms + width / 2, place + _BOX / 2
                ink = "black" if span.kind == "backward_weight" else "white"
                axis.text(
                    *middle, span.micro_batch, ha="center", va="center", fontsize=7, color=ink
                )
        for word, (_, name) in BENEATH.items():
            beside = [s for s in line.beside if s.kind.startswith(word)]
            bars = [(s.start_ms, s.end_ms - s.start_ms) for s in beside]
            if bars:
                used.setdefault(name, BESIDE[word])
                height = place + _BOX + 0.04, _BAR
                axis.broken_barh(bars, height, color=BESIDE[word], linewidth=0)
        ticks.append(place + _BOX / 2)
        place += _STEP
    axis.set(yticks=ticks, yticklabels=[line.label for line in drawn], ylim=(place, -0.1))
    axis.spines[["top", "right", "left"]].set_visible(False)
    axis.tick_params(axis="y", length=0, labelsize=9)
    axis.legend(
        [_swatch(paint) for paint in used.values()], list(used), loc="lower left",
        bbox_to_anchor=(0, 1), frameon=False, fontsize=8, ncols=6,
    )  # fmt: skip


def _swatch(paint: str) -> Any:
    from matplotlib.patches import Patch

    return Patch(color=paint)


def _memory(axis: Any, trace: Trace, group: int) -> None:
    mib = 2.0**20
    for what, steps, paint in zip(
        ("predicted", "measured"), trace.memory(group), ("#4477aa", "#cc6677"), strict=True
    ):
        if steps:
            peak = size(max(step.num_bytes for step in steps))
            axis.step(
                [step.time_ms for step in steps], [step.num_bytes / mib for step in steps],
                where="post", color=paint, linewidth=1.2, label=f"{what}, peak {peak}",
            )  # fmt: skip
    axis.set_ylabel(f"{trace.who(group)}\nMiB", fontsize=8)
    axis.set_ylim(bottom=0)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(loc="lower right", frameon=False, fontsize=8, ncols=2)
