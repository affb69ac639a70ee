"""Exact choice of one option per link of a chain, under a capacity: the core of the searcher.

    minimise    Σ time[i, s_i] + Σ switch[i, s_i, s_(i+1)]
    subject to  Σ memory[i, s_i] + max transient[i, s_i] <= capacity,
                s_a = s_b for links a, b of one group

All numbers are whole (nanoseconds, bytes); among assignments of equal time the one with the fewest
changes of option wins, for plans that people can read. Three ingredients:

- the *maximum* of the transients is a threshold: allow options up to p, take p off the capacity.
  Nodes of the search hold a range of thresholds and split where a relaxed answer breaks the limit;
- *bounds* come from the Lagrangian: a Viterbi pass over time + λ·memory prices the rest of the
  chain for every (link, option), switching included. The best λ is found by intersecting the two
  lines of the last too-large and the last fitting assignment (Handler and Zang 1980);
- a *label* pass keeps Pareto-optimal (time, memory) pairs per (link, option) that the bounds do
  not exclude, first within a narrow gap above the bound, then within wider ones. Equal links make
  equal sums, which merge, so the work follows the gap and not the number of links.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]


@dataclass(frozen=True)
class Chain:
    """time_ns, memory_bytes, transient_bytes, allowed: [links, options]; switch_ns: [links - 1,
    options, options]; groups: disjoint sets of links that must agree."""

    time_ns: Ints
    memory_bytes: Ints
    transient_bytes: Ints
    allowed: Bools
    switch_ns: Ints
    groups: tuple[tuple[int, ...], ...] = ()

    @property
    def num_links(self) -> int:
        return int(self.time_ns.shape[0])

    @property
    def num_options(self) -> int:
        return int(self.time_ns.shape[1])

    @cached_property
    def ordered_time(self) -> Ints:
        """Time scaled so that one change of option weighs less than a nanosecond."""
        return self.time_ns * self.num_links

    @cached_property
    def ordered_switch(self) -> Ints:
        return self.switch_ns * self.num_links + ~np.eye(self.num_options, dtype=np.bool_)

    @cached_property
    def thresholds(self) -> Ints:
        """The values that the largest transient can take, ascending; empty: no assignment."""
        if not self.allowed.any(axis=1).all():
            return np.zeros(0, dtype=np.int64)
        most = np.iinfo(np.int64).max
        least = np.where(self.allowed, self.transient_bytes, most).min(axis=1).max()
        values = np.unique(self.transient_bytes[self.allowed])
        return np.asarray(values[values >= least])

    def order(self, path: Ints) -> int:
        """What is minimised: nanoseconds × links + changes of option."""
        links = np.arange(self.num_links)
        switch = self.ordered_switch[links[:-1], path[:-1], path[1:]]
        return int(self.ordered_time[links, path].sum()) + int(switch.sum())

    def total_ns(self, path: Ints) -> int:
        return self.order(path) // self.num_links

    def memory(self, path: Ints) -> int:
        return int(self.memory_bytes[np.arange(self.num_links), path].sum())

    def peak(self, path: Ints) -> int:
        return int(self.transient_bytes[np.arange(self.num_links), path].max())

    def agrees(self, path: Ints) -> bool:
        return all(len({int(path[i]) for i in group}) == 1 for group in self.groups)


@dataclass(frozen=True)
class Potential:
    """Lower bounds from one multiplier: ``to_go[i, s]`` prices links after i (order units)."""

    multiplier: float
    to_go: Floats


@dataclass(frozen=True)
class Relaxed:
    """A node of the search: thresholds ``low..high``, some groups decided.

    The options up to the highest threshold are allowed and only the lowest is taken off the
    capacity, so every assignment of the node's range is among those allowed here.
    """

    chain: Chain
    low: int
    high: int
    undecided: tuple[tuple[int, ...], ...]
    allowed: Bools
    capacity: int
    bound: int = 0
    fitting: Ints | None = None  # the best known assignment that fits the relaxed problem
    potentials: tuple[Potential, ...] = ()
    gap: int = 0  # how far above the bound labels are kept; 0: not tried yet


@dataclass(frozen=True)
class Choice:
    """An assignment: ``chain`` is the index of the chain it belongs to."""

    chain: int
    path: Ints
    total_ns: int
    memory_bytes: int


def smallest_memory(chain: Chain) -> tuple[int, Ints] | None:
    """The least capacity that any assignment needs, and such an assignment; None without one."""
    best: tuple[int, Ints] | None = None
    for threshold in chain.thresholds:
        allowed = chain.allowed & (chain.transient_bytes <= threshold)
        path = _least_memory_path(chain, allowed)
        if path is not None:
            needed = chain.memory(path) + chain.peak(path)
            if best is None or needed < best[0]:
                best = needed, path
    return best


def _least_memory_path(chain: Chain, allowed: Bools) -> Ints | None:
    far = np.iinfo(np.int64).max // (4 * chain.num_links)
    memory = np.where(allowed, chain.memory_bytes, far)
    for group in chain.groups:
        memory[list(group)] = np.minimum(memory[list(group)].sum(axis=0), far)
    # Ties go to the faster option.
    least = memory == memory.min(axis=1, keepdims=True)
    time = chain.time_ns.copy()
    for group in chain.groups:
        time[list(group)] = time[list(group)].sum(axis=0)
    path = np.where(least, time, np.iinfo(np.int64).max).argmin(axis=1)
    ok = allowed[np.arange(chain.num_links), path].all()
    return path.astype(np.int64) if ok else None


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
        path = _labels(node, limit)
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
        fitting = _least_memory(chain, node.allowed)
        if chain.memory(fitting) > node.capacity:
            return None
        self.offer(index, fitting)
        bound, tried = node.bound, list[tuple[int, Potential]]()
        # A child starts at its parent's best multiplier, which often excludes it at once.
        multiplier = node.potentials[-1].multiplier if node.potentials else 0.0
        large: Ints | None = None
        while True:
            potential, path, value = _viterbi(chain, node.allowed, multiplier, node.capacity)
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
            following = 0.0 if large is None else _intersection(chain, large, fitting)
            if any(following == p.multiplier for _, p in tried):
                break
            multiplier = following
        if large is not None:
            fitting = _splice(chain, large, fitting, node.capacity)
            self.offer(index, fitting)
        tried.sort(key=lambda pair: pair[0])
        potentials = tuple(potential for _, potential in tried[-4:])
        return replace(node, bound=bound, fitting=fitting, potentials=potentials)


def _least_memory(chain: Chain, allowed: Bools) -> Ints:
    far = np.iinfo(np.int64).max
    path: Ints = np.where(allowed, chain.memory_bytes, far).argmin(axis=1).astype(np.int64)
    return path


def _splice(chain: Chain, large: Ints, fitting: Ints, capacity: int) -> Ints:
    """The best that fits of ``fitting`` and its crossings with ``large`` at one cut.

    At the best multiplier equal links tie and the Viterbi pass sees only the two extremes; the
    answer is usually near a crossing, so this closes most of the gap for a long chain.
    """
    links = np.arange(chain.num_links)
    head = links[None, :] < links[:, None]
    paths = np.concatenate([np.where(head, large, fitting), np.where(head, fitting, large)])
    memory = chain.memory_bytes[links, paths].sum(axis=1)
    order = chain.ordered_time[links, paths].sum(axis=1)
    order += chain.ordered_switch[links[:-1], paths[:, :-1], paths[:, 1:]].sum(axis=1)
    order[memory > capacity] = np.iinfo(np.int64).max
    best: Ints = paths[order.argmin()]
    return best


def _intersection(chain: Chain, large: Ints, fitting: Ints) -> float:
    """The multiplier at which both assignments cost the same."""
    time = chain.order(fitting) - chain.order(large)
    return max(0.0, time / (chain.memory(large) - chain.memory(fitting)))


def _slack(chain: Chain, multiplier: float, capacity: int, value: float) -> float:
    """More than the rounding error of a sum of floats along the chain."""
    return 1e-15 * (chain.num_links + 8) * (abs(value) + 2 * multiplier * max(capacity, 1))


def _viterbi(
    chain: Chain, allowed: Bools, multiplier: float, capacity: int
) -> tuple[Potential, Ints, int]:
    """Best assignment for time + multiplier · memory, and the bound that follows from it."""
    cost = np.where(allowed, chain.ordered_time + multiplier * chain.memory_bytes, np.inf)
    to_go = np.zeros(cost.shape)
    after = np.zeros(cost.shape, dtype=np.int64)
    rows = np.arange(chain.num_options)
    for i in range(chain.num_links - 2, -1, -1):
        options = chain.ordered_switch[i] + (cost[i + 1] + to_go[i + 1])
        after[i] = options.argmin(axis=1)
        to_go[i] = options[rows, after[i]]
    path = np.zeros(chain.num_links, dtype=np.int64)
    path[0] = (cost[0] + to_go[0]).argmin()
    for i in range(1, chain.num_links):
        path[i] = after[i - 1, path[i - 1]]
    value = float((cost[0] + to_go[0])[path[0]]) - multiplier * capacity
    bound = int(np.ceil(value - _slack(chain, multiplier, capacity, value)))
    return Potential(multiplier, to_go), path, bound


def _labels(node: Relaxed, limit: int) -> Ints | None:
    """The relaxed optimum if its order is below ``limit``, by Pareto labels along the chain."""
    chain = node.chain
    far = np.iinfo(np.int64).max // 4
    least = np.where(node.allowed, chain.memory_bytes, far).min(axis=1)
    memory_to_go = np.append(np.cumsum(least[::-1])[::-1][1:], 0)
    time, memory = np.zeros(1, dtype=np.int64), np.zeros(1, dtype=np.int64)
    option = np.zeros(1, dtype=np.int64)
    history: list[tuple[Ints, Ints]] = []  # per link: option and index of the label before
    for i in range(chain.num_links):
        times = time[:, None] + chain.ordered_time[i]
        if i:
            times = times + chain.ordered_switch[i - 1][option]
        memories = memory[:, None] + chain.memory_bytes[i]
        keep = node.allowed[i] & (memories + memory_to_go[i] <= node.capacity)
        for potential in node.potentials:
            rest = potential.to_go[i] + potential.multiplier * (memories - node.capacity)
            slack = _slack(chain, potential.multiplier, node.capacity, limit)
            keep &= times + rest <= limit - 1 + slack
        before, option = np.nonzero(keep)
        time, memory = times[before, option], memories[before, option]
        kept = _pareto(time, memory, option)
        time, memory, option, before = time[kept], memory[kept], option[kept], before[kept]
        history.append((option, before))
        if not len(time):
            return None
    at = int(np.lexsort((memory, time))[0])
    if time[at] >= limit:
        return None
    path = np.zeros(chain.num_links, dtype=np.int64)
    for i in range(chain.num_links - 1, -1, -1):
        path[i], at = history[i][0][at], int(history[i][1][at])
    return path


def _pareto(time: Ints, memory: Ints, option: Ints) -> Ints:
    """Indices of the labels that no other label of the same option beats in time and memory."""
    if not len(time):
        return np.zeros(0, dtype=np.int64)
    order = np.lexsort((memory, time, option))
    # Options ascend, so an offset per option restarts the running minimum with each of them.
    lowered = memory[order] - option[order] * (int(memory.max()) + 1)
    running = np.minimum.accumulate(lowered)
    first = np.ones(len(order), dtype=np.bool_)
    first[1:] = lowered[1:] < running[:-1]
    return np.asarray(order[first])
