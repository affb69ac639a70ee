"""Lists of actions: golden ones, and what must hold in every list.

The properties are checked by walking the lists of all groups side by side, with no idea of how
they were made.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from galvatron_compile.actions import (
    COMPUTE,
    Action,
    LayerOutline,
    Outline,
    UnitOutline,
    format_actions,
)
from galvatron_compile.errors import PlanError
from galvatron_compile.passes.order import MAX_IN_FLIGHT, order, order_evaluation
from galvatron_compile.schedules import why_not

GOLDEN = Path(__file__).parents[1] / "golden"


def pipeline(
    pp: int, per_stage: int, m: int, schedule: str = "1f1b", virtual: int = 1, zero: int = 0
) -> list[Outline]:
    """Every layer has a unit of its own."""
    outlines = []
    for group in range(pp):
        chunks = tuple(
            tuple(range(stage * per_stage, (stage + 1) * per_stage))
            for stage in range(group, pp * virtual, pp)
        )
        numbers = [layer for chunk in chunks for layer in chunk]
        units = tuple(UnitOutline(f"layer {i}", zero=zero, gathers=zero > 0) for i in numbers)
        layers = {i: LayerOutline(f"layer {i}", (u,)) for u, i in enumerate(numbers)}
        outlines.append(Outline(chunks, layers, units, m, schedule, pp, group))
    return outlines


def text(outlines: Sequence[Outline]) -> str:
    parts = []
    for outline in outlines:
        title = f"group {outline.group} of {outline.pp}\n" if outline.pp > 1 else ""
        parts.append(title + format_actions(outline, order(outline)))
    return "\n".join(parts)


@pytest.mark.parametrize(
    ("name", "outlines"),
    [
        ("order_zero3", pipeline(1, 3, 2, zero=3)),
        ("order_1f1b", pipeline(2, 2, 3, zero=1)),
        ("order_zero_bubble", pipeline(2, 1, 3, "zero-bubble")),
    ],
)
def test_the_lists_are_the_golden_ones(name: str, outlines: list[Outline]) -> None:
    assert text(outlines) == (GOLDEN / f"{name}.txt").read_text(encoding="utf-8")


# Random pipelines.


@st.composite
def groups_of_units(draw: st.DrawFn, numbers: Sequence[int]) -> tuple[list[UnitOutline], dict]:
    """A unit for most layers, perhaps one that two of them share, perhaps one more that a layer
    takes besides its own."""
    units, taken = [], defaultdict[int, list[int]](list)
    for layer in numbers:
        for extra in range(draw(st.sampled_from([1, 1, 1, 0, 2]))):
            zero = draw(st.integers(0, 3))
            gathers = zero > 0 or draw(st.booleans())
            trainable, varying = draw(st.booleans()) or extra == 0, draw(st.booleans())
            name = f"layer {layer}.{extra}"
            units.append(UnitOutline(name, zero, trainable, False, gathers, varying))
            taken[layer].append(len(units) - 1)
    if len(numbers) > 1 and draw(st.booleans()):
        zero = draw(st.integers(0, 3))
        units.append(UnitOutline("shared", zero, shared=True, gathers=zero > 0))
        for layer in draw(st.lists(st.sampled_from(numbers), min_size=2, max_size=2, unique=True)):
            taken[layer].append(len(units) - 1)
    if not units:
        units, taken[numbers[0]] = [UnitOutline("the only one")], [0]
    return units, taken


@st.composite
def pipelines(draw: st.DrawFn) -> list[Outline]:
    schedule = draw(st.sampled_from(["gpipe", "1f1b", "interleaved", "zero-bubble"]))
    pp, m = draw(st.integers(1, 4)), draw(st.integers(1, 6))
    virtual = draw(st.integers(2, 3)) if schedule == "interleaved" else 1
    m = pp * (1 + m // pp) if schedule == "interleaved" else max(m, pp)
    if why_not(schedule, pp, m, virtual):
        schedule, virtual = "1f1b", 1
    sizes = draw(st.lists(st.integers(1, 3), min_size=pp * virtual, max_size=pp * virtual))
    edges = [sum(sizes[:i]) for i in range(len(sizes) + 1)]
    frozen = draw(st.integers(0, 2))  # so many layers at the start have no backward
    outlines = []
    for group in range(pp):
        stages = range(group, pp * virtual, pp)
        chunks = tuple(tuple(range(edges[s], edges[s + 1])) for s in stages)
        numbers = [layer for chunk in chunks for layer in chunk]
        units, taken = draw(groups_of_units(numbers))
        layers = {
            i: LayerOutline(
                f"layer {i}",
                tuple(taken[i]),
                recompute=draw(st.booleans()),
                differentiable=pp > 1 or i >= frozen,
                weights_for_weights=draw(st.booleans()),
            )
            for i in numbers
        }
        outlines.append(Outline(chunks, layers, tuple(units), m, schedule, pp, group))
    return outlines


@given(pipelines())
@settings(max_examples=150, deadline=None)
def test_parameters_are_there_when_they_are_used_and_only_then(outlines: list[Outline]) -> None:
    for outline in outlines:
        actions = order(outline)
        there = {u for u, unit in enumerate(outline.units) if not unit.gathers}
        coming = set[int]()
        for place, action in enumerate(actions):
            unit = action.index
            if action.kind == "gather":
                assert unit not in there | coming
                coming.add(unit)
                uses = [n for a in actions[place : place + 40] if (n := needs(outline, a))]
                # What is needed now and next does not count.
                assert len(coming.difference(*uses[:2])) <= MAX_IN_FLIGHT
            elif action.kind == "wait_gather":
                coming.remove(unit)
                there.add(unit)
            elif action.kind == "free":
                assert outline.units[unit].zero == 3
                there.remove(unit)
            else:
                assert set(needs(outline, action)) <= there
        assert not coming
        gathered = {u for u, unit in enumerate(outline.units) if unit.gathers}
        assert there.isdisjoint(u for u in gathered if outline.units[u].zero == 3)
        once = Counter(a.index for a in actions if a.kind == "gather")
        assert all(count == 1 for u, count in once.items() if outline.units[u].zero != 3)
        shared = [u for u in once if outline.units[u].shared]
        assert all(once[u] == 1 for u in shared), "it stays until the end of the step"


def needs(outline: Outline, action: Action) -> tuple[int, ...]:
    if action.kind not in COMPUTE:
        return ()
    layer = outline.layers[action.index]
    skipped = action.kind == "backward_weight" and not layer.weights_for_weights
    return () if skipped else layer.units


@given(pipelines())
@settings(max_examples=150, deadline=None)
def test_gradients_are_summed_once_when_they_are_complete(outlines: list[Outline]) -> None:
    for outline in outlines:
        actions = order(outline)
        waiting = defaultdict[int, set[tuple[int, int]]](set)  # unit -> (layer, micro-batch)
        sums, under_way = Counter[int](), set[int]()
        for action in actions:
            if action.kind in ("backward", "backward_weight"):
                for unit in outline.layers[action.index].units:
                    if outline.units[unit].trainable:
                        waiting[unit].add((action.index, action.micro_batch))
            elif action.kind == "reduce":
                found = outline.units[action.index]
                batches = {batch for _, batch in waiting.pop(action.index)}
                if found.zero >= 2 and not found.shared:
                    assert len(batches) == 1
                sums[action.index] += 1
                assert action.index not in under_way
                under_way.add(action.index)
                assert len(under_way) <= MAX_IN_FLIGHT
            elif action.kind == "wait_reduce":
                under_way.remove(action.index)
        assert not under_way and not any(waiting.values())
        trained = {
            unit
            for layer in outline.layers.values()
            if layer.differentiable
            for unit in layer.units
            if outline.units[unit].trainable
        }
        assert sums == {
            u: 1 if outline.units[u].zero <= 1 else outline.num_micro_batches for u in trained
        }
        tensor = Counter(a.index for a in actions if a.kind == "reduce_tensor")
        assert tensor == Counter(u for u in trained if outline.units[u].varying)
        last = max((i for i, a in enumerate(actions) if a.kind == "wait_reduce"), default=0)
        assert all(i > last for i, a in enumerate(actions) if a.kind.startswith("reduce_t"))


@given(pipelines())
@settings(max_examples=150, deadline=None)
def test_layers_run_in_the_order_of_the_model(outlines: list[Outline]) -> None:
    for outline in outlines:
        actions = order(outline)
        forward, backward = (
            defaultdict[int, list[int]](list), defaultdict[int, list[int]](list)
        )  # fmt: skip
        done = set[tuple[str, int, int]]()
        for action in actions:
            if action.kind not in COMPUTE:
                continue
            layer, batch = action.index, action.micro_batch
            assert (action.kind, layer, batch) not in done
            done.add((action.kind, layer, batch))
            if action.kind == "forward":
                forward[batch].append(layer)
            elif action.kind in ("backward", "backward_input"):
                assert ("forward", layer, batch) in done
                again = ("recompute", layer, batch) in done
                assert again == outline.layers[layer].recompute
                backward[batch].append(layer)
            elif action.kind == "backward_weight":
                assert ("backward_input", layer, batch) in done
        every = [layer for chunk in outline.chunks for layer in chunk]
        back = [layer for layer in reversed(every) if outline.layers[layer].differentiable]
        for batch in range(outline.num_micro_batches):
            assert forward[batch] == every
            assert backward[batch] == back


# Messages.


def message(outline: Outline, action: Action) -> tuple[str, int, int, int, int]:
    """Direction, sending stage, micro-batch, and the groups it goes from and to."""
    verb, direction = action.kind.split("_")
    onward = 1 if direction == "activations" else -1
    source = action.index if verb == "send" else action.index - onward
    pp = outline.pp
    return direction, source, action.micro_batch, source % pp, (source + onward) % pp


def run_side_by_side(outlines: list[Outline], lists: Sequence[Sequence[Action]]) -> None:
    """Every group goes on until it waits for what was not sent; all must come to their end."""
    at = [0] * len(lists)
    sent, posted = set[object](), set[object]()
    moved = True
    while moved:
        moved = False
        for group, actions in enumerate(lists):
            while at[group] < len(actions):
                action = actions[at[group]]
                verb = action.kind.split("_")[0]
                if verb in ("send", "receive", "wait") and action.kind.endswith("s"):
                    found = message(outlines[group], action)
                    if verb == "wait":
                        assert found in posted, "there is no room for it"
                        if found not in sent:
                            break
                    (sent if verb == "send" else posted).add(found)
                at[group] += 1
                moved = True
    assert at == [len(actions) for actions in lists], "they wait for each other"
    assert sent == posted


@given(pipelines(), st.booleans())
@settings(max_examples=150, deadline=None)
def test_what_is_sent_is_received_in_the_same_order_and_nobody_waits_for_ever(
    outlines: list[Outline], training: bool
) -> None:
    lists = [(order if training else order_evaluation)(outline) for outline in outlines]
    run_side_by_side(outlines, lists)
    wires = {verb: defaultdict[object, list[object]](list) for verb in ("send", "receive")}
    for outline, actions in zip(outlines, lists, strict=True):
        for action in actions:
            verb = action.kind.split("_")[0]
            if verb in wires:
                found = message(outline, action)
                wires[verb][found[0], *found[3:]].append(found)
    assert wires["send"] == wires["receive"]


def test_receives_are_posted_one_piece_of_work_ahead() -> None:
    (_, second) = pipeline(2, 1, 3, "1f1b")
    kinds = [(a.kind, a.micro_batch) for a in order(second) if a.kind != "reduce"]
    first = kinds.index(("forward", 0))
    assert kinds[:first] == [
        ("receive_activations", 0), ("wait_activations", 0),
    ]  # fmt: skip
    assert kinds.index(("receive_activations", 1)) < kinds.index(("backward", 0))


def test_working_parameters_are_refreshed_a_few_at_a_time() -> None:
    (outline,) = pipeline(1, 12, 1, zero=1)
    coming, most = 0, 0
    for action in order(outline):
        coming += {"gather": 1, "wait_gather": -1}.get(action.kind, 0)
        most = max(most, coming)
    assert most == MAX_IN_FLIGHT


def test_evaluation_takes_every_micro_batch_through_all_chunks() -> None:
    (outline,) = pipeline(1, 3, 2, zero=3)
    actions = order_evaluation(outline)
    computed = [(a.kind, a.index, a.micro_batch) for a in actions if a.kind in COMPUTE]
    assert computed == [("forward", layer, batch) for batch in range(2) for layer in range(3)]
    assert {a.kind for a in actions} == {"gather", "wait_gather", "free", "forward"}


def test_a_schedule_that_does_not_fit_says_what_to_change() -> None:
    outline = replace(pipeline(4, 1, 4)[0], num_micro_batches=3)
    with pytest.raises(PlanError, match="needs at least 4 micro-batches, got 3; use gpipe"):
        order(outline)


def test_a_group_without_parameters_has_a_list() -> None:
    outline = Outline(((0,),), {0: LayerOutline("tanh")}, (), 1)
    assert [a.kind for a in order(outline)] == ["forward", "backward"]


def test_tied_units_are_summed_in_one_order_everywhere() -> None:
    names = []
    for group, title in enumerate(("ab", "ba")):
        units = tuple(UnitOutline(name, tied=True) for name in title)
        layers = {group: LayerOutline("layer", (0, 1))}
        actions = order(Outline(((group,),), layers, units, 2, "1f1b", 2, group))
        names.append([units[a.index].name for a in actions if a.kind == "reduce_tied"])
    assert names[0] == names[1]
