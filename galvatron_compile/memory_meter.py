"""What the tensors of one process take while a step runs, counted tensor by tensor.

On CUDA the caching allocator counts by itself. On the CPU nothing does, and the size of the process
says little (freed memory stays with it), so :class:`MemoryMeter` follows every tensor that an
operator makes from its birth to its death. What a kernel allocates inside for its own use is not
seen there.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from galvatron_compile.torch_private import flatten_tree


class Meter(Protocol):
    """Bytes that are held now, and the most that were since this was last asked."""

    def held_bytes(self) -> int: ...

    def take_peak_bytes(self) -> int: ...


class MemoryMeter(TorchDispatchMode):
    """Live bytes of all storages on the CPU that operators of this thread made while it was on, and
    of those that were registered.

    Storages, so that views count once. A storage that was empty, or had another size, when it was
    last looked at is one that is resized in place: it has its new size from the next operator on.
    Any other that is resized, from the next operator that touches it. Nothing is kept alive.
    Tensors of other threads and of communication libraries do not count, even where an operator
    reads them (gloo sums in copies of its own).
    """

    def __init__(self) -> None:
        super().__init__()
        self._known: dict[int, tuple[weakref.ref[torch.UntypedStorage], int]] = {}
        self._resized = set[int]()  # keys of storages that are resized in place
        self._total = self._peak = 0

    def register(self, tensors: Iterable[Tensor]) -> None:
        """Count what was there before: parameters, buffers, optimizer state, the batch."""
        for storage in _storages(tensors):
            self._count(storage)
        self._peak = max(self._peak, self._total)

    def held_bytes(self) -> int:
        storages = [reference() for reference, _ in self._known.values()]
        for storage in storages:
            if storage is not None:
                self._count(storage)
        self._peak = max(self._peak, self._total)
        return self._total

    def take_peak_bytes(self) -> int:
        held = self.held_bytes()
        peak, self._peak = self._peak, held
        return peak

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        given = _storages(_tensors((args, kwargs)))
        places = {id(storage) for storage in given}
        made = [s for s in _storages(_tensors(result)) if id(s) not in places]
        resized = [self._known[key][0]() for key in self._resized]
        known = (s for s in given if id(s) in self._known)
        for storage in (*(s for s in resized if s is not None), *known, *made):
            self._count(storage)
        self._peak = max(self._peak, self._total)
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        if storage.device.type != "cpu":  # that of a fake tensor is on the meta device
            return
        # A storage has one Python object as long as it lives, with or without references from here.
        key, num_bytes = id(storage), storage.nbytes()
        if key in self._known:
            reference, before = self._known[key]
        else:
            reference, before = weakref.ref(storage, lambda _: self._forget(key)), 0
        if num_bytes == 0 or (key in self._known and num_bytes != before):
            self._resized.add(key)
        if num_bytes != before or key not in self._known:
            self._known[key] = reference, num_bytes
            self._total += num_bytes - before

    def _forget(self, key: int) -> None:
        self._total -= self._known.pop(key)[1]
        self._resized.discard(key)


def _tensors(tree: Any) -> list[Tensor]:
    leaves, _ = flatten_tree(tree)
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)]


def _storages(tensors: Iterable[Tensor]) -> list[torch.UntypedStorage]:
    return [t.untyped_storage() for t in tensors if t.layout is torch.strided]


class CudaMeter:
    """The same questions to the caching allocator, whose counts need no synchronisation."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        torch.cuda.reset_peak_memory_stats(device)

    def held_bytes(self) -> int:
        return torch.cuda.memory_allocated(self.device)

    def take_peak_bytes(self) -> int:
        peak = torch.cuda.max_memory_allocated(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        return peak


@contextmanager
def metering(device: torch.device, tensors: Iterable[Tensor]) -> Iterator[Meter]:
    """A meter that is on inside. tensors: what the CPU's must know of that was there before; the
    CUDA allocator counts whatever lives on the device. On the CPU operators take longer inside."""
    if device.type == "cuda":
        yield CudaMeter(device)
        return
    meter = MemoryMeter()
    meter.register(tensors)
    with meter:
        yield meter
