"""A parameter of a program under its original name, and how its parts become whole."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from galvatron_compile.flat import gather_parts
from galvatron_compile.layout import ParameterLayout
from galvatron_compile.mesh import Axis
from galvatron_compile.units import ParameterUnit


def gather_full(
    layout: ParameterLayout, local: torch.Tensor, data: Axis, tensor: Axis
) -> torch.Tensor:
    """The whole parameter from every rank's ``local``; collective over both axes."""
    if layout.zero:
        padded = local.new_zeros(layout.chunk_rows * layout.row_numel)
        padded[: local.numel()] = local.detach().reshape(-1)
        rows = gather_parts(padded, data).view(-1)
        local = rows[: layout.rows * layout.row_numel].view(layout.tensor_shape)
    local = local.detach()
    if not layout.tensor.is_shard:
        return local
    dim = layout.tensor.dim
    blocks = (*local.shape[:dim], layout.outer, -1, *local.shape[dim + 1 :])
    parts = gather_parts(local.contiguous(), tensor).reshape(tensor.size, *blocks)
    return parts.movedim(0, dim + 1).reshape(layout.shape)


@dataclass(frozen=True)
class Entry:
    """Parameter ``index`` of ``unit`` under its original name."""

    name: str
    unit: ParameterUnit
    index: int

    @property
    def layout(self) -> ParameterLayout:
        return self.unit.layouts[self.index]

    @property
    def master(self) -> torch.nn.Parameter:
        return self.unit.masters[self.index]

    def whole(self, local: torch.Tensor) -> torch.Tensor:
        return gather_full(self.layout, local, self.unit.data, self.unit.tensor)
