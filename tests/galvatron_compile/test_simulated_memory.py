"""What a simulated rank holds, worked out by hand."""

from __future__ import annotations

import pytest

from galvatron_compile.actions import LayerOutline, Outline, UnitOutline
from galvatron_compile.passes.order import order
from galvatron_compile.simulator import simulate
from galvatron_compile.work import LayerWork, Phase, UnitWork, Work


def test_memory_of_zero3_by_hand() -> None:
    """Parameters from gather to free, gradients from the end of backward to that of their sum."""
    units = (UnitOutline("a", zero=3), UnitOutline("b", zero=3))
    layers = {i: LayerOutline(name, (i,)) for i, name in enumerate("ab")}
    outline = Outline(((0, 1),), layers, units, 1)
    work = Work(
        {
            0: LayerWork(Phase(1), Phase(2), saved_bytes=100, transient_bytes=7),
            1: LayerWork(Phase(1), Phase(2), saved_bytes=200, transient_bytes=9),
        },
        tuple(
            UnitWork(0, 1, 0, 0, size // 4, size // 2, size, 2 * size, size // 2)
            for size in (1000, 4000)
        ),
        reserve_bytes=50,
    )
    memory = simulate([outline], [order(outline)], [work]).groups[0].memory
    base = 50 + 250 + 500 + 1000 + 2000
    steps = {time: size - base for time, size in memory.steps}
    # Forward: b's parameters come one layer ahead, a's go. Backward of b from 2 to 4: both are
    # there. From 4 on the sum of b's gradients runs, with room for its result; it is over at 5 and
    # waited for at 6, before that of a's gradients starts.
    assert steps == {
        0.0: 1000 + 4000 + 100 + 7,
        1.0: 4000 + 300 + 9,
        2.0: 1000 + 4000 + 300 + 9,
        4.0: 1000 + 100 + 7 + 8000 + 2000,
        6.0: 2000 + 2000 + 500,
        7.0: 2000 + 500,
    }
    # At 4, when b's parameters are free and its gradients are there twice, as made and packed:
    assert (memory.peak_bytes - base, memory.peak_at_ms) == (1000 + 100 + 2 * 8000, 4.0)


@pytest.mark.parametrize("zero", [0, 1, 2])
def test_gradients_and_activations_by_hand(zero: int) -> None:
    """Two micro-batches in turn: activations of one at a time, whole gradients until summed."""
    outline = Outline(
        ((0,),), {0: LayerOutline("a", (0,))}, (UnitOutline("a", zero, gathers=False),), 2
    )
    kept = 400 if zero == 0 else 100
    unit = UnitWork(reduce_ms=0.5, pending_bytes=400, gradient_bytes=kept)
    work = Work({0: LayerWork(Phase(1), Phase(2), saved_bytes=30, transient_bytes=5)}, (unit,))
    memory = simulate([outline], [order(outline)], [work]).groups[0].memory
    steps = dict(memory.steps)
    assert steps[0.0] == 30 + 5
    assert steps.get(1.0, steps[0.0]) == 30 + 5  # the room is made when the gradients are there
    after = {0: 430, 1: 430, 2: 430 + 100}[zero]  # another forward, or beside a sum as well
    assert steps[3.0] == after + 5
    assert memory.steps[-1].num_bytes == kept
    # When the last sum starts; under ZeRO-2 its gradients are packed then, beside the first's sum.
    peak = {0: 435, 1: 400 + 100, 2: 100 + 400 + 400}[zero]
    assert memory.peak_bytes == peak
    assert sum(memory.parts.values()) == peak


def test_recomputed_activations_come_back_for_backward_alone() -> None:
    outline = Outline(
        ((0, 1),), {i: LayerOutline("a", (0,), recompute=True) for i in (0, 1)},
        (UnitOutline("a", gathers=False),), 1,
    )  # fmt: skip
    each = LayerWork(Phase(1), Phase(2), Phase(1), saved_bytes=10, recomputed_bytes=90)
    found = simulate([outline], [order(outline)], [Work({0: each, 1: each}, (UnitWork(),))])
    assert found.step_ms == 2 + 2 * 3
    assert dict(found.groups[0].memory.steps) == {
        0.0: 10, 1.0: 20, 2.0: 110, 5.0: 100, 8.0: 0,
    }  # fmt: skip
