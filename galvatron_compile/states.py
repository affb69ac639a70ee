"""Parameters of a program as checkpoints see them: original names, whole shapes."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from galvatron_compile.checkpoint_tensors import GroupTensors
from galvatron_compile.contents import Contents, misfits, one_name_each, untied, without_values
from galvatron_compile.entry import Entry
from galvatron_compile.errors import GalvatronError
from galvatron_compile.layout import ParameterLayout
from galvatron_compile.units import ParameterUnit

if TYPE_CHECKING:
    from galvatron_compile.checkpoint_saving import Saver


class States:
    """All that a checkpoint of one rank's program holds.

    units: the parameters that this rank has.
    buffers: those that the program uses, whole on every rank; ``unloaded`` are the ones without
        values yet.
    contents: the names of the model's own state dict, and what the program does not use of it.
        None: parameters, then buffers, then tied aliases.
    device: where ranks exchange tensors.
    layouts: every parameter of the model in its order, on every rank alike, with the pipeline
        group that owns it: the lowest of those that hold it. None: ``units`` are all there are.
    num_groups: pipeline groups; group g is ranks g * n up to (g + 1) * n.

    ``names`` are what a state holds, ``optional`` what it may hold besides: buffers that are not
    persistent, constants. ``kept`` are the names without second names of tied tensors. Methods
    that take or give tensors are collective, and go through the parameters in the same order on
    every rank.
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
        layouts: Mapping[str, tuple[int, ParameterLayout]] | None = None,
        num_groups: int = 1,
    ) -> None:
        self.units = units
        self.entries = [
            Entry(layout.name, unit, index)
            for unit in units
            for index, layout in enumerate(unit.layouts)
        ]
        self.by_name = {entry.name: entry for entry in self.entries}
        self.layouts = layouts or {entry.name: (0, entry.layout) for entry in self.entries}
        passive = contents.passive if contents else {}
        self.tensors = {**buffers, **passive}
        self.tied = {**tied, **(contents.tied if contents else {})}
        known = dict.fromkeys([*self.layouts, *self.tensors, *self.tied])
        self.names = [n for n in contents.names if n in known] if contents else list(known)
        self.kept = list(dict.fromkeys(self.tied.get(name, name) for name in self.names))
        self.optional = known.keys() - set(self.names)
        needed = set(self.kept) | buffers.keys()
        lacking = {*unloaded, *(contents.unloaded if contents else ())}
        self.unloaded = lacking & needed  # tensors; of parameters, the units know
        self.broken = ""  # why the values are a mix of two states, if they are
        self.device = device
        self.distributed = dist.is_initialized() and dist.get_world_size() > 1
        world = dist.get_world_size() if self.distributed else 1
        self.rank = dist.get_rank() if self.distributed else 0
        self.num_groups, self.group_size = num_groups, world // num_groups
        self.group = self.rank // self.group_size
        first = self.group * self.group_size
        ranks = tuple(range(first, first + self.group_size))
        self.parts = GroupTensors(ranks, alone=not self.distributed)
        self._dtypes_by_rank: list[dict[str, torch.dtype]] | None = None
        self.saver: Saver | None = None  # once there was a checkpoint

    def resolve(self, name: str) -> Entry | torch.Tensor | None:
        """A parameter or another tensor; None for a parameter that only other stages hold."""
        kept = self.tied.get(name, name)
        if kept in self.by_name:
            return self.by_name[kept]
        return None if kept in self.layouts else self.tensors[kept]

    def shape(self, name: str) -> tuple[int, ...]:
        kept = self.tied.get(name, name)
        return self.layouts[kept][1].shape if kept in self.layouts else self.tensors[kept].shape

    def owns(self, name: str) -> bool:
        """Whether this rank's group is the one that saves a parameter (one of ``layouts``)."""
        return self.layouts[name][0] == self.group

    def check_loaded(self) -> None:
        """GalvatronError if something that was on meta has no values, or a load broke off."""
        if self.broken:
            raise GalvatronError(self.broken)
        parameters = {name for unit in self.units for name in unit.unloaded}
        if parameters or self.unloaded:
            raise GalvatronError(without_values(parameters, self.unloaded, self.optional))

    # For torch.distributed.checkpoint.

    def sharded(self) -> dict[str, torch.Tensor]:
        """DTensors over the masters' memory where a DTensor can say how they lie, else copies.

        Of parameters only those that this rank's group owns, so that each is saved once.
        """
        found = self.tensors_by_kept(every=False)
        names = ((name, self.tied.get(name, name)) for name in self.names)
        return {name: found[kept] for name, kept in names if kept in found}

    def tensors_by_kept(self, *, every: bool, empty: bool = False) -> dict[str, torch.Tensor]:
        """As :meth:`sharded` under the kept names.

        every: of all parameters held here. empty: to be read into, so copies need no values.
        """
        result = {}
        for name in self.kept:
            found = self.resolve(name)
            if isinstance(found, torch.Tensor):
                result[name] = found
            elif found is not None and (every or self.owns(name)):
                result[name] = self.parts.encode(found, found.master, empty=empty)
        return result

    def load_sharded(self, state: Mapping[str, Any]) -> None:
        """Take what :meth:`sharded` gave and a checkpoint filled, or whole tensors."""
        self.check_names(state)
        for name in one_name_each(state, self.tied):
            self.take(name, state[name])
        self._load_copies()
        self.broken = ""

    @torch.no_grad()
    def take(self, name: str, value: torch.Tensor) -> None:
        """New values for what is held here: a whole tensor, or one as :meth:`sharded` gives."""
        target, kept = self.resolve(name), self.tied.get(name, name)
        if isinstance(target, Entry):
            target.load(self.parts.decode(target, value))
        elif target is not None:
            whole = value.full_tensor() if isinstance(value, DTensor) else value
            if whole is not target:
                target.copy_(whole)
            self.unloaded.discard(kept)

    def _load_copies(self) -> None:
        """What several groups hold, from its owner."""
        held = self._dtypes()
        for name, (owner, _) in self.layouts.items():
            if sum(name in dtypes for dtypes in held[:: self.group_size]) < 2:
                continue
            entry, source = self.by_name.get(name), owner * self.group_size
            if entry is not None and self.owns(name):
                whole = entry.whole(entry.master).contiguous()
            else:
                whole = self._empty(name, held[source][name])
            dist.broadcast(whole, src=source)
            if entry is not None and not self.owns(name):
                entry.load(entry.take(whole))

    def _empty(self, name: str, dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(self.shape(name), dtype=dtype, device=self.device)

    def _dtypes(self) -> list[dict[str, torch.dtype]]:
        """The masters that every rank holds; asked once."""
        if self._dtypes_by_rank is None:
            self._dtypes_by_rank = self._from_all(
                {entry.name: entry.master.dtype for entry in self.entries}
            )
        return self._dtypes_by_rank

    def _from_all(self, mine: dict[str, torch.dtype]) -> list[dict[str, torch.dtype]]:
        """What the first rank of every group holds, by rank; the others hold what it does."""
        if self.num_groups == 1:
            return [mine] * self.group_size
        gathered: list[Any] = [None] * (self.num_groups * self.group_size)
        dist.all_gather_object(gathered, {} if self.rank % self.group_size else mine)
        return gathered

    # Whole tensors.

    def full(self) -> dict[str, torch.Tensor]:
        """CPU copies on rank 0, an empty dict elsewhere; one parameter at a time on the device."""
        kept = {name: whole for name, whole in self.wholes() if whole is not None}
        names = self.names if self.rank == 0 else []
        return {name: kept[self.tied.get(name, name)] for name in names}

    def dtypes(self) -> dict[str, torch.dtype]:
        """Of everything under ``kept``, as it is held: masters' for parameters."""
        held = self._dtypes()[:: self.group_size]
        owned = {name: held[owner][name] for name, (owner, _) in self.layouts.items()}
        return {n: owned[n] if n in owned else self.tensors[n].dtype for n in self.kept}

    def wholes(self) -> Iterator[tuple[str, torch.Tensor | None]]:
        """(kept name, its CPU copy on rank 0 or None elsewhere), one at a time."""
        held = self._dtypes()
        for name in self.kept:
            found = self.resolve(name)
            if isinstance(found, torch.Tensor):
                yield name, found.detach().cpu().clone() if self.rank == 0 else None
            else:
                local = found.master.detach() if found is not None else None
                yield name, self._on_first_rank(name, local, held)

    def full_gradients(self) -> dict[str, torch.Tensor]:
        """As :meth:`full`, of the gradients; a parameter without one is left out."""
        gradients = {e.name: e.master.grad for e in self.entries if e.master.grad is not None}
        held = self._from_all({name: gradient.dtype for name, gradient in gradients.items()})
        kept = {}
        for name, (owner, _) in self.layouts.items():
            if name in held[owner * self.group_size]:
                whole = self._on_first_rank(name, gradients.get(name), held)
                if whole is not None:
                    kept[name] = whole
        return kept

    def _on_first_rank(
        self, name: str, local: torch.Tensor | None, held: Sequence[Mapping[str, torch.dtype]]
    ) -> torch.Tensor | None:
        """The owner group assembles a tensor; its first rank gives it to rank 0."""
        owner = self.layouts[name][0]
        source = owner * self.group_size
        whole = None
        if self.owns(name) and local is not None:
            whole = self.by_name[name].whole(local)
            if owner and self.rank == source:
                dist.send(whole.contiguous(), dst=0)
        if owner and self.rank == 0:
            whole = self._empty(name, held[source][name])
            dist.recv(whole, src=source)
        return whole.cpu().clone() if whole is not None and self.rank == 0 else None

    def load_full(self, state: Mapping[str, torch.Tensor] | None) -> None:
        """Every rank calls it; rank 0's tensors are taken, or refused on every rank."""
        given = state if self.rank == 0 and state else {}
        self.load_one_by_one(given, given.__getitem__)

    def load_one_by_one(
        self, described: Mapping[str, torch.Tensor], fetch: Callable[[str], torch.Tensor]
    ) -> None:
        """As :meth:`load_full`, of tensors that rank 0 gets from ``fetch`` when it is their turn.

        described: name to a tensor of the shape and dtype that ``fetch`` will give, perhaps meta.
        """
        message: list[Any] = ["", {}]  # what is wrong, dtypes under the names to fetch
        if self.rank == 0:
            message[0] = self._problem(described, fetch)
        if self.rank == 0 and not message[0]:
            names = one_name_each(described, self.tied)
            message[1] = {name: described[name].dtype for name in names}
        if self.distributed:
            dist.broadcast_object_list(message, src=0)
        problem, dtypes = message
        if problem:
            raise GalvatronError(problem)
        for name, dtype in dtypes.items():
            self._load_whole(name, fetch(name) if self.rank == 0 else None, dtype)
        self.broken = ""

    def _load_whole(self, name: str, value: torch.Tensor | None, dtype: torch.dtype) -> None:
        if value is not None:
            whole = value.detach().to(self.device).contiguous()
        else:
            whole = self._empty(name, dtype)
        if self.distributed:
            dist.broadcast(whole, src=0)
        self.take(name, whole)

    # What a dict of states must contain.

    def check_names(self, state: Mapping[str, Any], *, whole: bool = False) -> None:
        """GalvatronError that names what is missing, unexpected, or of another shape.

        whole: everything must be there, not only what this rank's group owns.
        """
        problems = self.problems({name: tuple(value.shape) for name, value in state.items()}, whole)
        if problems:
            raise GalvatronError("state dict does not fit the model; " + "; ".join(problems))

    def problems(self, shapes: Mapping[str, tuple[int, ...]], whole: bool = True) -> list[str]:
        """What is wrong with a state of these names and shapes; empty if it fits."""
        wanted = {n for n in self.kept if whole or n not in self.layouts or self.owns(n)}
        known = {name: tuple(self.shape(name)) for name in [*self.names, *self.optional]}
        return misfits(shapes, wanted, known, self.tied)

    def _problem(
        self, described: Mapping[str, torch.Tensor], fetch: Callable[[str], torch.Tensor]
    ) -> str:
        try:
            self.check_names(described, whole=True)
        except GalvatronError as error:
            return str(error)
        return untied(described, fetch, self.tied)
