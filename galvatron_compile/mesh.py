"""Ranks and the groups among them.

A pipeline group is a block of ``world_size / pp`` neighbouring ranks. Inside of it tensor-parallel
ranks are neighbours: ``position = data_index * tp + tensor_index``. Layers may use different
degrees, so an axis is named with its degree (``tp2``, ``dp4``), and the axis between two degrees
(``tp2to4``: the ranks whose batch shards merge when a layer with tp 2 feeds one with tp 4) has a
name of its own. What crosses from stage to stage goes between equal positions. Groups are made once
per set of ranks and reused.
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
    timing the computation alone. On a *traced* axis they are operators that a graph can record.
    ``peers`` names the symmetric memory among the ranks (galvatron_compile.kernels.peers), if any.
    """

    name: str
    ranks: tuple[int, ...]
    index: int
    group: ProcessGroup | None = field(default=None, compare=False, repr=False)
    dry: bool = False
    traced: bool = False
    peers: str = ""

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
    """All axes that a plan uses, for one rank of ``world_size``.

    axes: inside this rank's pipeline group, by name. links: between pipeline groups, by name.
    tied: to the other groups that hold a parameter too, by the numbers of all these groups.
    """

    world_size: int
    rank: int
    axes: dict[str, Axis]
    pp: int = 1
    links: dict[str, Axis] = field(default_factory=dict)
    tied: dict[tuple[int, ...], Axis] = field(default_factory=dict)

    @property
    def group_size(self) -> int:
        """Ranks of a pipeline group."""
        return self.world_size // self.pp

    @property
    def group(self) -> int:
        """This rank's pipeline group."""
        return self.rank // self.group_size

    @property
    def position(self) -> int:
        """This rank's place in its pipeline group."""
        return self.rank % self.group_size

    def tensor(self, tp: int) -> Axis:
        return self.axes[f"tp{tp}"]

    def data(self, tp: int) -> Axis:
        return self.axes[f"dp{self.group_size // tp}"]

    def merge(self, small: int, large: int) -> Axis:
        return self.axes[f"tp{small}to{large}"]

    def link(self, direction: str, stage: int) -> Axis:
        """The axis over which ``activations`` leave ``stage``, or its ``gradients`` come back.

        Two pipeline groups that send to each other in the same direction (chunks of an interleaved
        schedule over two groups) use separate communicators, so neither waits for the other's turn.
        """
        return self.links[f"{direction}{stage % 2}"]

    @staticmethod
    def create(
        world_size: int,
        rank: int,
        degrees: Iterable[int],
        *,
        pp: int = 1,
        tied: Iterable[tuple[int, ...]] = (),
        dry: bool = False,
        groups: Groups | None = None,
    ) -> Mesh:
        """Make every axis that layers with these tensor-parallel degrees need.

        Collective: every rank of the default process group calls it with the same arguments.
        With ``dry`` no process group is needed and any rank can be played.

        tied: sets of pipeline groups that hold a parameter in common.
        groups: those that other meshes of this process have made; used again, and added to. Each
            costs threads and connections, or on GPUs memory, as long as the process lives. All
            ranks give one with the same history, of the same default process group.
        """
        groups = {} if groups is None else groups
        if world_size % pp:
            raise ShapeError(f"pipeline degree {pp} does not divide {world_size} ranks")
        size = world_size // pp
        wanted: dict[str, list[tuple[int, ...]]] = {}
        tps = sorted(set(degrees))
        for tp in tps:
            if size % tp:
                raise ShapeError(f"tensor parallel degree {tp} does not divide {size} ranks")
            wanted[f"tp{tp}"] = _everywhere(tensor_ranks(size, tp), size, pp)
            wanted[f"dp{size // tp}"] = _everywhere(data_ranks(size, tp), size, pp)
        for small in tps:
            for large in tps:
                if small < large and large % small == 0:
                    name = f"tp{small}to{large}"
                    wanted[name] = _everywhere(merge_ranks(size, small, large), size, pp)
        axes = {
            name: _axis(name, rank, sets, groups, dry) for name, sets in sorted(wanted.items())
        }
        links = {}
        if pp > 1:
            pipelines = [tuple(range(at, world_size, size)) for at in range(size)]
            for name in ("activations0", "activations1", "gradients0", "gradients1"):
                links[name] = _axis(name, rank, pipelines, groups, dry, name)
        ties = {}
        for holders in sorted(set(tied)):
            name = "tied" + "-".join(map(str, holders))
            sets = [tuple(g * size + at for g in holders) for at in range(size)]
            if rank // size in holders:
                ties[holders] = _axis(name, rank, sets, groups, dry)
            elif not dry:
                _make_groups(sets, groups)
        return Mesh(world_size, rank, axes, pp, links, ties)


# By ranks, and by name where equal ranks need one for each direction.
Groups = dict[tuple[str, tuple[int, ...]], "ProcessGroup | None"]


def _everywhere(sets: list[tuple[int, ...]], size: int, pp: int) -> list[tuple[int, ...]]:
    """Sets of positions in a pipeline group as sets of ranks, in every group."""
    return [tuple(g * size + at for at in ranks) for g in range(pp) for ranks in sets]


def _axis(
    name: str,
    rank: int,
    rank_sets: list[tuple[int, ...]],
    groups: Groups,
    dry: bool,
    use: str = "",
) -> Axis:
    mine = next(ranks for ranks in rank_sets if rank in ranks)
    if len(mine) == 1:
        return Axis(name, mine, 0)
    if dry:
        return Axis(name, mine, mine.index(rank), None, True)
    _make_groups(rank_sets, groups, use)
    return Axis(name, mine, mine.index(rank), groups[use, mine])


def _make_groups(rank_sets: list[tuple[int, ...]], groups: Groups, use: str = "") -> None:
    """Every rank creates every group, in the same order."""
    import torch.distributed as dist

    for ranks in rank_sets:
        if (use, ranks) not in groups:
            groups[use, ranks] = dist.new_group(list(ranks))
