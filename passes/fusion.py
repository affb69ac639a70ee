"""fuse: Tally → Tally, with neighbouring memory-bound operators as one kernel each.

A compiler such as TorchInductor (Ansel et al. 2024, section 4.4) makes one kernel of a run of
pointwise operators and reductions between two matrix products: what only they use stays in
registers. So a run reads what was made outside it and writes what is used outside it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from galvatron_compile.passes.tally import ACCUMULATE, OperatorCount, Tally

Pairs = frozenset[tuple[str, str]]


def fuse(found: Tally, pairs: Pairs | None = None) -> Tally:
    """The same FLOPs and the same memory held, fewer operators and fewer bytes moved.

    pairs: names of neighbours that are one kernel, for hand-written fusions, also with one
        product; None for a compiler, which takes all neighbours that are memory-bound.
    """
    readers: dict[int, set[int]] = {}  # storage number -> operators, by identity, that read it
    for count in [*found.forward, *found.backward]:
        for number, _, _ in count.reads:
            readers.setdefault(number, set()).add(id(count))
    return replace(
        found,
        forward=tuple(_fused(found.forward, readers, found.leaving, pairs)),
        backward=tuple(_fused(found.backward, readers, found.leaving, pairs)),
    )


def _fused(
    counts: Sequence[OperatorCount],
    readers: dict[int, set[int]],
    leaving: frozenset[int],
    pairs: Pairs | None,
) -> Iterator[OperatorCount]:
    group: list[OperatorCount] = []
    for count in counts:
        if group and not _are_one(group[-1], count, pairs):
            yield _one(group, readers, leaving)
            group = []
        group.append(count)
    if group:
        yield _one(group, readers, leaving)


def _are_one(before: OperatorCount, after: OperatorCount, pairs: Pairs | None) -> bool:
    """Summing gradients over micro-batches happens outside what is compiled."""
    if pairs is not None:
        return (before.name, after.name) in pairs
    return all(count.kind == "memory" and count.name != ACCUMULATE for count in (before, after))


def _one(
    group: Sequence[OperatorCount], readers: dict[int, set[int]], leaving: frozenset[int]
) -> OperatorCount:
    if len(group) == 1:
        return group[0]
    inside = {id(count) for count in group}
    made = {number for count in group for number, _, _ in count.writes}
    used = {number for number in made if number in leaving or readers.get(number, set()) - inside}
    unread = {number for number in made if number not in readers}  # gradients that leave
    reads = {view for count in group for view in count.reads if view[0] not in made}
    writes = {view for count in group for view in count.writes if view[0] in used | unread}
    product = next((count for count in group if count.flops), None)
    return replace(
        group[-1] if product is None else product,
        name="fused" if product is None else product.name,
        num_bytes=sum(num_bytes for _, _, num_bytes in [*reads, *writes]),
        reads=tuple(sorted(reads)),
        writes=tuple(sorted(writes)),
    )
