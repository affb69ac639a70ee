"""Memory that counting a layer makes: which storages are alive, and which autograd keeps."""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils._pytree import tree_leaves


@dataclass
class Live:
    """Bytes of the storages that are alive and were made since counting began."""

    now_bytes: int = 0
    peak_bytes: int = 0
    seen: set[int] = field(default_factory=set)
    numbers: dict[int, int] = field(default_factory=dict)
    given: int = 0

    def number(self, storage: torch.UntypedStorage) -> int:
        """The same for as long as the storage lives, though its address is used again later."""
        if storage._cdata not in self.numbers:
            self.given += 1
            self.numbers[storage._cdata] = self.given
        return self.numbers[storage._cdata]

    def hold(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self.seen:
            return
        num_bytes = storage.nbytes()
        self.seen.add(key)
        self.now_bytes += num_bytes
        self.peak_bytes = max(self.peak_bytes, self.now_bytes)
        weakref.finalize(storage, self._free, key, num_bytes)

    def _free(self, key: int, num_bytes: int) -> None:
        self.seen.discard(key)
        self.numbers.pop(key, None)
        self.now_bytes -= num_bytes


class Saved:
    """Storages that autograd keeps for backward, by identity."""

    def __init__(self) -> None:
        self.storages: dict[int, torch.UntypedStorage] = {}

    def pack(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        self.storages[storage._cdata] = storage
        return tensor

    def total_bytes(self, arguments: list[Any], inputs: list[Any], outputs: Any) -> int:
        """Kept bytes: not parameters, buffers or what other layers count (see Tally)."""
        counted = {value.untyped_storage()._cdata for value in inputs}
        others = {
            value.untyped_storage()._cdata
            for value in [*arguments, *tree_leaves(outputs)]
            if isinstance(value, torch.Tensor)
        } - counted
        saved = sum(s.nbytes() for key, s in self.storages.items() if key not in others)
        constants = [t for t in tree_leaves(outputs) if not t.requires_grad]
        return saved + sum(num_bytes_of(t) for t in constants)


def num_bytes_of(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()
