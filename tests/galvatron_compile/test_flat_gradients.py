"""Gradients lie in the rows that reduce-scatter wants, in PyTorch and packed by a kernel."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from galvatron_compile.flat_gradients import Gradients
from galvatron_compile.kernels import base
from galvatron_compile.layout import ParameterLayout
from galvatron_compile.placement import R
from galvatron_compile.slots import Slot, place

CPU = torch.device("cpu")


def placed(shapes: list[tuple[int, ...]], parts: int) -> tuple[list[Slot], int]:
    layouts = [ParameterLayout(f"w{i}", s, R, 1, parts, 1) for i, s in enumerate(shapes)]
    slots, shard_numel, _ = place([(i, x, torch.empty(0)) for i, x in enumerate(layouts)], parts)
    return slots, shard_numel


def numbered(shape: tuple[int, ...], start: int) -> torch.Tensor:
    return torch.arange(start, start + torch.Size(shape).numel()).reshape(shape).float()


def expected(slots: list[Slot], totals: dict[int, torch.Tensor], shape: tuple[int, int]) -> Any:
    """One element after the other: ``j`` of a parameter is ``j % chunk`` of rank ``j // chunk``."""
    rows = torch.zeros(shape)
    for slot in slots:
        for j, value in enumerate(totals.get(slot.index, torch.empty(0)).flatten().tolist()):
            rows[j // slot.chunk, slot.offset + j % slot.chunk] = value
    return rows


def check(shapes: list[tuple[int, ...]], parts: int, arrivals: list[tuple[int, bool]]) -> None:
    """arrivals: (index of a parameter, whether what arrived so far is packed right after)."""
    slots, shard_numel = placed(shapes, parts)
    gradients = Gradients(slots, parts, shard_numel, torch.float32, CPU)
    by_index = {slot.index: slot for slot in slots}
    totals: dict[int, torch.Tensor] = {}
    for start, (index, packs) in enumerate(arrivals):
        gradient = numbered(shapes[index], 1 + 1000 * start)
        totals[index] = totals.get(index, 0) + gradient
        gradients.add(by_index[index], gradient)
        if packs:
            gradients.pack()
    pending = gradients.take()
    if not arrivals:
        assert pending is None
        return
    assert pending is not None
    assert torch.equal(pending, expected(slots, totals, (parts, shard_numel)))
    assert gradients.touched == set(totals) and not gradients.arrived and not gradients.filled
    assert gradients.take() is None


SHAPES = st.lists(st.lists(st.integers(0, 7), max_size=2).map(tuple), min_size=1, max_size=4)


@settings(max_examples=200, deadline=None)
@given(SHAPES, st.integers(1, 5), st.data())
def test_every_element_is_in_its_place(
    shapes: list[tuple[int, ...]], parts: int, data: st.DataObject
) -> None:
    arrival = st.tuples(st.integers(0, len(shapes) - 1), st.booleans())
    check(shapes, parts, data.draw(st.lists(arrival, max_size=6)))


def test_a_kernel_packs_only_what_comes_first(interpreted: Any) -> None:
    interpreted(1).run(in_the_interpreter)


def in_the_interpreter() -> None:
    assert base.INTERPRETED
    shapes = [(5, 3), (4,), (1,)]
    for arrivals in (
        [(0, False), (1, False), (2, False)],  # in one launch
        [(0, False), (0, False), (1, False)],  # one twice: the second is added
        [(0, True), (0, False), (1, False)],  # one that is there already
        [(1, True), (0, True), (2, True)],
    ):
        check(shapes, 2, arrivals)


def test_a_sparse_gradient_is_added_to_a_dense_one() -> None:
    slots, shard_numel = placed([(5, 2)], 2)
    gradients = Gradients(slots, 2, shard_numel, torch.float32, CPU)
    for gradient in (torch.ones(5, 2), torch.eye(5, 2).to_sparse()):
        gradients.add(slots[0], gradient)
    pending = gradients.take()
    assert pending is not None
    assert torch.equal(pending.flatten()[:10], (torch.ones(5, 2) + torch.eye(5, 2)).flatten())
    assert pending.flatten()[10:].tolist() == [0.0, 0.0]
