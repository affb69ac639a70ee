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


def gather_rows(
    layout: ParameterLayout, local: torch.Tensor, data: Axis, tensor: Axis
) -> torch.Tensor:
    """The whole parameter from its rows over all ranks of both axes (``layout.dp`` of them).

    Chunk ``data.index * tensor.size + tensor.index`` is ``local``. Two gathers instead of one, so
    that no process group is needed but the two that training has.
    """
    padded = local.new_zeros(layout.chunk_rows * layout.row_numel)
    padded[: local.numel()] = local.detach().reshape(-1)
    rows = gather_parts(gather_parts(padded, tensor), data).view(-1)
    return rows[: layout.rows * layout.row_numel].view(layout.shape)


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

    @property
    def place(self) -> int:
        """This rank's place among the ranks of its pipeline group; what layouts call its rank."""
        return self.unit.data.index * self.unit.tensor.size + self.unit.tensor.index

    def whole(self, local: torch.Tensor) -> torch.Tensor:
        return gather_full(self.layout, local, self.unit.data, self.unit.tensor)

    def take(self, whole: torch.Tensor) -> torch.Tensor:
        """This rank's part of the whole parameter, of the master's shape."""
        return self.layout.take(whole, self.place)

    @torch.no_grad()
    def load(self, local: torch.Tensor) -> None:
        """Take new values for this rank's part; nothing is copied if they are the master."""
        if local.data_ptr() != self.master.data_ptr() or local.dtype != self.master.dtype:
            self.master.copy_(local)
        self.unit.unloaded.discard(self.name)
