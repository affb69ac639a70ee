"""Where the elements of one parameter lie on ``dp * tp`` ranks.

First the tensor axis cuts the parameter as its placement says (the *tensor-local* tensor), then
ZeRO cuts dim 0 of that over the data axis the way ``torch.chunk`` does: chunks of ceil(rows / dp)
rows, the last ones short or empty. ``rank = data_index * tp + tensor_index``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from galvatron_compile.errors import ShapeError
from galvatron_compile.placement import Placement

Box = tuple[tuple[int, ...], tuple[int, ...]]  # offsets, sizes


@dataclass(frozen=True)
class ParameterLayout:
    """Layout of one parameter (or gradient, or optimizer state of its shape).

    shape: of the whole parameter. tensor: placement on the tensor axis, one of R, V, S.
    A scalar under ZeRO counts as one row, so its shards have shape (1,) or (0,).
    Raises ShapeError if the tensor axis does not divide what it cuts.
    """

    name: str
    shape: tuple[int, ...]
    tensor: Placement
    tp: int
    dp: int
    zero: int
    requires_grad: bool = True

    def __post_init__(self) -> None:
        if self.tensor.kind == "P" or self.zero not in (0, 1, 2, 3):
            raise ValueError(f"{self.name}: no layout for {self.tensor}, zero {self.zero}")
        if not self.tensor.is_shard:
            return
        if not isinstance(self.tensor.outer, int) or self.tensor.dim >= len(self.shape):
            raise ValueError(f"{self.name}: {self.tensor} does not fit shape {self.shape}")
        size = self.shape[self.tensor.dim]
        if size % (self.tensor.outer * self.tp):
            raise ShapeError(
                f"{self.name}: dim {self.tensor.dim} of size {size} cannot be cut into "
                f"{self.tensor.outer} x {self.tp} equal pieces; lower tp"
            )

    @property
    def outer(self) -> int:
        return self.tensor.outer if isinstance(self.tensor.outer, int) else 1

    @property
    def tensor_shape(self) -> tuple[int, ...]:
        """Shape of the tensor that a layer computes with: local on the tensor axis only."""
        if not self.tensor.is_shard:
            return self.shape
        dim = self.tensor.dim
        return (*self.shape[:dim], self.shape[dim] // self.tp, *self.shape[dim + 1 :])

    @property
    def rows(self) -> int:
        return self.tensor_shape[0] if self.shape else 1

    @property
    def row_numel(self) -> int:
        return math.prod(self.tensor_shape[1:])

    @property
    def chunk_rows(self) -> int:
        """Rows of a full ZeRO chunk; every rank's chunk is padded to this for collectives."""
        return -(-self.rows // self.dp) if self.zero else self.rows

    def data_index(self, rank: int) -> int:
        return rank // self.tp

    def tensor_index(self, rank: int) -> int:
        return rank % self.tp

    def row_range(self, rank: int) -> tuple[int, int]:
        """First and last (exclusive) row of the tensor-local tensor that ``rank`` owns."""
        if not self.zero:
            return 0, self.rows
        start = min(self.rows, self.data_index(rank) * self.chunk_rows)
        return start, min(self.rows, start + self.chunk_rows)

    def local_shape(self, rank: int) -> tuple[int, ...]:
        if not self.zero:
            return self.tensor_shape
        start, stop = self.row_range(rank)
        return (stop - start, *self.tensor_shape[1:])

    def take_tensor(self, full: torch.Tensor, tensor_index: int) -> torch.Tensor:
        """The tensor-local part of ``full`` (a view where that is possible)."""
        if not self.tensor.is_shard:
            return full
        dim = self.tensor.dim
        sizes = (*full.shape[:dim], self.outer, self.tp, -1, *full.shape[dim + 1 :])
        pieces = full.reshape(sizes)
        return pieces.select(dim + 1, tensor_index).flatten(dim, dim + 1)

    def take(self, full: torch.Tensor, rank: int) -> torch.Tensor:
        """What ``rank`` keeps of the whole parameter, of shape ``local_shape(rank)``."""
        if tuple(full.shape) != self.shape:
            raise ShapeError(f"{self.name}: expected shape {self.shape}, got {tuple(full.shape)}")
        local = self.take_tensor(full, self.tensor_index(rank))
        if not self.zero:
            return local
        start, stop = self.row_range(rank)
        return (local if self.shape else local.reshape(1))[start:stop]

    def pieces(self, rank: int) -> list[tuple[Box, Box]]:
        """Pairs of boxes of equal sizes: one in the whole tensor, one in ``rank``'s local one."""
        start, stop = self.row_range(rank)
        if stop == start or 0 in self.shape:
            return []
        if not self.shape:
            return [(((), ()), ((), ()))]
        zeros = (0,) * len(self.shape)
        sizes = (stop - start, *self.tensor_shape[1:])
        if not self.tensor.is_shard:
            return [(((start, *zeros[1:]), sizes), (zeros, sizes))]
        dim = self.tensor.dim
        block = self.shape[dim] // (self.outer * self.tp)
        base = start if dim == 0 else 0  # first local index along dim
        found = []
        for outer in range(self.outer):
            low = max(outer * block, base)
            high = min((outer + 1) * block, base + sizes[dim])
            if low >= high:
                continue
            place = (outer * self.tp + self.tensor_index(rank)) * block + low - outer * block
            offsets = [start, *zeros[1:]]
            offsets[dim] = place
            box = _replace(sizes, dim, high - low)
            found.append(((tuple(offsets), box), (_replace(zeros, dim, low - base), box)))
        return found

    def boxes(self, rank: int) -> list[Box]:
        """(offsets, sizes) of what ``rank`` holds, in the whole tensor; several if outer > 1."""
        return [box for box, _ in self.pieces(rank)]

    def owners(self) -> list[int]:
        """The lowest ranks that together hold every element exactly once."""
        tensor = range(self.tp if self.tensor.is_shard else 1)
        data = range(self.dp if self.zero else 1)
        ranks = [d * self.tp + t for d in data for t in tensor]
        return [rank for rank in ranks if math.prod(self.local_shape(rank))]

    def is_owner(self, rank: int) -> bool:
        """Whether ``rank`` is the one that counts its elements (empty shards count nothing)."""
        replica = not self.tensor.is_shard and self.tensor_index(rank) != 0
        return not replica and (self.zero > 0 or self.data_index(rank) == 0)

    def assemble(self, locals_: Mapping[int, torch.Tensor]) -> torch.Tensor:
        """The whole parameter from at least the owners' local tensors. KeyError if one lacks."""
        some = next(iter(locals_.values()))
        full = some.new_empty(self.shape)
        for rank in self.owners():
            for (offsets, sizes), (places, _) in self.pieces(rank):
                local = locals_[rank] if self.shape else locals_[rank].reshape(())
                _box(full, offsets, sizes).copy_(_box(local, places, sizes))
        return full


def _replace(sizes: tuple[int, ...], dim: int, size: int) -> tuple[int, ...]:
    return (*sizes[:dim], size, *sizes[dim + 1 :])


def _box(tensor: torch.Tensor, offsets: tuple[int, ...], sizes: tuple[int, ...]) -> torch.Tensor:
    for dim, (offset, size) in enumerate(zip(offsets, sizes, strict=True)):
        tensor = tensor.narrow(dim, offset, size)
    return tensor
