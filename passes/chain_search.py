"""Exact search for the best assignment of a :class:`Chain`.

Best-first branch and bound with the ingredients of
:mod:`galvatron_compile.passes.chain_bounds`, and a third: the *maximum* of the transients is a
threshold, so allow options up to p and take p off the capacity. Nodes of the search hold a range
of thresholds and split where a relaxed answer breaks the limit. Labels are kept within a narrow
gap above the bound first, then within wider ones.
"""

from __future__ import annotations

import heapq
from dataclasses import replace

import numpy as np

from galvatron_compile.passes.chain import Chain, Choice, Ints, smallest_memory
from galvatron_compile.passes.chain_bounds import (
    Potential,
    Relaxed,
    intersection,
    labels,
    least_memory,
    splice,
    viterbi,
)


def solve(chains: list[Chain], capacity: int) -> Choice | None:
    """The best assignment over all chains; None if none fits. Earlier chains win ties."""
    return _Search(chains, capacity).run()


class _Search:
    """Best-first branch and bound over chains, thresholds and the options of groups."""

    def __init__(self, chains: list[Chain], capacity: int) -> None:
        self.chains = chains
        self.capacity = capacity
        self.best: Choice | None = None
        # Chains have equally many links, so their orders compare.
        assert len({chain.num_links for chain in chains}) <= 1
        self.limit: int | None = None  # only assignments of a smaller order are of interest
        self.heap: list[tuple[int, int, int, Relaxed]] = []
        self.num_pushed = 0

    def run(self) -> Choice | None:
        for index, chain in enumerate(self.chains):
            smallest = smallest_memory(chain)
            if smallest is None or smallest[0] > self.capacity:
                continue
            self.offer(index, smallest[1])
            last = len(chain.thresholds) - 1
            lowest = self.capacity - int(chain.thresholds[0])
            self.push(index, Relaxed(chain, 0, last, chain.groups, chain.allowed, lowest))
        while self.heap:
            bound, _, index, node = heapq.heappop(self.heap)
            if self.limit is not None and bound >= self.limit:
                break
            self.branch(index, node)
        return self.best

    def offer(self, index: int, path: Ints) -> bool:
        """Take ``path`` as the incumbent if it is better; False if it breaks a constraint."""
        chain = self.chains[index]
        needed = chain.memory(path) + chain.peak(path)
        if needed > self.capacity or not chain.agrees(path):
            return False
        order = chain.order(path)
        if self.limit is None or order < self.limit:
            self.limit = order
            self.best = Choice(index, path, chain.total_ns(path), needed)
        return True

    def push(self, index: int, node: Relaxed) -> None:
        relaxed = self.relax(index, node)
        if relaxed is not None:
            self.queue(index, relaxed)

    def queue(self, index: int, node: Relaxed) -> None:
        if self.limit is None or node.bound < self.limit:
            self.num_pushed += 1
            heapq.heappush(self.heap, (node.bound, self.num_pushed, index, node))

    def branch(self, index: int, node: Relaxed) -> None:
        if node.undecided:
            group, rest = node.undecided[0], node.undecided[1:]
            for option in np.flatnonzero(node.allowed[list(group)].all(axis=0)):
                allowed = node.allowed.copy()
                allowed[list(group)] = False
                allowed[list(group), option] = True
                self.push(index, replace(node, undecided=rest, allowed=allowed))
            return
        assert self.limit is not None and node.fitting is not None
        if not self.offer(index, node.fitting):
            self.split(index, node, node.fitting)
            return
        last = min(self.limit, node.chain.order(node.fitting) + 1)
        gap = node.gap or max((last - node.bound) // 64, node.chain.num_links)
        limit = min(last, node.bound + gap)
        path = labels(node, limit)
        if path is not None and not self.offer(index, path):
            self.split(index, replace(node, bound=node.chain.order(path)), path)
        elif path is None and limit < last:  # look further, but only when nothing looks better
            self.queue(index, replace(node, bound=limit, gap=4 * gap))

    def split(self, index: int, node: Relaxed, path: Ints) -> None:
        """Two nodes that exclude ``path``, which breaks the limit by its own largest transient."""
        chain, thresholds = node.chain, node.chain.thresholds
        at = int(np.searchsorted(thresholds, chain.peak(path)))
        assert node.low < at <= node.high
        node = replace(node, gap=0)
        less = self.capacity - int(thresholds[at])
        self.push(index, replace(node, low=at, capacity=less))
        allowed = node.allowed & (chain.transient_bytes <= thresholds[at - 1])
        self.push(index, replace(node, high=at - 1, allowed=allowed))

    def relax(self, index: int, node: Relaxed) -> Relaxed | None:
        """Bound a node by its Lagrangian; None if it holds nothing better than the incumbent."""
        chain = node.chain
        if not node.allowed.any(axis=1).all():
            return None
        fitting = least_memory(chain, node.allowed)
        if chain.memory(fitting) > node.capacity:
            return None
        self.offer(index, fitting)
        bound, tried = node.bound, list[tuple[int, Potential]]()
        # A child starts at its parent's best multiplier, which often excludes it at once.
        multiplier = node.potentials[-1].multiplier if node.potentials else 0.0
        large: Ints | None = None
        while True:
            potential, path, value = viterbi(chain, node.allowed, multiplier, node.capacity)
            tried.append((value, potential))
            bound = max(bound, value)
            if self.limit is not None and bound >= self.limit:
                return None
            self.offer(index, path)
            if chain.memory(path) <= node.capacity:
                settled = large is not None and chain.order(path) >= chain.order(fitting)
                done = multiplier == 0.0 or settled
                fitting = min(fitting, path, key=chain.order)
            else:
                done = large is not None and chain.order(path) <= chain.order(large)
                large = path
            if done:
                break
            following = 0.0 if large is None else intersection(chain, large, fitting)
            if any(following == p.multiplier for _, p in tried):
                break
            multiplier = following
        if large is not None:
            fitting = splice(chain, large, fitting, node.capacity)
            self.offer(index, fitting)
        tried.sort(key=lambda pair: pair[0])
        potentials = tuple(potential for _, potential in tried[-4:])
        return replace(node, bound=bound, fitting=fitting, potentials=potentials)
