"""Flat storage of parameters that share dtypes, so that one collective moves all of them.

With ``n`` ranks along the data axis (``parts = n`` under ZeRO, else 1) a bucket holds

- ``master``: ``[shard]``, this rank's chunk of every parameter one behind the other;
- ``working``: per parameter a region of ``parts * chunk`` elements, in which the tensor-local
  parameter lies contiguously;
- ``gradients``: of working tensors, not yet summed over data ranks (``flat_gradients.py``);
  ``reduced``: ``[shard]``, their sum.

Chunks are padded to equal size, so collectives are the ``_tensor`` ones with equal shards.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from galvatron_compile.flat_gradients import Gradients
from galvatron_compile.gather_scatter import Waitable, all_gather, reduce_scatter
from galvatron_compile.kernels import buckets
from galvatron_compile.kernels.base import runs_kernels
from galvatron_compile.mesh import Axis
from galvatron_compile.precision import Precision
from galvatron_compile.slots import Member, Slot, place, places


def gather_parts(part: torch.Tensor, axis: Axis) -> torch.Tensor:
    """Every rank's equally shaped, contiguous ``part``, as ``[axis.size, *part.shape]``."""
    if axis.group is None:
        return part[None]
    gathered = part.new_empty(axis.size * part.numel())
    all_gather(gathered, part.reshape(-1), axis.group).wait()
    return gathered.view(axis.size, *part.shape)


@dataclass
class InFlight:
    """A collective that was launched, and what to do when it is done."""

    work: Waitable | None
    complete: Callable[[], None]

    def wait(self) -> None:
        if self.work is not None:
            self.work.wait()
            self.work = None
        self.complete()


class FlatBucket:
    """Masters, working tensors and gradients of some parameters of one unit on one rank."""

    def __init__(
        self,
        members: Sequence[Member],
        *,
        data: Axis,
        tensor: Axis,
        precision: Precision,
        device: torch.device,
    ) -> None:
        first, dtype = members[0][1], members[0][2].dtype
        self.zero, self.requires_grad = first.zero, first.requires_grad
        self.data, self.tensor = data, tensor
        self.parts = data.size if self.zero else 1
        self.rank = data.index * tensor.size + tensor.index
        self.reduce_dtype = precision.reduce_of(dtype)
        self.slots, self.shard_numel, working_numel = place(members, self.parts)
        self.master = torch.zeros(self.shard_numel, dtype=precision.master_of(dtype), device=device)
        self.masters = [
            torch.nn.Parameter(self.master_of(slot).data, self.requires_grad) for slot in self.slots
        ]
        compute = precision.compute_of(dtype)
        self.is_alias = not self.zero and compute == self.master.dtype
        self.buffer = (
            self.master
            if self.is_alias
            else torch.zeros(working_numel, dtype=compute, device=device)
        )
        self.working = [self._working(slot) for slot in self.slots]
        self.gathering: InFlight | None = None
        self.gradients = Gradients(
            self.slots, self.parts, self.shard_numel, self.reduce_dtype, device
        )
        self.reduced: torch.Tensor | None = None
        values = {index: value for index, _, value in members}
        for slot in self.slots:
            if not values[slot.index].is_meta:
                self.load(slot, values[slot.index])

    # Parameters.

    def master_of(self, slot: Slot) -> torch.Tensor:
        shape = slot.layout.local_shape(self.rank)
        return self.master[slot.offset : slot.offset + math.prod(shape)].view(shape)

    def _working(self, slot: Slot) -> torch.Tensor:
        # ``.data`` gives a version counter of its own: what is gathered into the buffer between
        # forward and backward is the value that autograd saved, not a change of it.
        local = self.buffer[slot.region : slot.region + slot.numel]
        return local.view(slot.layout.tensor_shape).data.requires_grad_(self.requires_grad)

    def load(self, slot: Slot, full: torch.Tensor) -> None:
        """Take this rank's part of the whole parameter."""
        local = slot.layout.take(full.detach(), self.rank)
        self.master_of(slot).copy_(local)

    def free(self) -> None:
        """Give the working buffer's memory back; the working tensors stay as empty shells."""
        self.buffer.untyped_storage().resize_(0)

    @property
    def is_freed(self) -> bool:
        return self.buffer.numel() > 0 and self.buffer.untyped_storage().size() == 0

    def launch_gather(self) -> None:
        """Start to bring every working tensor up to date with the masters of all data ranks."""
        if self.is_alias:
            return
        source = self.master.to(self.buffer.dtype)
        if self.parts == 1:
            self._make_room()
            self.buffer.copy_(source)
            return
        single = len(self.slots) == 1  # its region is the gathered tensor itself
        if single:
            self._make_room()
        target = self.buffer if single else self.buffer.new_empty(self.parts * self.shard_numel)
        work: Waitable | None = None
        if self.data.group is not None:
            work = all_gather(target, source, self.data.group)

        def complete(source: torch.Tensor = source) -> None:
            if not single:  # not before: one of the two is enough while the collective is under way
                self._make_room()
                self._copy_out(target.view(self.parts, self.shard_numel))

        self.gathering = InFlight(work, complete)

    def _make_room(self) -> None:
        storage = self.buffer.untyped_storage()
        storage.resize_(self.buffer.numel() * self.buffer.element_size())

    def wait_gather(self) -> None:
        if self.gathering is not None:
            self.gathering.wait()
            self.gathering = None

    def _copy_out(self, gathered: torch.Tensor) -> None:
        sizes = [self.parts * slot.chunk for slot in self.slots]
        regions = [
            self.buffer[slot.region : slot.region + size]
            for slot, size in zip(self.slots, sizes, strict=True)
        ]
        if runs_kernels(gathered):
            buckets.unpack(gathered, regions, *places(self.slots))
            return
        for slot, region in zip(self.slots, regions, strict=True):
            part = gathered[:, slot.offset : slot.offset + slot.chunk]
            region.view(self.parts, slot.chunk).copy_(part)

    # Gradients.

    def launch_reduce(self) -> InFlight | None:
        """Start the SUM over the data axis of what is pending; None if nothing is."""
        pending = self.gradients.take()
        if pending is None:
            return None
        work: Waitable | None = None
        if self.parts == 1:
            output = pending.view(-1)
            if self.data.group is not None:
                work = dist.all_reduce(output, group=self.data.group, async_op=True)
        elif self.data.group is None:  # a dry axis
            output = pending[self.data.index]
        else:
            output = pending.new_empty(self.shard_numel)
            work = reduce_scatter(output, pending.view(-1), self.data.group)

        def complete() -> None:
            self.reduced = output if self.reduced is None else self.reduced.add_(output)

        return InFlight(work, complete)

    def launch_tensor_reduce(self) -> InFlight | None:
        """Start the SUM over the tensor axis of gradients whose parameter is V there."""
        ends = [slot.offset + slot.chunk for slot in self.slots if slot.layout.tensor.kind == "V"]
        if self.reduced is None or not ends or self.tensor.group is None:
            return None
        part = self.reduced[: max(ends)]  # V comes first in a shard
        work = dist.all_reduce(part, group=self.tensor.group, async_op=True)
        return InFlight(work, lambda: None)

    def commit(self) -> None:
        """Hand the summed gradients to the masters, adding to what is there."""
        for slot, master in zip(self.slots, self.masters, strict=True):
            if slot.index not in self.gradients.touched or self.reduced is None:
                continue
            gradient = self.reduced.narrow(0, slot.offset, master.numel()).view(master.shape)
            gradient = gradient.to(master.dtype)
            if master.grad is None:
                master.grad = gradient
            else:
                master.grad.add_(gradient)
        self.drop()

    def drop(self) -> None:
        self.reduced = None
        self.gradients.drop()
