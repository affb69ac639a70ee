"""The pipeline's timeline: a row per group, a box per action, from the simulated schedule."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

from galvatron_compile.errors import PlanError
from galvatron_compile.explain import svg
from galvatron_compile.explain.parts import Key, Section
from galvatron_compile.plans import Plan
from galvatron_compile.prediction import Prediction, schedule_name, stage_noun
from galvatron_compile.quantities import count, duration, percent
from galvatron_compile.timeline import KINDS, Span, Timeline, simulate

TITLE = "The pipeline's timeline"
_LEFT, _GAP, _TOP = 76.0, 34.0, 6.0
_WHOLE = 150  # actions in a row that are still told apart when all of them are drawn
_DIGIT = 6.2  # advance of a digit of the boxes' small print
_MOSTLY = 0.6  # of the step, from which leaving out the rest is not worth it
_PART = 64  # actions in a row of each part when they are not
_WITH_TIPS = 3_000


class Window(NamedTuple):
    """A part of the step, and where on the page it is drawn."""

    start_ms: float
    end_ms: float
    left: float
    right: float

    def x(self, time_ms: float) -> float:
        share = (time_ms - self.start_ms) / (self.end_ms - self.start_ms)
        return self.left + min(max(share, 0.0), 1.0) * (self.right - self.left)


def section(plan: Plan, prediction: Prediction) -> Section:
    if plan.pp == 1:
        batches = count(plan.num_micro_batches, "micro-batch", "micro-batches")
        return Section(
            TITLE, f"There is no pipeline: every rank runs all layers, for {batches} in turn."
        )
    try:
        timeline = simulate(plan)
    except PlanError as error:
        return Section(TITLE, f"This schedule cannot be drawn: {error}.")
    windows = _windows(timeline)
    present = {span.kind for row in timeline.rows for span in row}
    keys = [Key(f"action-{kind}", name) for kind, name in KINDS.items() if kind in present]
    notes = []
    if plan.virtual > 1:
        notes.append("A group's second, fourth, … stage is drawn paler.")
    if len(windows) > 1:
        shown = sum(window.end_ms - window.start_ms for window in windows)
        notes.append(
            f"Only the first and the last {_time(timeline, windows[0].end_ms)} are drawn, "
            f"{percent(shown / timeline.total_ms)} of the step; the middle repeats."
        )
    return Section(
        TITLE,
        _lead(plan, prediction, timeline),
        _figure(plan, timeline, windows),
        (*keys, Key("idle", "idle")),
        notes=tuple(notes),
    )


def _time(timeline: Timeline, time_ms: float) -> str:
    return f"{time_ms:.0f} units" if timeline.assumed else duration(time_ms)


def _lead(plan: Plan, prediction: Prediction, timeline: Timeline) -> str:
    batches = count(plan.num_micro_batches, "micro-batch", "micro-batches")
    who = f"{plan.pp} {stage_noun(plan)}s, {batches}, {schedule_name(plan)} schedule"
    idle = f"they idle {percent(timeline.idle_share)} of the time"
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


def _windows(timeline: Timeline) -> list[Window]:
    """All of the step, or its first and last part where it has too many actions."""
    longest = max(len(row) for row in timeline.rows)
    total = timeline.total_ms
    turn = min(span.start_ms for row in timeline.rows for span in row if span.kind in "BI")
    first = next(span.start_ms for span in timeline.rows[0] if span.kind in "BI")
    part = max(_PART * total / longest, first + 0.3 * turn)  # the ramp up, and some of the middle
    if longest <= _WHOLE or 2 * part >= _MOSTLY * total:
        return [Window(0.0, total, _LEFT, svg.WIDTH)]
    half = (svg.WIDTH - _LEFT - _GAP) / 2
    return [
        Window(0.0, part, _LEFT, _LEFT + half),
        Window(total - part, total, svg.WIDTH - half, svg.WIDTH),
    ]


def _figure(plan: Plan, timeline: Timeline, windows: Sequence[Window]) -> str:
    num = len(timeline.rows)
    step = 32.0 if num <= 6 else 22.0 if num <= 16 else 14.0 if num <= 32 else 10.0
    box = step - (4 if step > 20 else 2)
    bottom = _TOP + step * num
    drawn = sum(
        span.end_ms > w.start_ms and span.start_ms < w.end_ms
        for w in windows for row in timeline.rows for span in row
    )  # fmt: skip
    parts: list[str] = []
    for window in windows:
        for group in range(num):
            y = _TOP + step * group + (step - box) / 2
            parts.append(svg.rect(window.left, y, window.right - window.left, box, "idle"))
        draw = _separate if drawn <= _WITH_TIPS else _merged
        parts += draw(timeline, window, step, box)
        parts += _axis(timeline, window, bottom)
    if len(windows) > 1:
        middle = (windows[0].right + windows[1].left) / 2
        parts.append(svg.text(middle, (_TOP + bottom) / 2, "…", "gap", "middle"))
    every = 1 if step >= 14 else 4
    for group in range(0, num, every):
        label = f"{stage_noun(plan)} {group}"
        parts.append(svg.text(_LEFT - 10, _TOP + step * (group + 0.5), label, "label", "end"))
    return svg.figure(bottom + 26, parts, f"{TITLE}: {num} {stage_noun(plan)}s")


def _visible(row: Sequence[Span], window: Window) -> list[tuple[Span, float, float]]:
    """Spans with their left edge and width, a hairline apart."""
    found = []
    for span in row:
        if span.end_ms > window.start_ms and span.start_ms < window.end_ms:
            left, right = window.x(span.start_ms), window.x(span.end_ms)
            found.append((span, left, max(right - left - 0.6, 0.3)))
    return found


def _colour(span: Span) -> str:
    return f"action-{span.kind}{' pale' if span.chunk % 2 else ''}"


def _separate(timeline: Timeline, window: Window, step: float, box: float) -> list[str]:
    last = max(span.micro_batch for row in timeline.rows for span in row)
    room = len(str(last)) * _DIGIT  # all boxes of a kind have numbers, or none
    parts = []
    for group, row in enumerate(timeline.rows):
        y = _TOP + step * group + (step - box) / 2
        for span, left, width in _visible(row, window):
            what = "" if span.kind == "S" else f" of micro-batch {span.micro_batch}"
            time = _time(timeline, span.end_ms - span.start_ms)
            when = f"{_time(timeline, span.start_ms)} on, for {time}"
            parts.append(
                svg.rect(left, y, width, box, _colour(span), f"{KINDS[span.kind]}{what}: {when}")
            )
            label = str(span.micro_batch)
            if span.kind != "S" and box >= 12 and room <= width:
                parts.append(
                    svg.text(left + width / 2, y + box / 2, label, f"on-{_colour(span)}", "middle")
                )
    return parts


def _merged(timeline: Timeline, window: Window, step: float, box: float) -> list[str]:
    boxes = defaultdict[str, list[tuple[float, float, float, float]]](list)
    for group, row in enumerate(timeline.rows):
        y = _TOP + step * group + (step - box) / 2
        for span, left, width in _visible(row, window):
            boxes[_colour(span)].append((left, y, width, box))
    return [svg.rects(found, colour) for colour, found in boxes.items()]


def _axis(timeline: Timeline, window: Window, bottom: float) -> list[str]:
    if timeline.assumed:
        return []
    seconds = timeline.total_ms >= 2_000
    scale, unit = (1_000.0, "s") if seconds else (1.0, "ms")
    about = max(2, round((window.right - window.left) / 150))
    parts = []
    for value in svg.ticks(window.start_ms / scale, window.end_ms / scale, about):
        x = window.x(value * scale)
        parts.append(svg.line(x, bottom, x, bottom + 5, "tick"))
        anchor = "start" if x < window.left + 20 else "end" if x > window.right - 20 else "middle"
        label = f"{value:,.3f}".rstrip("0").rstrip(".")
        parts.append(svg.text(x, bottom + 15, f"{label or '0'} {unit}", "axis", anchor))
    return parts
