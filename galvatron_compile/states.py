"""Parameters of a program as checkpoints see them: original names, whole shapes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, Replicate, Shard

from galvatron_compile.errors import GalvatronError
from galvatron_compile.flat import gather_parts
from galvatron_compile.layout import ParameterLayout
from galvatron_compile.mesh import Axis
from galvatron_compile.placement import R
from galvatron_compile.torch_private import mesh_without_groups
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


class States:
    """All that a checkpoint of one rank's program holds.

    names: the names of the model's own state dict in its order; buffers that are not in it (not
        persistent, constants) are left out, and so are names that the program does not use.
        None: parameters, then buffers, then tied aliases.
    """

    def __init__(
        self,
        units: Sequence[ParameterUnit],
        buffers: Mapping[str, torch.Tensor],
        tied: Mapping[str, str],
        names: Sequence[str] | None = None,
    ) -> None:
        self.entries = [
            Entry(layout.name, unit, index)
            for unit in units
            for index, layout in enumerate(unit.layouts)
        ]
        self.by_name = {entry.name: entry for entry in self.entries}
        self.buffers, self.tied = buffers, tied
        known = [*self.by_name, *buffers, *tied]
        self.names = known if names is None else [name for name in names if name in set(known)]
        self.distributed = dist.is_initialized() and dist.get_world_size() > 1
        world = dist.get_world_size() if self.distributed else 1
        rank = dist.get_rank() if self.distributed else 0
        group = dist.group.WORLD if self.distributed else None
        self.world = Axis("world", tuple(range(world)), rank, group)
        self._meshes: dict[tuple[int, int], Any] = {}

    def resolve(self, name: str) -> Entry | torch.Tensor:
        kept = self.tied.get(name, name)
        return self.by_name[kept] if kept in self.by_name else self.buffers[kept]

    # For torch.distributed.checkpoint.

    def sharded(self) -> dict[str, torch.Tensor]:
        """DTensors over the masters' memory where a DTensor can say how they lie, else copies."""
        done: dict[str, torch.Tensor] = {}
        result = {}
        for name in self.names:
            found = self.resolve(name)
            if isinstance(found, Entry):
                if found.name not in done:
                    done[found.name] = self._sharded(found)
                result[name] = done[found.name]
            else:
                result[name] = found
        return result

    def _sharded(self, entry: Entry) -> torch.Tensor:
        local, layout = entry.master.detach(), entry.layout
        if not self.distributed:
            return local.view(layout.shape) if not layout.tensor.is_shard else entry.whole(local)
        if not layout.shape and layout.zero:
            return entry.whole(local)
        if layout.outer > 1:
            canonical = self._canonical(layout)
            local = canonical.take(entry.whole(local), self.world.index).clone()
            return self._dtensor(local, canonical)
        return self._dtensor(local, layout)

    def _canonical(self, layout: ParameterLayout) -> ParameterLayout:
        """Rows over all ranks: for what no DTensor expresses."""
        return ParameterLayout(layout.name, layout.shape, R, 1, self.world.size, 1)

    def _mesh(self, tp: int, dp: int) -> Any:
        """Axes (tp, dp) in this order: dim 0 may be cut by the tensor axis first, then by ZeRO."""
        if (tp, dp) not in self._meshes:
            device = self.entries[0].unit.device.type
            ranks = torch.arange(tp * dp).view(dp, tp).t().contiguous()
            self._meshes[tp, dp] = mesh_without_groups(device, ranks, ("tp", "dp"))
        return self._meshes[tp, dp]

    def _dtensor(self, local: torch.Tensor, layout: ParameterLayout) -> DTensor:
        whole = torch.empty(layout.shape, device="meta")
        tensor = Shard(layout.tensor.dim) if layout.tensor.is_shard else Replicate()
        return DTensor.from_local(
            local,
            self._mesh(layout.tp, layout.dp),
            [tensor, Shard(0) if layout.zero else Replicate()],
            run_check=False,
            shape=whole.shape,
            stride=whole.stride(),
        )

    def load_sharded(self, state: Mapping[str, Any]) -> None:
        """Take what :meth:`sharded` gave and a checkpoint filled, or whole tensors."""
        self.check_names(state)
        for name, target in self._targets(state):
            value = state[name]
            if isinstance(target, Entry):
                self._load_entry(target, value)
            else:
                whole = value.full_tensor() if isinstance(value, DTensor) else value
                target.copy_(whole)

    def _load_entry(self, entry: Entry, value: Any) -> None:
        with torch.no_grad():
            if not isinstance(value, DTensor):
                entry.unit.load(entry.index, value)
                return
            layout = entry.layout
            own = self._dtensor(entry.master.detach(), layout) if layout.outer == 1 else None
            canonical = self._canonical(layout)
            if own is not None and _same_layout(own, value):
                entry.master.copy_(value.to_local())
                entry.unit.unloaded.discard(entry.name)
                return
            if value.device_mesh is self._mesh(canonical.tp, canonical.dp):
                none = Axis("none", (0,), 0)
                whole = gather_full(canonical, value.to_local(), self.world, none)
            else:
                whole = value.full_tensor()
            entry.unit.load(entry.index, whole)

    # Whole tensors.

    def full(self) -> dict[str, torch.Tensor]:
        """CPU copies on rank 0, an empty dict elsewhere; one parameter at a time on the device."""
        return self._on_first_rank(
            (name, found.whole(found.master) if isinstance(found, Entry) else found)
            for name, found in ((name, self.resolve(name)) for name in self.names)
        )

    def full_gradients(self) -> dict[str, torch.Tensor]:
        """As :meth:`full`, of the gradients; a parameter without one is left out."""
        return self._on_first_rank(
            (entry.name, entry.whole(entry.master.grad))
            for entry in self.entries
            if entry.master.grad is not None
        )

    def _on_first_rank(self, wholes: Iterator[tuple[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        kept = {}
        for name, whole in wholes:
            if self.world.index == 0:
                kept[name] = whole.detach().cpu().clone()
        return kept

    def load_full(self, state: Mapping[str, torch.Tensor] | None) -> None:
        """Every rank calls it; rank 0's tensors are taken, or refused on every rank."""
        problem = [self._problem(state) if self.world.index == 0 else ""]
        if self.distributed:
            dist.broadcast_object_list(problem, src=0)
        if problem[0]:
            raise GalvatronError(problem[0])
        given = state if self.world.index == 0 and state else {}
        values = {self.tied.get(name, name): given[name] for name, _ in self._targets(given)}
        for kept in dict.fromkeys(self.tied.get(name, name) for name in self.names):
            self._load_whole(self.resolve(kept), values.get(kept))

    def _load_whole(self, target: Entry | torch.Tensor, value: torch.Tensor | None) -> None:
        into = target.master if isinstance(target, Entry) else target
        shape = target.layout.shape if isinstance(target, Entry) else target.shape
        if self.world.index == 0 and value is not None:
            whole = value.detach().to(into.device, into.dtype).contiguous()
        else:
            whole = torch.empty(shape, dtype=into.dtype, device=into.device)
        if self.distributed:
            whole = whole.clone() if self.world.index == 0 else whole
            dist.broadcast(whole, src=0)
        with torch.no_grad():
            if isinstance(target, Entry):
                target.unit.load(target.index, whole)
            else:
                target.copy_(whole)

    # What a dict of states must contain.

    def _targets(self, state: Mapping[str, Any]) -> list[tuple[str, Entry | torch.Tensor]]:
        """One name in ``state`` for every parameter and buffer; for tied ones any of the names."""
        chosen: dict[str, str] = {}
        for name in state:
            kept = self.tied.get(name, name)
            if kept not in chosen or name == kept:
                chosen[kept] = name
        return [(name, self.resolve(name)) for name in chosen.values()]

    def check_names(self, state: Mapping[str, Any]) -> None:
        wanted = {self.tied.get(name, name) for name in self.names}
        given = {self.tied.get(name, name) for name in state}
        problems = []
        if wanted - given:
            problems.append(f"missing: {_listed(wanted - given)}")
        if given - wanted:
            problems.append(f"unexpected: {_listed(given - wanted)}")
        for name in sorted(set(state) & set(self.names)):
            found = self.resolve(name)
            shape = found.layout.shape if isinstance(found, Entry) else tuple(found.shape)
            if tuple(state[name].shape) != shape:
                given_shape = list(state[name].shape)
                problems.append(f"{name} has shape {given_shape}, the model's is {list(shape)}")
        if problems:
            raise GalvatronError("state dict does not fit the model; " + "; ".join(problems))

    def _problem(self, state: Mapping[str, torch.Tensor] | None) -> str:
        try:
            self.check_names(state or {})
            self._check_tied(state or {})
        except GalvatronError as error:
            return str(error)
        return ""

    def _check_tied(self, state: Mapping[str, torch.Tensor]) -> None:
        for alias, kept in self.tied.items():
            if alias in state and kept in state and not torch.equal(state[alias], state[kept]):
                raise GalvatronError(f"{alias} and {kept} are tied but differ in the state dict")


def _same_layout(one: DTensor, other: DTensor) -> bool:
    return one.device_mesh == other.device_mesh and one.placements == other.placements


def _listed(names: set[str], most: int = 8) -> str:
    shown = ", ".join(sorted(names)[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"
