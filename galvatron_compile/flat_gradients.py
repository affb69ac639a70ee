"""Gradients of a bucket's parameters on their way to the sum over data ranks."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import torch
from torch import Tensor

from galvatron_compile.kernels import buckets
from galvatron_compile.kernels.base import runs_kernels
from galvatron_compile.slots import Slot, places


class Gradients:
    """Of ``slots``, in ``parts`` chunks of ``shard_numel`` elements; summed up in ``dtype``.

    arrived: gradients as backward made them. pending: ``[parts, shard]`` in the order that
    reduce-scatter wants: row ``p`` goes to data rank ``p``. filled: slots with something in
    ``pending``. touched: slots that got a gradient in this step.
    """

    def __init__(
        self,
        slots: Sequence[Slot],
        parts: int,
        shard_numel: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.slots, self.parts, self.shard_numel = slots, parts, shard_numel
        self.dtype, self.device = dtype, device
        self.arrived: deque[tuple[Slot, Tensor]] = deque()
        self.pending: Tensor | None = None
        self.filled: set[int] = set()
        self.touched: set[int] = set()

    def add(self, slot: Slot, gradient: Tensor) -> None:
        """Take the gradient of one working tensor; it is kept as it is until :meth:`pack`."""
        self.arrived.append((slot, gradient))
        self.touched.add(slot.index)

    def pack(self) -> None:
        """Add what arrived to ``pending``, letting go of one gradient after the other, or all in
        one kernel where there are kernels."""
        if self.arrived and self._is_one_launch():
            slots, gradients = zip(*self.arrived, strict=True)
            buckets.pack(gradients, self._room(), *places(slots))
            self.filled |= {slot.index for slot in slots}
            self.arrived.clear()
        while self.arrived:
            self._pack(*self.arrived.popleft())

    def take(self) -> Tensor | None:
        """All of it, ``[parts, shard]``, zero where no gradient came; None if none came."""
        self.pack()
        pending, self.pending = self.pending, None
        self.filled.clear()
        return pending

    def drop(self) -> None:
        """Forget the gradients of this step."""
        self.pending = None
        self.arrived.clear()
        self.filled.clear()
        self.touched.clear()

    def _room(self) -> Tensor:
        if self.pending is None:
            shape = (self.parts, self.shard_numel)
            self.pending = torch.zeros(shape, dtype=self.dtype, device=self.device)
        return self.pending

    def _is_one_launch(self) -> bool:
        """Whether a kernel can pack what arrived: each slot once and first, nothing sparse."""
        gradients = [gradient for _, gradient in self.arrived]
        if not runs_kernels(self._room(), *gradients):
            return False
        slots = {slot.index for slot, _ in self.arrived}
        fresh = len(slots) == len(gradients) and not slots & self.filled
        return fresh and all(gradient.layout is torch.strided for gradient in gradients)

    def _pack(self, slot: Slot, gradient: Tensor) -> None:
        flat = (gradient.to_dense() if gradient.is_sparse else gradient).reshape(-1)
        room = self._room().narrow(1, slot.offset, slot.chunk)
        put = Tensor.add_ if slot.index in self.filled else Tensor.copy_
        num_rows, rest = slot.rows
        if rest:
            put(room[num_rows, :rest], flat[-rest:])
        put(room[:num_rows], flat[: num_rows * slot.chunk].view(num_rows, slot.chunk))
        self.filled.add(slot.index)
