"""The parameters of a layer: gathered together, reduced together."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from galvatron_compile.flat import FlatBucket, InFlight
from galvatron_compile.layout import ParameterLayout
from galvatron_compile.mesh import Axis
from galvatron_compile.precision import Precision
from galvatron_compile.slots import Member, Slot


class ParameterUnit(torch.nn.Module):
    """All parameters of one layer that are gathered and reduced together.

    Calling it gives the *working* tensors (compute dtype, tensor-local shape, in the order of
    ``layouts``), which are autograd leaves and the same objects every time. ``masters`` are what
    the optimizer updates: the tensor-local tensors without ZeRO, this rank's rows under ZeRO.
    Neither is registered as a parameter of the module. When to gather, free and reduce is decided
    by a list of actions, never here.

    values: the whole parameters; a tensor on the meta device leaves its name in ``unloaded``.
    shared: several layers of this rank use the unit.
    tied: the axis of the ranks of other stages that hold the same parameters too.
    """

    def __init__(
        self,
        name: str,
        layouts: Sequence[ParameterLayout],
        values: Sequence[torch.Tensor],
        *,
        data: Axis,
        tensor: Axis,
        precision: Precision,
        device: torch.device,
        shared: bool = False,
        tied: Axis | None = None,
    ) -> None:
        super().__init__()
        if len({layout.zero for layout in layouts}) > 1:
            raise ValueError(f"unit {name}: one ZeRO stage for all parameters")
        self.name, self.layouts, self.shared, self.tied = name, tuple(layouts), shared, tied
        self.data, self.tensor, self.device = data, tensor, device
        self.zero = layouts[0].zero if layouts else 0
        self.rank = data.index * tensor.size + tensor.index  # in the pipeline group
        groups: dict[tuple[torch.dtype, bool], list[Member]] = {}
        for index, (layout, value) in enumerate(zip(layouts, values, strict=True)):
            key = (value.dtype, layout.requires_grad)
            groups.setdefault(key, []).append((index, layout, value))
        self.buckets = [
            FlatBucket(members, data=data, tensor=tensor, precision=precision, device=device)
            for members in groups.values()
        ]
        self.places: dict[int, tuple[FlatBucket, Slot]] = {
            slot.index: (bucket, slot) for bucket in self.buckets for slot in bucket.slots
        }
        ordered = [self._found(index) for index in range(len(layouts))]
        self.masters: list[torch.nn.Parameter] = [master for master, _ in ordered]
        self.working: list[torch.Tensor] = [working for _, working in ordered]
        self.unloaded: set[str] = {
            layout.name for layout, v in zip(layouts, values, strict=True) if v.is_meta
        }
        if self.zero == 3:
            self.free()

    def describe(self) -> str:
        """One line for the printed program: whose parameters, how many, and what a call does."""
        count = sum(math.prod(layout.tensor_shape) for layout in self.layouts)
        does = {
            0: "summed over" if self.data.size > 1 else "",
            1: "ZeRO-1 over",
            2: "ZeRO-2 over",
            3: "gathered, ZeRO-3 over",
        }[self.zero]
        where = f", {does} {self.data}" if does else ""
        tensors = "1 tensor" if len(self.layouts) == 1 else f"{len(self.layouts)} tensors"
        return f"of {self.name}: {tensors}, {count:,} elements{where}"

    def _found(self, index: int) -> tuple[torch.nn.Parameter, torch.Tensor]:
        bucket, slot = self.places[index]
        place = bucket.slots.index(slot)
        return bucket.masters[place], bucket.working[place]

    @property
    def gathers(self) -> bool:
        """Whether working tensors are copies that have to be brought up to date."""
        return not all(bucket.is_alias for bucket in self.buckets)

    @property
    def is_freed(self) -> bool:
        """Whether no working tensor takes memory (ZeRO-3 between uses)."""
        return all(bucket.is_freed for bucket in self.buckets)

    def forward(self) -> tuple[torch.Tensor, ...]:
        return tuple(self.working)

    def load(self, index: int, full: torch.Tensor) -> None:
        """Take this rank's part of whole parameter ``index`` (any dtype or device)."""
        bucket, slot = self.places[index]
        bucket.load(slot, full)
        self.unloaded.discard(slot.layout.name)

    # What the actions of a list do.

    def gather(self) -> None:
        for bucket in self.buckets:
            bucket.launch_gather()

    def wait_gather(self) -> None:
        for bucket in self.buckets:
            bucket.wait_gather()

    def free(self) -> None:
        for bucket in self.buckets:
            bucket.free()

    def add_gradient(self, index: int, gradient: torch.Tensor) -> None:
        """Take the gradient of working tensor ``index``, to be added to what is summed over ranks.

        It is kept as it is until :meth:`pack` or :meth:`reduce`.
        """
        bucket, slot = self.places[index]
        bucket.gradients.add(slot, gradient)

    def pack(self) -> None:
        """Add the gradients that came to those that wait for their sum."""
        for bucket in self.buckets:
            bucket.gradients.pack()

    def reduce(self) -> list[InFlight]:
        """Start to sum over the data axis; wait for all that is returned."""
        launched = [bucket.launch_reduce() for bucket in self.buckets]
        return [found for found in launched if found is not None]

    def reduce_tensor(self) -> list[InFlight]:
        """Start to sum over the tensor axis what is V there."""
        launched = [bucket.launch_tensor_reduce() for bucket in self.buckets]
        return [found for found in launched if found is not None]

    def commit(self) -> None:
        """Hand the summed gradients to the masters, adding to what is there."""
        for bucket in self.buckets:
            bucket.commit()

    def drop(self) -> None:
        """Forget the gradients of this step."""
        for bucket in self.buckets:
            bucket.drop()

    def extra_repr(self) -> str:
        kind = "shared, " if self.shared else ""
        return f"{self.name}: {kind}{len(self.layouts)} parameters, zero {self.zero}"
