"""Every element of a parameter lies where the layout says, exactly once."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from galvatron_compile.errors import ShapeError
from galvatron_compile.layout import ParameterLayout
from galvatron_compile.placement import P, R, S, V


@st.composite
def layouts(draw: st.DrawFn) -> ParameterLayout:
    tp, dp = draw(st.integers(1, 4)), draw(st.integers(1, 5))
    shape = draw(st.lists(st.integers(1, 7), min_size=0, max_size=3))
    tensor = draw(st.sampled_from([R, V]))
    if shape and draw(st.booleans()):
        dim, outer = draw(st.integers(0, len(shape) - 1)), draw(st.integers(1, 3))
        shape[dim] *= outer * tp
        tensor = S(dim, outer)
    zero = draw(st.integers(0, 3))
    return ParameterLayout("w", tuple(shape), tensor, tp, dp, zero)


def numbered(layout: ParameterLayout) -> torch.Tensor:
    count = int(torch.tensor(layout.shape).prod()) if layout.shape else 1
    return torch.arange(count).reshape(layout.shape)


@settings(max_examples=200, deadline=None)
@given(layouts())
def test_owners_hold_every_element_once_and_assemble_it(layout: ParameterLayout) -> None:
    full = numbered(layout)
    shards = {rank: layout.take(full, rank) for rank in range(layout.tp * layout.dp)}
    for rank, shard in shards.items():
        assert tuple(shard.shape) == layout.local_shape(rank)
    owned = torch.cat([shards[rank].flatten() for rank in layout.owners()])
    assert torch.equal(owned.sort().values, full.flatten())
    assert torch.equal(layout.assemble({r: shards[r] for r in layout.owners()}), full)
    holders = [r for r in shards if layout.is_owner(r) and shards[r].numel()]
    assert holders == layout.owners()


@settings(max_examples=200, deadline=None)
@given(layouts())
def test_boxes_cut_from_the_whole_give_the_local_elements(layout: ParameterLayout) -> None:
    full = numbered(layout)
    for rank in range(layout.tp * layout.dp):
        cut = [
            full[tuple(slice(o, o + n) for o, n in zip(offsets, sizes, strict=True))].flatten()
            for offsets, sizes in layout.boxes(rank)
        ]
        mine = torch.cat(cut) if cut else torch.zeros(0, dtype=full.dtype)
        assert torch.equal(mine.sort().values, layout.take(full, rank).flatten().sort().values)


@settings(max_examples=100, deadline=None)
@given(layouts())
def test_zero_chunks_like_torch_chunk(layout: ParameterLayout) -> None:
    full = numbered(layout)
    for tensor_index in range(layout.tp):
        local = layout.take_tensor(full, tensor_index).reshape(layout.rows, -1)
        chunks = list(local.chunk(layout.dp) if layout.zero else [local] * layout.dp)
        for data_index in range(layout.dp):
            mine = layout.take(full, data_index * layout.tp + tensor_index).flatten()
            wanted = chunks[data_index] if data_index < len(chunks) else local[:0]
            assert torch.equal(mine, wanted.flatten())


def test_fused_weight_gives_each_rank_a_block_of_every_piece() -> None:
    layout = ParameterLayout("qkv", (12, 2), S(0, 3), tp=2, dp=2, zero=3)
    full = torch.arange(12)[:, None].expand(12, 2)
    assert layout.take(full, 1)[:, 0].tolist() == [2, 3, 6]
    assert layout.take(full, 3)[:, 0].tolist() == [7, 10, 11]
    assert layout.boxes(1) == [((2, 0), (2, 2)), ((6, 0), (1, 2))]


def test_refuses_what_does_not_divide_and_wrong_shapes() -> None:
    with pytest.raises(ShapeError, match="size 10 cannot be cut into 3 x 2"):
        ParameterLayout("w", (10, 2), S(0, 3), 2, 1, 0)
    with pytest.raises(ValueError, match="no layout for P"):
        ParameterLayout("w", (10, 2), P, 2, 1, 0)
    with pytest.raises(ShapeError, match="expected shape"):
        ParameterLayout("w", (4,), R, 1, 2, 1).take(torch.zeros(5), 0)
    with pytest.raises(KeyError):
        ParameterLayout("w", (4,), R, 1, 2, 1).assemble({0: torch.zeros(2)})
