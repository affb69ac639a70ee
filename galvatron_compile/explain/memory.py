"""What fills a rank's memory in every pipeline group, against the limit."""

from __future__ import annotations

from galvatron_compile.explain import svg
from galvatron_compile.explain.parts import Column, Grid, Key, Section, numbers
from galvatron_compile.plans import Plan
from galvatron_compile.prediction import MEMORY_PARTS, GroupPrediction, Prediction, stage_noun
from galvatron_compile.quantities import GIB, percent, size, spans

TITLE = "Memory of a rank"
COLOURS = {key: f"memory-{key.removesuffix('_bytes')}" for key in MEMORY_PARTS}
_LEFT, _RIGHT = 84.0, 130.0
_LONG_TABLE = 16


def section(plan: Plan, prediction: Prediction) -> Section:
    groups = prediction.groups
    drawn = [group for group in groups if group.parts]
    if not drawn or len(drawn) < len(groups):
        total = prediction.memory_bytes
        known = f" A rank needs {size(total)} at its peak." if total is not None else ""
        return Section(TITLE, f"The plan does not say what its memory is filled with.{known}")
    present = [key for key in MEMORY_PARTS if any(group.parts.get(key) for group in groups)]
    return Section(
        TITLE,
        _lead(plan, prediction),
        _figure(plan, prediction),
        tuple(Key(COLOURS[key], MEMORY_PARTS[key]) for key in present),
        (_table(plan, groups, present),),
    )


def _lead(plan: Plan, prediction: Prediction) -> str:
    totals = [group.total_bytes for group in prediction.groups]
    greatest = max(totals)
    index, noun = totals.index(greatest), stage_noun(plan)
    largest = max(prediction.groups[index].parts.items(), key=lambda item: item[1])
    who = f"{noun.capitalize()} {index} needs the most: " if plan.pp > 1 else "A rank needs "
    share = f", {percent(largest[1] / greatest)} of it {MEMORY_PARTS[largest[0]]}"
    limit = prediction.memory_limit_bytes
    if limit is None:
        return f"{who}{size(greatest)}{share}. The plan names no limit."
    room = limit - greatest
    verdict = f"{size(room)} are left" if room >= 0 else f"{size(-room)} TOO MUCH"
    return f"{who}{size(greatest)} of {size(limit)}{share}; {verdict}."


def _figure(plan: Plan, prediction: Prediction) -> str:
    groups, limit = prediction.groups, prediction.memory_limit_bytes
    stacked = [max(group.total_bytes, sum(group.parts.values())) for group in groups]
    greatest = max([*stacked, limit or 0.0])
    step = 30.0 if len(groups) <= 8 else 20.0 if len(groups) <= 24 else 13.0
    bar = step * 0.74
    scale = (svg.WIDTH - _LEFT - _RIGHT) / greatest
    top = 22.0 if limit else 4.0
    bottom = top + step * len(groups)
    parts = [_tick(value, scale, top, bottom) for value in svg.ticks(0, greatest / GIB, 6)]
    for index, group in enumerate(groups):
        y, x = top + step * index + (step - bar) / 2, _LEFT
        middle = y + bar / 2
        label = f"{stage_noun(plan)} {index}" if plan.pp > 1 else "every rank"
        small = " small" if step < 14 else ""
        parts.append(svg.text(_LEFT - 10, middle, label, f"label{small}", "end"))
        for key, colour in COLOURS.items():
            width = group.parts.get(key, 0.0) * scale
            if width > 0:
                tip = f"{label}, {MEMORY_PARTS[key]}: {size(group.parts[key])}"
                parts.append(svg.rect(x, y, max(width - 0.7, 0.4), bar, colour, tip))
                x += width
        shown = size(group.total_bytes)
        shown += f" · {percent(group.total_bytes / limit)}" if limit else ""
        parts.append(svg.text(svg.WIDTH, middle, shown, f"value{small}", "end"))
    if limit:
        x = _LEFT + limit * scale
        parts.append(svg.line(x, top - 6, x, bottom + 4, "limit"))
        parts.append(svg.text(x, 7, f"limit {size(limit)}", "limit-label", "end"))
    return svg.figure(bottom + 24, parts, f"{TITLE}, per {stage_noun(plan)}")


def _tick(gib: float, scale: float, top: float, bottom: float) -> str:
    x = _LEFT + gib * GIB * scale
    label = f"{gib:g} GiB" if gib else "0"
    return svg.line(x, top - 2, x, bottom + 4, "grid") + svg.text(
        x, bottom + 14, label, "axis", "middle"
    )


def _table(plan: Plan, groups: tuple[GroupPrediction, ...], present: list[str]) -> Grid:
    columns = [numbers([group.parts.get(key) for group in groups], GIB) for key in present]
    columns.append(numbers([group.total_bytes for group in groups], GIB))
    heads = [f"{MEMORY_PARTS[key]} GiB" for key in present]
    heads += ["total GiB"]
    if any(group.in_flight for group in groups):
        heads.insert(0, "micro-batches in flight")
        columns.insert(0, [" + ".join(map(str, group.in_flight)) or "–" for group in groups])
    columns.insert(0, [spans(plan.group_layers(index)) for index in range(len(groups))])
    start = [Column("layers")]
    if plan.pp > 1:
        start.insert(0, Column(stage_noun(plan), "number"))
        columns.insert(0, [str(index) for index in range(len(groups))])
    folded = f"Numbers of all {len(groups)} {stage_noun(plan)}s"
    return Grid(
        (*start, *(Column(head, "number") for head in heads)),
        tuple(zip(*columns, strict=True)),
        folded=folded if len(groups) > _LONG_TABLE else "",
    )
