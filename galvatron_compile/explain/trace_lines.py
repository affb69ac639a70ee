"""Predicted and measured timelines under each other, drawn on one axis."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import NamedTuple

from galvatron_compile.explain import svg
from galvatron_compile.explain.pipeline import COLOURS
from galvatron_compile.explain.streams import BENEATH, Window, time_axis
from galvatron_compile.plans import Stage
from galvatron_compile.quantities import count, duration
from galvatron_compile.timeline import NAMES, Span, blocks
from galvatron_compile.trace import Trace

LEFT = 148.0
_TOP = 20.0
_BAR, _WITH_TIPS = 5.0, 3_000
_DIGIT, _WIDE = 6.2, 7.5  # advances of small print, and of labels with some air


class Line(NamedTuple):
    """A timeline of one group, predicted or measured: its boxes with the chunk they belong to, and
    what runs beside them."""

    group: int
    label: str
    boxes: list[tuple[Span, int]]
    beside: tuple[Span, ...]


def timelines(trace: Trace) -> str:
    """The figure: boxes of what is computed, thin bars of communication beneath them."""
    num = trace.num_groups
    box = 22.0 if num <= 6 else 14.0 if num <= 16 else 8.0
    found = lines(trace)
    window = Window(0.0, trace.total_ms, LEFT, svg.WIDTH)
    few = sum(len(line.boxes) for line in found) <= _WITH_TIPS
    parts, top, small = [], _TOP, " small" if box < 12 else ""
    for before, line in zip([found[0], *found], found, strict=False):
        top += (9.0 if box > 12 else 3.0) * (line.group - before.group)
        parts.append(svg.rect(LEFT, top, svg.WIDTH - LEFT, box, "idle"))
        parts += (_separate if few else _merged)(line, window, top, box)
        parts += _bars(line.beside, window, top + box + 1.5)
        parts.append(svg.text(LEFT - 10, top + box / 2, line.label, f"label{small}", "end"))
        top += box + _BAR + 5
    parts += time_axis(window, top, window.end_ms, 7) + _ends(trace, window, top)
    return svg.figure(top + 26, parts, f"Predicted and measured timelines of {count(num, 'group')}")


def lines(trace: Trace) -> list[Line]:
    """Of every group what was predicted, if anything was, and under it what was measured."""
    plan, found = trace.plan, []
    stages = plan.stages or (Stage(0, len(plan.layers)),)
    chunk_of = [i // plan.pp for i, s in enumerate(stages) for _ in range(s.first, s.last)]
    for group in range(trace.num_groups):
        for what, spans in zip(("predicted", "measured"), trace.spans(group), strict=True):
            if spans:
                boxes = blocks(_closed(spans, trace.total_ms / svg.WIDTH), chunk_of)
                beside = tuple(span for span in spans if span.stream != "compute")
                found.append(Line(group, f"{trace.who(group)} {what}", boxes, beside))
    return found


def _closed(spans: Sequence[Span], gap_ms: float) -> list[Span]:
    """Compute spans without the gaps between them that are narrower than can be seen."""
    computed = [span for span in spans if span.stream == "compute"]
    for place, (one, two) in enumerate(pairwise(list(computed))):
        if two.start_ms - one.end_ms < gap_ms:
            computed[place] = replace(one, end_ms=two.start_ms)
    return computed


def _separate(line: Line, window: Window, top: float, height: float) -> list[str]:
    # All of a kind have numbers or none.
    room = max(len(str(span.micro_batch)) for span, _ in line.boxes) * _DIGIT + 1
    parts = []
    for span, chunk in line.boxes:
        left, right = window.x(span.start_ms), window.x(span.end_ms)
        width = max(right - left - 0.6, 0.4)
        colour = f"{COLOURS[span.kind]}{' pale' if chunk % 2 else ''}"
        what = "" if span.micro_batch < 0 else f" of micro-batch {span.micro_batch}"
        took = duration(span.end_ms - span.start_ms)
        tip = f"{line.label}: {NAMES[span.kind]}{what}, {duration(span.start_ms)} on, for {took}"
        parts.append(svg.rect(left, top, width, height, colour, tip))
        if span.micro_batch >= 0 and height >= 12 and room <= width:
            place = left + width / 2, top + height / 2
            parts.append(svg.text(*place, str(span.micro_batch), f"on-{colour}", "middle"))
    return parts


def _merged(line: Line, window: Window, top: float, height: float) -> list[str]:
    found = defaultdict[str, list[tuple[float, float, float, float]]](list)
    for span, chunk in line.boxes:
        left, right = window.x(span.start_ms), window.x(span.end_ms)
        colour = f"{COLOURS[span.kind]}{' pale' if chunk % 2 else ''}"
        found[colour].append((left, top, max(right - left - 0.3, 0.3), height))
    return [svg.rects(boxes, colour) for colour, boxes in found.items()]


def _bars(spans: Sequence[Span], window: Window, top: float) -> list[str]:
    parts = []
    for kind, (colour, _) in BENEATH.items():
        boxes = []
        for span in spans:
            if span.kind.startswith(kind):
                left, right = window.x(span.start_ms), window.x(span.end_ms)
                boxes.append((left, top, max(right - left, 0.4), _BAR))
        parts.append(svg.rects(boxes, colour))
    return parts


def _ends(trace: Trace, window: Window, bottom: float) -> list[str]:
    """Where the step ends on both sides; the later end is the end of the axis."""
    step = trace.rows[0]
    both = [("predicted", step.predicted), ("measured", step.measured)]
    ends = sorted((end_ms, what) for what, end_ms in both if end_ms is not None)
    parts, room = [], svg.WIDTH
    for end_ms, what in reversed(ends):
        x = window.x(end_ms)
        label = f"{what} {duration(end_ms)}"
        place = min(x, room)
        width = len(label) * _WIDE
        anchor = "end" if place - width > LEFT else "start"
        parts.append(svg.line(x, 15, x, bottom, "end-mark"))
        parts.append(svg.text(place, 8, label, "axis", anchor))
        room = place - width
    return parts
