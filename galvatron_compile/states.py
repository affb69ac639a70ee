"""Parameters of a program as checkpoints see them: original names, whole shapes."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, Replicate, Shard

from galvatron_compile.contents import Contents, listed
from galvatron_compile.entry import Entry, gather_full
from galvatron_compile.errors import GalvatronError
from galvatron_compile.layout import ParameterLayout
from galvatron_compile.mesh import Axis
from galvatron_compile.placement import R
from galvatron_compile.torch_private import mesh_without_groups
from galvatron_compile.units import ParameterUnit


class States:
    """All that a checkpoint of one rank's program holds.

    buffers: those that the program uses; ``unloaded`` are the ones without values yet.
    contents: the names of the model's own state dict, and what the program does not use of it.
        None: parameters, then buffers, then tied aliases.
    device: where ranks exchange tensors.

    ``names`` are what a state holds, ``optional`` what it may hold besides: buffers that are not
    persistent, constants.
    """

    def __init__(
        self,
        units: Sequence[ParameterUnit],
        buffers: Mapping[str, torch.Tensor],
        tied: Mapping[str, str],
        contents: Contents | None = None,
        *,
        unloaded: Collection[str] = (),
        device: torch.device = torch.device("cpu"),  # noqa: B008 - immutable
    ) -> None:
        self.units = units
        self.entries = [
            Entry(layout.name, unit, index)
            for unit in units
            for index, layout in enumerate(unit.layouts)
        ]
        self.by_name = {entry.name: entry for entry in self.entries}
        passive = contents.passive if contents else {}
        self.tensors = {**buffers, **passive}
        self.tied = {**tied, **(contents.tied if contents else {})}
        known = dict.fromkeys([*self.by_name, *self.tensors, *self.tied])
        self.names = [n for n in contents.names if n in known] if contents else list(known)
        self.optional = known.keys() - set(self.names)
        needed = {self.tied.get(name, name) for name in self.names} | buffers.keys()
        lacking = {*unloaded, *(contents.unloaded if contents else ())}
        self.unloaded = lacking & needed  # tensors; of parameters, the units know
        self.device = device
        self.distributed = dist.is_initialized() and dist.get_world_size() > 1
        world = dist.get_world_size() if self.distributed else 1
        rank = dist.get_rank() if self.distributed else 0
        group = dist.group.WORLD if self.distributed else None
        self.world = Axis("world", tuple(range(world)), rank, group)
        self._meshes: dict[tuple[int, int], Any] = {}

    def resolve(self, name: str) -> Entry | torch.Tensor:
        kept = self.tied.get(name, name)
        return self.by_name[kept] if kept in self.by_name else self.tensors[kept]

    def check_loaded(self) -> None:
        """Raises GalvatronError if something that was on the meta device has no values yet."""
        parameters = {name for unit in self.units for name in unit.unloaded}
        lacking = parameters | self.unloaded
        if not lacking:
            return
        what = "tensor" if self.unloaded else "parameter"
        text = (
            f"{len(lacking)} {what}{'s have' if len(lacking) > 1 else ' has'} no values yet "
            f"({listed(lacking, 3)}): the model was made on the meta device. Call "
            "load_full_state_dict, or fill state_dict() with torch.distributed.checkpoint and call "
            "load_state_dict"
        )
        if absent := self.unloaded & self.optional:
            text += (
                f". The model's own state dict leaves out {listed(absent, 3)}, so no checkpoint "
                "holds it: give it by name beside the rest, load_full_state_dict({**state, "
                f"{min(absent)!r}: …}}), or make the model with its buffers on the CPU and only "
                "its parameters on meta (for a Hugging Face model: accelerate's "
                "init_empty_weights(include_buffers=False))"
            )
        raise GalvatronError(text)

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
                self._load_tensor(self.tied.get(name, name), whole)

    def _load_tensor(self, kept: str, whole: torch.Tensor) -> None:
        self.tensors[kept].copy_(whole)
        self.unloaded.discard(kept)

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
        given = state if self.world.index == 0 and state else {}
        message: list[Any] = ["", []]  # what is wrong, else which optional names are there
        if self.world.index == 0:
            message = [self._problem(given), [name for name in given if name in self.optional]]
        if self.distributed:
            dist.broadcast_object_list(message, src=0)
        problem, extra = message
        if problem:
            raise GalvatronError(problem)
        values = {self.tied.get(name, name): given[name] for name, _ in self._targets(given)}
        for kept in dict.fromkeys(self.tied.get(name, name) for name in [*self.names, *extra]):
            self._load_whole(kept, values.get(kept))

    def _load_whole(self, kept: str, value: torch.Tensor | None) -> None:
        target = self.resolve(kept)
        into = target.master if isinstance(target, Entry) else target
        shape = target.layout.shape if isinstance(target, Entry) else target.shape
        if self.world.index == 0 and value is not None:
            whole = value.detach().to(self.device, into.dtype).contiguous()
        else:
            whole = torch.empty(shape, dtype=into.dtype, device=self.device)
        if self.distributed:
            whole = whole.clone() if self.world.index == 0 else whole
            dist.broadcast(whole, src=0)
        with torch.no_grad():
            if isinstance(target, Entry):
                target.unit.load(target.index, whole)
            else:
                self._load_tensor(kept, whole)

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
        allowed = wanted | {self.tied.get(name, name) for name in self.optional}
        if wanted - given:
            problems.append(f"missing: {listed(wanted - given)}")
        if given - allowed:
            problems.append(f"unexpected: {listed(given - allowed)}")
        for name in sorted(set(state) & {*self.names, *self.optional}):
            found = self.resolve(name)
            shape = found.layout.shape if isinstance(found, Entry) else tuple(found.shape)
            if tuple(state[name].shape) != shape:
                given_shape = list(state[name].shape)
                problems.append(f"{name} has shape {given_shape}, the model's is {list(shape)}")
        if problems:
            raise GalvatronError("state dict does not fit the model; " + "; ".join(problems))

    def _problem(self, state: Mapping[str, torch.Tensor]) -> str:
        try:
            self.check_names(state)
            self._check_tied(state)
        except GalvatronError as error:
            return str(error)
        return ""

    def _check_tied(self, state: Mapping[str, torch.Tensor]) -> None:
        for alias, kept in self.tied.items():
            if alias in state and kept in state and not torch.equal(state[alias], state[kept]):
                raise GalvatronError(f"{alias} and {kept} are tied but differ in the state dict")


def _same_layout(one: DTensor, other: DTensor) -> bool:
    return one.device_mesh == other.device_mesh and one.placements == other.placements
