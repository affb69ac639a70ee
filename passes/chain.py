"""One option per link of a chain, under a capacity: the problem at the core of the searcher.

    minimise    Σ time[i, s_i] + Σ switch[i, s_i, s_(i+1)]
    subject to  Σ memory[i, s_i] + max transient[i, s_i] <= capacity,
                s_a = s_b for links a, b of one group

All numbers are whole (nanoseconds, bytes); among assignments of equal time the one with the fewest
changes of option wins, for plans that people can read.
:mod:`galvatron_compile.passes.chain_search` solves it exactly.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
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
