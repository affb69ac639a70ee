"""Where the parameters of a flat bucket lie."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from galvatron_compile.layout import ParameterLayout

ALIGNMENT = 32  # elements; keeps every parameter on a 64-byte boundary in the smallest dtype
Member = tuple[int, ParameterLayout, torch.Tensor]  # place in the unit, layout, whole value


@dataclass(frozen=True)
class Slot:
    """Where one parameter lies. ``index`` is its place in the unit; the rest counts elements."""

    index: int
    layout: ParameterLayout
    offset: int  # in a shard
    chunk: int  # of one rank, padded
    region: int  # in the working buffer

    @cached_property
    def numel(self) -> int:
        return math.prod(self.layout.tensor_shape)

    @cached_property
    def rows(self) -> tuple[int, int]:
        """Ranks whose chunk the parameter fills, and the elements of the one behind them."""
        return divmod(self.numel, self.chunk) if self.chunk else (0, 0)


def place(members: Sequence[Member], parts: int) -> tuple[list[Slot], int, int]:
    """Slots with V parameters first, and the elements of a shard and of the working buffer."""
    slots: list[Slot] = []
    offset = region = end = region_end = 0
    for index, layout, _ in sorted(members, key=lambda member: member[1].tensor.kind != "V"):
        chunk = layout.chunk_rows * layout.row_numel
        slots.append(Slot(index, layout, offset, chunk, region))
        end, region_end = offset + chunk, region + parts * chunk
        offset, region = _align(end), _align(region_end)
    return slots, end, region_end


def places(slots: Sequence[Slot]) -> tuple[list[int], list[int]]:
    """Offsets and chunks in a shard."""
    return [slot.offset for slot in slots], [slot.chunk for slot in slots]


def _align(count: int) -> int:
    return -(-count // ALIGNMENT) * ALIGNMENT
