"""Ranks and the groups among them.

Tensor-parallel ranks are neighbours: ``rank = data_index * tp + tensor_index``. Layers may use
different degrees, so an axis is named with its degree (``tp2``, ``dp4``), and the axis between two
degrees (``tp2to4``: the ranks whose batch shards merge when a layer with tp 2 feeds one with tp 4)
has a name of its own. Groups are made once per set of ranks and reused.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from galvatron_compile.errors import ShapeError

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@dataclass(frozen=True)
class Axis:
    """One mesh axis as one rank sees it: the ranks along it and this rank's place among them.

    ``group`` is None for an axis of one rank, and for a *dry* axis (``dry=True``), on which
    collectives move nothing but return values of the right shape: for shape propagation and for
    timing the computation alone.
    """

    name: str
    ranks: tuple[int, ...]
    index: int
    group: ProcessGroup | None = field(default=None, compare=False, repr=False)
    dry: bool = False

    @property
    def size(self) -> int:
        return len(self.ranks)

    def __str__(self) -> str:
        return self.name

    @staticmethod
    def dry_run(name: str, size: int, index: int = 0) -> Axis:
        return Axis(name, tuple(range(size)), index, None, True)


def tensor_ranks(world_size: int, tp: int) -> list[tuple[int, ...]]:
    return [tuple(range(start, start + tp)) for start in range(0, world_size, tp)]


def data_ranks(world_size: int, tp: int) -> list[tuple[int, ...]]:
    return [tuple(range(start, world_size, tp)) for start in range(tp)]


def merge_ranks(world_size: int, small: int, large: int) -> list[tuple[int, ...]]:
    """Groups along which batch shards merge between tp = small and tp = large (small | large)."""
    return [
        tuple(range(block + offset, block + large, small))
        for block in range(0, world_size, large)
        for offset in range(small)
    ]


@dataclass(frozen=True)
class Mesh:
    """All axes that a plan uses, for one rank of ``world_size``."""

    world_size: int
    rank: int
    axes: dict[str, Axis]

    def tensor(self, tp: int) -> Axis:
        return self.axes[f"tp{tp}"]

    def data(self, tp: int) -> Axis:
        return self.axes[f"dp{self.world_size // tp}"]

    def merge(self, small: int, large: int) -> Axis:
        return self.axes[f"tp{small}to{large}"]

    @staticmethod
    def create(world_size: int, rank: int, degrees: Iterable[int], *, dry: bool = False) -> Mesh:
        """Make every axis that layers with these tensor-parallel degrees need.

        Collective: every rank of the default process group calls it with the same degrees.
        With ``dry`` no process group is needed and any rank can be played.
        """
        wanted: dict[str, list[tuple[int, ...]]] = {}
        tps = sorted(set(degrees))
        for tp in tps:
            if world_size % tp:
                raise ShapeError(f"tensor parallel degree {tp} does not divide {world_size} ranks")
            wanted[f"tp{tp}"] = tensor_ranks(world_size, tp)
            wanted[f"dp{world_size // tp}"] = data_ranks(world_size, tp)
        for small in tps:
            for large in tps:
                if small < large and large % small == 0:
                    wanted[f"tp{small}to{large}"] = merge_ranks(world_size, small, large)
        groups: dict[tuple[int, ...], ProcessGroup | None] = {}
        axes = {
            name: _axis(name, rank, sets, groups, dry) for name, sets in sorted(wanted.items())
        }
        return Mesh(world_size, rank, axes)


def _axis(
    name: str,
    rank: int,
    rank_sets: list[tuple[int, ...]],
    groups: dict[tuple[int, ...], ProcessGroup | None],
    dry: bool,
) -> Axis:
    mine = next(ranks for ranks in rank_sets if rank in ranks)
    if len(mine) == 1:
        return Axis(name, mine, 0)
    if dry:
        return Axis(name, mine, mine.index(rank), None, True)
    import torch.distributed as dist

    for ranks in rank_sets:  # every rank creates every group, in the same order
        if ranks not in groups:
            groups[ranks] = dist.new_group(list(ranks))
    return Axis(name, mine, mine.index(rank), groups[mine])
