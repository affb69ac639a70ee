"""How many bytes of tensors a step really holds, on a device that keeps no count itself."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class StorageMeter(TorchDispatchMode):
    """Follows every tensor storage from the operator that made it until it is freed.

    Use as a context manager around the work. ``resident_bytes`` is what lived at the start (all
    tensors that Python can reach, less ``exclude``), ``peak_bytes`` the most that lived at once.
    """

    def __init__(self, exclude: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self._alive: dict[int, weakref.ref[Any]] = {}
        self._excluded = {id(tensor.untyped_storage()) for tensor in exclude}
        self.live_bytes = self.peak_bytes = 0
        for found in gc.get_objects():
            if issubclass(type(found), Tensor):
                self._follow(found)
        self.resident_bytes = self.live_bytes

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._follow(leaf)
        return result

    def _follow(self, tensor: Tensor) -> None:
        if tensor.layout is not torch.strided:
            return
        storage = tensor.untyped_storage()
        key = id(storage)
        # Fake tensors claim a device; their storage is honest and says meta.
        if storage.device.type == "meta" or key in self._excluded or key in self._alive:
            return
        num_bytes = storage.nbytes()
        self._alive[key] = weakref.ref(storage, self._forget(key, num_bytes))
        self.live_bytes += num_bytes
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)

    def _forget(self, key: int, num_bytes: int) -> Callable[[object], None]:
        def forget(_: object) -> None:
            del self._alive[key]
            self.live_bytes -= num_bytes

        return forget


def peak_bytes(work: Callable[[], object], exclude: Iterable[Tensor] = ()) -> int:
    """The most bytes of tensors alive at once while ``work()`` runs, what was there included."""
    gc.collect()
    with StorageMeter(exclude) as meter:
        work()
    return meter.peak_bytes
