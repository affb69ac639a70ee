"""The strategy of every layer: a strip in runs of one colour, stage boundaries, and a table."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from string import ascii_uppercase

from galvatron_compile.explain import svg
from galvatron_compile.explain.parts import Column, Grid, Key, Section, numbers
from galvatron_compile.plans import Plan, Stage
from galvatron_compile.prediction import Prediction
from galvatron_compile.quantities import GIB, count
from galvatron_compile.strategy import Strategy

TITLE = "Strategy of every layer"
NUM_COLOURS = 10
_TOP, _HEIGHT = 20.0, 40.0
_LONG_TABLE = 40
_ROOM_FOR_EDGE = 5.0
_SUMMED = (
    "Numbers of the table are sums over the run's layers; stages run at the same time, so their "
    "sum exceeds the step."
)


def section(plan: Plan, prediction: Prediction) -> Section:
    letters = {strategy: _letter(i) for i, strategy in enumerate(dict.fromkeys(plan.strategies))}
    keys = tuple(
        Key(_colour(index), f"{letter}  {strategy} — {count(number, 'layer')}")
        for index, (strategy, letter) in enumerate(letters.items())
        for number in [plan.strategies.count(strategy)]
    )
    return Section(
        TITLE,
        _lead(plan, len(letters)),
        _strip(plan, letters),
        keys,
        (_table(plan, prediction, letters),),
        (_SUMMED,) if plan.pp > 1 and prediction.layers else (),
    )


def _lead(plan: Plan, num_strategies: int) -> str:
    how = "all with one strategy" if num_strategies == 1 else f"{num_strategies} strategies"
    text = f"{count(len(plan.layers), 'layer')}, {how}."
    if plan.num_stages > 1:
        text += f" {plan.num_stages} stages, with a mark where one ends"
        text += "; beneath each stage the group that runs it." if plan.virtual > 1 else "."
    return text


def _letter(index: int) -> str:
    rounds, place = divmod(index, 26)
    return ascii_uppercase[place] + (str(rounds + 1) if rounds else "")


def _colour(index: int) -> str:
    return f"strategy-{index % NUM_COLOURS}"


def _runs(plan: Plan, keys: Sequence[object]) -> list[tuple[int, int]]:
    cuts = [i for i in range(1, len(keys)) if keys[i] != keys[i - 1]]
    return list(pairwise([0, *cuts, len(plan.layers)]))


def _strip(plan: Plan, letters: dict[Strategy, str]) -> str:
    places = {strategy: index for index, strategy in enumerate(letters)}
    each = svg.WIDTH / len(plan.layers)
    boxes, labels = [], []
    for first, last in _runs(plan, plan.strategies):
        strategy = plan.strategies[first]
        x, width = first * each, (last - first) * each
        colour = _colour(places[strategy])
        names = plan.layers[first] + (f" … {plan.layers[last - 1]}" if last > first + 1 else "")
        boxes.append(svg.rect(x, _TOP, width, _HEIGHT, colour, f"{names}: {strategy}"))
        inner = range(first + 1, last) if each >= _ROOM_FOR_EDGE else ()
        boxes += [_edge(index * each, "layer-edge") for index in inner]
        boxes += [_edge(x, "run-edge")] if first and width >= _ROOM_FOR_EDGE else []
        left, right = _widest_piece(plan, first, last)
        place = ((left + right) / 2 * each, _TOP + _HEIGHT / 2)
        label = f"{letters[strategy]}  {strategy}"
        label = label if svg.fits(label, (right - left) * each) else letters[strategy]
        if svg.fits(label, (right - left) * each):
            labels.append(svg.text(*place, label, f"on-{colour}", "middle"))
    axis = [
        svg.text(0, 8, "layer 0", "axis"),
        svg.text(svg.WIDTH, 8, f"layer {len(plan.layers) - 1}", "axis", "end"),
    ]
    stages = plan.stages if plan.num_stages > 1 else ()
    height = _TOP + _HEIGHT + (34 if stages else 4)
    return svg.figure(height, [*boxes, *_brackets(plan, stages, each), *labels, *axis], TITLE)


def _widest_piece(plan: Plan, first: int, last: int) -> tuple[int, int]:
    """Of a run of layers, the longest part inside one stage: a label there crosses no boundary."""
    inside = [stage.first for stage in plan.stages if first < stage.first < last]
    return max(pairwise([first, *inside, last]), key=lambda piece: piece[1] - piece[0])


def _edge(x: float, colour: str) -> str:
    return svg.line(x, _TOP, x, _TOP + _HEIGHT, colour)


def _brackets(plan: Plan, stages: Sequence[Stage], each: float) -> list[str]:
    """Under every stage a bracket and its number, or that of its group if groups run several."""
    if not stages:
        return []
    noun = "group" if plan.virtual > 1 else "stage"
    labels = [str(index % plan.pp) for index in range(len(stages))]
    narrowest = min(stage.last - stage.first for stage in stages) * each
    if all(svg.fits(f"{noun} {label}", narrowest) for label in labels):
        labels = [f"{noun} {label}" for label in labels]
    every = 1
    while not svg.fits(max(labels, key=len), narrowest * every):
        every *= 2
    y, parts = _TOP + _HEIGHT + 6, []
    for index, stage in enumerate(stages):
        left, right = stage.first * each + 2, stage.last * each - 2
        if index:
            parts.append(_edge(stage.first * each, f"stage-edge{' narrow' * (narrowest < 40)}"))
        tip = f"stage {index} on group {index % plan.pp}: layers {stage.first}–{stage.last - 1}"
        parts.append(svg.rect(left, y, right - left, 3, "bracket", tip))
        if index % every == 0:
            parts.append(svg.text((left + right) / 2, y + 16, labels[index], "axis", "middle"))
    return parts


def _table(plan: Plan, prediction: Prediction, letters: dict[Strategy, str]) -> Grid:
    places = {strategy: index for index, strategy in enumerate(letters)}
    kinds = plan.classes or ("",) * len(plan.layers)
    runs = _runs(plan, list(zip(plan.strategies, kinds, strict=True)))
    columns = [Column("layers"), Column("names", "code"), Column("number", "number")]
    columns.append(Column("strategy", "code"))
    cells: list[list[str]] = [[], [], [], []]
    for first, last in runs:
        single = last == first + 1
        cells[0].append(str(first) if single else f"{first}–{last - 1}")
        names = plan.layers[first]
        cells[1].append(names if single else f"{names} … {plan.layers[last - 1]}")
        cells[2].append(str(last - first))
        cells[3].append(f"{letters[plan.strategies[first]]}  {plan.strategies[first]}")
    if plan.num_stages > 1:
        columns.append(Column("stages", "number"))
        cells.append([_stages_of(plan, first, last) for first, last in runs])
    for title, key, scale in (
        ("step ms", "step_ms", 1.0),
        ("resharding ms", "resharding_ms", 1.0),
        ("states GiB", "state_bytes", GIB),
        ("saved GiB a micro-batch", "saved_bytes", GIB),
    ):
        if any(layer.get(key) for layer in prediction.layers):
            sums = [sum(x.get(key, 0.0) for x in prediction.layers[a:b]) for a, b in runs]
            columns.append(Column(title, "number"))
            cells.append(numbers(sums, scale))
    return Grid(
        tuple(columns),
        tuple(zip(*cells, strict=True)),
        tuple(_colour(places[plan.strategies[first]]) for first, _ in runs),
        folded=f"All {len(runs)} runs of layers" if len(runs) > _LONG_TABLE else "",
    )


def _stages_of(plan: Plan, first: int, last: int) -> str:
    inside = [i for i, stage in enumerate(plan.stages) if stage.first < last and stage.last > first]
    return str(inside[0]) if len(inside) == 1 else f"{inside[0]}–{inside[-1]}"
