"""Values travel between neighbouring stages, in order, whatever they are like."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from galvatron_compile.links import Links
from galvatron_compile.mesh import Mesh
from galvatron_compile.program import Crossing

CPU = torch.device("cpu")


def crossings(values: list[torch.Tensor]) -> list[Crossing]:
    return [
        Crossing(f"value_{at}", tuple(value.shape), value.dtype, value.is_floating_point())
        for at, value in enumerate(values)
    ]


def payload(number: int) -> list[torch.Tensor]:
    """One of each kind that may cross a cut; none of them like another's."""
    generator = torch.Generator().manual_seed(number)
    whole = torch.randn(6, 4, generator=generator, dtype=torch.float64)
    return [
        whole.t(),  # not contiguous
        whole[:, 1] > 0,
        torch.tensor(number, dtype=torch.int64),
        torch.tensor(number % 2 == 0),
        whole.to(torch.bfloat16)[::2],
        torch.empty(0, 3, dtype=torch.float32),
    ]


def same(found: list[torch.Tensor], wanted: list[torch.Tensor]) -> None:
    assert len(found) == len(wanted)
    for one, other in zip(found, wanted, strict=True):
        assert one.dtype == other.dtype and one.is_contiguous()
        assert torch.equal(one, other)


def there_and_back() -> None:
    """Three micro-batches forward, their gradients in another order; all are posted early."""
    mesh = Mesh.create(2, dist.get_rank(), [1], pp=2)
    links = Links(mesh, 2)
    if mesh.group == 0:
        for batch in range(3):
            links.receive("gradients", 0, batch, crossings(payload(10 + batch)), CPU)
        for batch in range(3):
            links.send("activations", 0, payload(batch))
        for batch in (2, 0, 1):
            same(links.wait("gradients", 0, batch), payload(10 + batch))
    else:
        for batch in range(3):
            links.receive("activations", 0, batch, crossings(payload(batch)), CPU)
        for batch in range(3):
            links.send("gradients", 0, payload(10 + batch))
        for batch in range(3):
            same(links.wait("activations", 0, batch), payload(batch))
    links.finish()
    assert not links._arriving and not links._leaving


def test_values_of_every_kind_travel_both_ways(ranks: Any) -> None:
    ranks(2).run(there_and_back)


def two_groups_four_stages(m: int) -> None:
    """Stages 0 and 2 on group 0, 1 and 3 on group 1: both send forward to each other at once."""
    mesh = Mesh.create(4, dist.get_rank(), [1, 2], pp=2)
    links, me = Links(mesh, 4), mesh.group
    sent = {(s, b): payload(100 * s + 10 * b + mesh.position) for s in range(4) for b in range(m)}
    for batch in range(m):
        for stage in (me, me + 2):
            if stage > 0:
                links.receive(
                    "activations", stage - 1, batch, crossings(sent[stage - 1, batch]), CPU
                )
        for stage in (me, me + 2):
            if stage < 3:
                links.send("activations", stage, sent[stage, batch])
    for batch in range(m):
        for stage in (me, me + 2):
            if stage > 0:
                same(links.wait("activations", stage - 1, batch), sent[stage - 1, batch])
    links.finish()


def test_chunks_of_two_groups_do_not_mix_up_their_cuts(ranks: Any) -> None:
    """Positions talk to equal positions; cuts of one direction do not wait for each other."""
    ranks(4).run(two_groups_four_stages, 3)


def reused() -> None:
    """What was sent is held until it has left: a later write must not reach the receiver."""
    mesh = Mesh.create(2, dist.get_rank(), [1], pp=2)
    links = Links(mesh, 2)
    large = torch.arange(2**20, dtype=torch.float64)
    if mesh.group == 0:
        for batch in range(4):
            links.send("activations", 0, [large + batch])  # freed here but for the links
        assert len(links._leaving) <= 4
    else:
        for batch in range(4):
            links.receive("activations", 0, batch, crossings([large]), CPU)
        for batch in range(4):
            same(links.wait("activations", 0, batch), [large + batch])
    links.finish()


def test_sent_values_are_held_until_they_have_left(ranks: Any) -> None:
    ranks(2).run(reused)
