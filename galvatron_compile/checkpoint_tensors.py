"""How the parts of a parameter are shown to torch.distributed.checkpoint, and taken from it."""

from __future__ import annotations

from typing import Any

import torch
from torch.distributed.tensor import DTensor, Replicate, Shard

from galvatron_compile.entry import Entry, gather_rows
from galvatron_compile.layout import ParameterLayout
from galvatron_compile.placement import R
from galvatron_compile.torch_private import mesh_without_groups


class GroupTensors:
    """DTensors over the ranks of one pipeline group, for tensors laid out like a parameter.

    ranks: the group's global ranks in order; a group of one that is the whole job uses plain
        tensors.
    Where no DTensor can say how the parts lie (several blocks of a dim on one rank), rows over all
    ranks of the group stand for them: a copy, and collective both ways.
    """

    def __init__(self, ranks: tuple[int, ...], *, alone: bool) -> None:
        self.ranks, self.alone = ranks, alone
        self._meshes: dict[tuple[str, int, int], Any] = {}

    def encode(self, entry: Entry, local: torch.Tensor, *, empty: bool = False) -> torch.Tensor:
        """``local``, this rank's part in the entry's layout, over the same memory if it can be.

        empty: what is returned is to be read into; if it is a copy, it need not have the values.
        """
        local, layout = local.detach(), entry.layout
        if self.alone and not layout.tensor.is_shard:
            return local.view(layout.shape)
        if self.alone or (not layout.shape and layout.zero):
            return local.new_empty(layout.shape) if empty else entry.whole(local)
        if layout.outer == 1:
            return self._dtensor(local, layout)
        rows = self._rows(layout)
        if empty:
            return self._dtensor(local.new_empty(rows.local_shape(entry.place)), rows)
        return self._dtensor(rows.take(entry.whole(local), entry.place).clone(), rows)

    def decode(self, entry: Entry, value: torch.Tensor) -> torch.Tensor:
        """This rank's part, from what :meth:`encode` gave or from a whole tensor."""
        layout = entry.layout
        if not isinstance(value, DTensor):
            return entry.take(value.detach())
        if layout.outer == 1 and self._is(value, layout):
            return value.to_local().detach()
        if self._is(value, self._rows(layout)):
            unit = entry.unit
            rows = gather_rows(self._rows(layout), value.to_local(), unit.data, unit.tensor)
            return entry.take(rows)
        return entry.take(value.full_tensor().detach())

    def staged(self, value: torch.Tensor) -> torch.Tensor:
        """A copy on the CPU that training does not change."""
        if not isinstance(value, DTensor):
            return value.detach().to("cpu", copy=True)
        tp, dp = value.device_mesh.shape
        local = value.to_local().detach().to("cpu", copy=True)
        return self._on_mesh(local, value, self._mesh("cpu", tp, dp))

    def _rows(self, layout: ParameterLayout) -> ParameterLayout:
        return ParameterLayout(layout.name, layout.shape, R, 1, len(self.ranks), 1)

    def _mesh(self, device: str, tp: int, dp: int) -> Any:
        """Axes (tp, dp) in this order: dim 0 may be cut by the tensor axis first, then by ZeRO."""
        if (device, tp, dp) not in self._meshes:
            ranks = torch.tensor(self.ranks).view(dp, tp).t().contiguous()
            self._meshes[device, tp, dp] = mesh_without_groups(device, ranks, ("tp", "dp"))
        return self._meshes[device, tp, dp]

    def _dtensor(self, local: torch.Tensor, layout: ParameterLayout) -> DTensor:
        mesh = self._mesh(local.device.type, layout.tp, layout.dp)
        whole = torch.empty(layout.shape, device="meta")
        return DTensor.from_local(
            local, mesh, _placements(layout), run_check=False, shape=whole.shape,
            stride=whole.stride(),
        )  # fmt: skip

    def _on_mesh(self, local: torch.Tensor, like: DTensor, mesh: Any) -> DTensor:
        return DTensor.from_local(
            local, mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
        )

    def _is(self, value: DTensor, layout: ParameterLayout) -> bool:
        mesh = self._mesh(value.device_mesh.device_type, layout.tp, layout.dp)
        return value.device_mesh == mesh and list(value.placements) == _placements(layout)


def _placements(layout: ParameterLayout) -> list[Any]:
    tensor = Shard(layout.tensor.dim) if layout.tensor.is_shard else Replicate()
    return [tensor, Shard(0) if layout.zero else Replicate()]
