"""What lies beneath a timeline's boxes: communication as thin bars, memory as a line."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

from galvatron_compile.explain import svg
from galvatron_compile.timeline import Held, Span, Timeline

BENEATH = {
    "gather": ("cause-data-comm", "gathering parameters"),
    "reduce": ("cause-tensor-comm", "summing gradients"),
    "send": ("cause-pipeline-comm", "messages to other stages"),
}
"""Communication by the first word of its kind; the later are drawn over the earlier."""
_THIN, _CURVE = 5.0, 16.0
HEIGHT = 2 + _THIN + 3 + _CURVE


class Window(NamedTuple):
    """A part of the step, and where on the page it is drawn."""

    start_ms: float
    end_ms: float
    left: float
    right: float

    def x(self, time_ms: float) -> float:
        share = (time_ms - self.start_ms) / (self.end_ms - self.start_ms)
        return self.left + min(max(share, 0.0), 1.0) * (self.right - self.left)

    def shows(self, span: Span) -> bool:
        return span.end_ms > self.start_ms and span.start_ms < self.end_ms


def beneath(timeline: Timeline, window: Window, tops: Sequence[float]) -> list[str]:
    """Thin bars of every group's communication and a line of its memory; tops: where they begin.

    The highest line is the most that a rank of any group holds.
    """
    greatest = max(held.num_bytes for steps in timeline.memory for held in steps) or 1
    bars = defaultdict[str, list[tuple[float, float, float, float]]](list)
    lines = []
    for row, steps, top in zip(timeline.rows, timeline.memory, tops, strict=True):
        for kind in BENEATH:
            mine = [s for s in row if s.kind.startswith(kind) and window.shows(s)]
            for left, right in _joined(mine, window):
                bars[kind].append((left, top + 2, max(right - left, 0.4), _THIN))
        points = _held(steps, window, top + HEIGHT, _CURVE / greatest)
        lines.append(svg.polyline(points, "curve"))
    return [*(svg.rects(bars[kind], BENEATH[kind][0]) for kind in BENEATH), *lines]


def _joined(spans: Sequence[Span], window: Window) -> list[tuple[float, float]]:
    """Left and right edges; what lies closer than can be seen is one."""
    found: list[tuple[float, float]] = []
    for span in spans:
        left, right = window.x(span.start_ms), window.x(span.end_ms)
        if found and left - found[-1][1] < 0.4:
            found[-1] = found[-1][0], max(found[-1][1], right)
        else:
            found.append((left, right))
    return found


def _held(
    steps: Sequence[Held], window: Window, floor: float, scale: float
) -> list[tuple[float, float]]:
    """The corners of the steps; of those in one unit of width, the highest and the last."""
    columns: dict[int, tuple[int, int]] = {}
    before = steps[0].num_bytes
    for held in steps:
        if held.time_ms < window.start_ms:
            before = held.num_bytes
        elif held.time_ms <= window.end_ms:
            place = int(window.x(held.time_ms))
            most = max(columns.get(place, (0, 0))[0], held.num_bytes)
            columns[place] = most, held.num_bytes
    points = [(window.left, floor - scale * before)]
    for place, (most, last) in columns.items():
        x = max(window.left, float(place))
        heights = [points[-1][1], floor - scale * most, floor - scale * last]
        points += [(x, y) for y in dict.fromkeys(heights)]
    return [*points, (window.right, points[-1][1])]


def time_axis(window: Window, bottom: float, whole_ms: float, about: int) -> list[str]:
    """About ``about`` times under a figure, in seconds where the whole of it lasts long."""
    scale, unit = (1_000.0, "s") if whole_ms >= 2_000 else (1.0, "ms")
    parts = []
    for value in svg.ticks(window.start_ms / scale, window.end_ms / scale, about):
        x = window.x(value * scale)
        parts.append(svg.line(x, bottom, x, bottom + 5, "tick"))
        anchor = "start" if x < window.left + 20 else "end" if x > window.right - 20 else "middle"
        label = f"{value:,.3f}".rstrip("0").rstrip(".")
        parts.append(svg.text(x, bottom + 15, f"{label or '0'} {unit}", "axis", anchor))
    return parts
