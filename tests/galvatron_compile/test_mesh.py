"""Axes of a mesh: inside pipeline groups, between them, and of parameters that several hold."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

from galvatron_compile.errors import ShapeError
from galvatron_compile.mesh import Mesh


def played(world_size: int, rank: int, degrees: list[int], **options: Any) -> Mesh:
    return Mesh.create(world_size, rank, degrees, dry=True, **options)


def test_groups_are_blocks_of_neighbouring_ranks() -> None:
    meshes = [played(8, rank, [1, 2], pp=2) for rank in range(8)]
    assert [mesh.group for mesh in meshes] == [0] * 4 + [1] * 4
    assert [mesh.position for mesh in meshes] == [0, 1, 2, 3] * 2
    assert {mesh.group_size for mesh in meshes} == {4}
    assert [mesh.tensor(2).ranks for mesh in meshes[4:]] == [(4, 5), (4, 5), (6, 7), (6, 7)]
    assert [mesh.data(2).ranks for mesh in meshes[4:]] == [(4, 6), (5, 7), (4, 6), (5, 7)]
    assert [mesh.data(1).ranks for mesh in meshes[:4]] == [(0, 1, 2, 3)] * 4
    assert [mesh.merge(1, 2).ranks for mesh in meshes[4:]] == [(4, 5), (4, 5), (6, 7), (6, 7)]


def test_every_axis_lies_in_one_group_and_knows_its_rank() -> None:
    for rank in range(12):
        mesh = played(12, rank, [1, 2, 4], pp=3)
        block = range(4 * mesh.group, 4 * mesh.group + 4)
        for axis in mesh.axes.values():
            assert axis.ranks[axis.index] == rank and set(axis.ranks) <= set(block)


def test_links_go_between_equal_positions() -> None:
    mesh = played(12, 6, [2], pp=3)
    assert {axis.ranks for axis in mesh.links.values()} == {(2, 6, 10)}
    assert mesh.link("activations", 0) is not mesh.link("activations", 1)
    assert mesh.link("activations", 0) is mesh.link("activations", 2)
    assert mesh.link("gradients", 0) is not mesh.link("activations", 0)
    assert played(4, 0, [2]).links == {}


def test_holders_of_a_parameter_are_at_equal_positions_of_their_groups() -> None:
    first = played(8, 3, [1], pp=4, tied=[(0, 3), (1, 2), (0, 3)])
    assert {key: axis.ranks for key, axis in first.tied.items()} == {(1, 2): (3, 5)}
    assert played(8, 6, [1], pp=4, tied=[(0, 3)]).tied[0, 3].ranks == (0, 6)
    assert played(8, 3, [1], pp=4, tied=[(0, 3)]).tied == {}


@pytest.mark.parametrize(
    ("world_size", "degrees", "pp", "message"),
    [
        (4, [1], 3, "pipeline degree 3 does not divide 4 ranks"),
        (4, [4], 2, "tensor parallel degree 4 does not divide 2 ranks"),
    ],
)
def test_degrees_that_do_not_fit_are_refused(
    world_size: int, degrees: list[int], pp: int, message: str
) -> None:
    with pytest.raises(ShapeError, match=message):
        played(world_size, 0, degrees, pp=pp)


def real() -> None:
    """Every axis sums what its ranks hold; links of one direction are different groups."""
    rank = dist.get_rank()
    mesh = Mesh.create(4, rank, [1, 2], pp=2, tied=[(0, 1)])
    axes = [*mesh.axes.values(), *mesh.links.values(), *mesh.tied.values()]
    for axis in axes:
        if axis.size > 1:
            value = torch.tensor(float(2**rank))
            dist.all_reduce(value, group=axis.group)
            assert value.item() == sum(2.0**other for other in axis.ranks), axis.name
    assert len({id(axis.group) for axis in mesh.links.values()}) == 4
    assert mesh.tensor(2).group is mesh.data(1).group, "one group for one set of ranks"


def test_real_axes_have_their_own_ranks(ranks: Any) -> None:
    ranks(4).run(real)


def holders(tied: list[tuple[int, ...]]) -> list[tuple[int, ...]]:
    """Ranks that hold no tied parameter take part in making the groups of those that do."""
    mesh = Mesh.create(4, dist.get_rank(), [1], pp=4, tied=tied)
    for axis in mesh.tied.values():
        value = torch.ones(())
        dist.all_reduce(value, group=axis.group)
        assert value.item() == axis.size
    return [axis.ranks for axis in mesh.tied.values()]


def test_some_groups_may_hold_what_others_do_not(ranks: Any) -> None:
    found = ranks(4).run(holders, [(0, 3), (0, 1, 3)])
    assert found == [[(0, 1, 3), (0, 3)], [(0, 1, 3)], [], [(0, 1, 3), (0, 3)]]


def _share_groups() -> list[bool]:
    groups: dict[Any, Any] = {}
    rank = dist.get_rank()
    first = Mesh.create(4, rank, [1, 2], groups=groups)
    count = len(groups)
    again = Mesh.create(4, rank, [2, 1], groups=groups)
    piped = Mesh.create(4, rank, [1], pp=2, groups=groups)
    axes = {id(axis.group) for axis in (*first.axes.values(), *piped.axes.values())}
    links = {id(axis.group) for axis in piped.links.values()}
    return [
        all(first.axes[name].group is again.axes[name].group for name in first.axes),
        count == len({(use, found) for use, found in groups if not use}),
        piped.data(1).group is first.tensor(2).group,
        len(links) == 4 and not links & axes,
    ]


def test_meshes_share_groups_but_every_direction_has_its_own(ranks: Any) -> None:
    """Groups (0, 1) and (2, 3) are data ranks of one mesh and tensor ranks of another."""
    assert ranks(4).run(_share_groups) == [[True] * 4] * 4
