"""The best step time against the memory that a rank may use, with the plan's own place."""

from __future__ import annotations

from collections.abc import Sequence

from galvatron_compile import notation
from galvatron_compile.explain import svg
from galvatron_compile.explain.parts import Column, Grid, Section, numbers
from galvatron_compile.plans import Plan
from galvatron_compile.prediction import Prediction, TradePoint
from galvatron_compile.quantities import GIB, duration, percent, size

TITLE = "Step time against memory limit"
_LEFT, _RIGHT, _TOP, _BOTTOM = 76.0, 24.0, 16.0, 246.0


def section(plan: Plan, prediction: Prediction) -> Section:
    points = prediction.tradeoff
    if len(points) < 2:
        return Section(TITLE, "The plan does not say what other memory limits would cost.")
    chosen = _chosen(plan, prediction)
    times = [point.step_ms for point in points]
    rows = [
        (limit, time, percent(step / min(times) - 1), point.notation or "–")
        for limit, time, step, point in zip(
            numbers([point.memory_bytes for point in points], GIB),
            numbers(times), times, points, strict=True,
        )
    ]  # fmt: skip
    columns = (
        Column("limit GiB", "number"),
        Column("best step ms", "number"),
        Column("over the fastest", "number"),
        Column("plan", "code"),
    )
    grid = Grid(columns, tuple(rows), emphasised=chosen)
    return Section(
        TITLE,
        _lead(points, chosen),
        _figure(points, chosen),
        tables=(grid,),
        notes=("The time axis does not start at zero.",),
    )


def _chosen(plan: Plan, prediction: Prediction) -> int | None:
    """The point of this very plan, or else the one at the plan's limit; the greatest of several."""
    points = prediction.tradeoff
    written = notation.format(plan)
    same = [i for i, point in enumerate(points) if point.notation == written]
    limit = prediction.memory_limit_bytes
    near = [i for i, p in enumerate(points) if limit and abs(p.memory_bytes - limit) < 0.01 * limit]
    both = [index for index in near if index in same]
    found = both or near or same
    return found[-1] if found else None


def _lead(points: Sequence[TradePoint], chosen: int | None) -> str:
    best = min(point.step_ms for point in points)
    enough = next(point for point in points if point.step_ms <= best * 1.001)
    text = f"More memory buys time up to {size(enough.memory_bytes)}; beyond it hardly any."
    if enough is points[-1]:
        text = f"More memory buys time up to {size(enough.memory_bytes)}, the most that was tried."
    if chosen is not None and points[chosen].step_ms > best * 1.001:
        gain = percent(points[chosen].step_ms / best - 1)
        text += f" This plan is {gain} slower than it could be there."
    return text


def _figure(points: Sequence[TradePoint], chosen: int | None) -> str:
    x_low, x_high = points[0].memory_bytes / GIB, points[-1].memory_bytes / GIB
    times = [point.step_ms for point in points]
    scale, unit = (1_000.0, "s") if max(times) >= 2_000 else (1.0, "ms")
    low, high = min(times) / scale, max(times) / scale
    margin = 0.12 * (high - low) or 0.05 * high
    low, high = max(0.0, low - margin), high + margin
    x_margin = 0.03 * (x_high - x_low) or 1.0
    x_low, x_high = x_low - x_margin, x_high + x_margin

    def x(gib: float) -> float:
        return _LEFT + (gib - x_low) / (x_high - x_low) * (svg.WIDTH - _LEFT - _RIGHT)

    def y(time: float) -> float:
        return _BOTTOM - (time - low) / (high - low) * (_BOTTOM - _TOP)

    parts = []
    for value in svg.ticks(low, high, 4):
        parts.append(svg.line(_LEFT, y(value), svg.WIDTH - _RIGHT, y(value), "grid"))
        parts.append(svg.text(_LEFT - 10, y(value), f"{value:g} {unit}", "axis", "end"))
    for value in svg.ticks(x_low, x_high, 8):
        parts.append(svg.line(x(value), _BOTTOM, x(value), _BOTTOM + 5, "tick"))
        parts.append(svg.text(x(value), _BOTTOM + 16, f"{value:g} GiB", "axis", "middle"))
    parts.append(svg.line(_LEFT, _BOTTOM, svg.WIDTH - _RIGHT, _BOTTOM, "tick"))
    parts.append(svg.polyline(_stairs([(x(p.memory_bytes / GIB), y(p.step_ms / scale))
                                       for p in points]), "curve"))  # fmt: skip
    for index, point in enumerate(points):
        place = x(point.memory_bytes / GIB), y(point.step_ms / scale)
        tip = f"{size(point.memory_bytes)}: {duration(point.step_ms)}, {point.notation}"
        if index == chosen:
            parts.append(svg.circle(*place, 8, "chosen-ring"))
            # The curve falls: above it to the right and below it to the left there is room.
            right = place[0] < 0.72 * svg.WIDTH
            label = f"this plan: {duration(point.step_ms)} at {size(point.memory_bytes)}"
            spot = (place[0], place[1] - 20) if right else (place[0] - 14, place[1] + 14)
            parts.append(svg.text(*spot, label, "chosen-label", "start" if right else "end"))
        parts.append(svg.circle(*place, 4, "chosen" if index == chosen else "point", tip))
    return svg.figure(_BOTTOM + 28, parts, TITLE)


def _stairs(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """What is best at a limit stays possible until the next limit that was searched."""
    stairs = [points[0]]
    for x, y in points[1:]:
        stairs += [(x, stairs[-1][1]), (x, y)]
    return stairs
