"""What the search over a :class:`Chain` knows of all assignments at once, and its label pass.

- *Bounds* come from the Lagrangian: a Viterbi pass over time + λ·memory prices the rest of the
  chain for every (link, option), switching included. The best λ is found by intersecting the two
  lines of the last too-large and the last fitting assignment (Handler and Zang 1980).
- The *label* pass keeps Pareto-optimal (time, memory) pairs per (link, option) that the bounds do
  not exclude. Equal links make equal sums, which merge, so the work follows the gap between limit
  and bound and not the number of links.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from galvatron_compile.passes.chain import Bools, Chain, Ints

Floats = NDArray[np.float64]


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


def least_memory(chain: Chain, allowed: Bools) -> Ints:
    far = np.iinfo(np.int64).max
    path: Ints = np.where(allowed, chain.memory_bytes, far).argmin(axis=1).astype(np.int64)
    return path


def splice(chain: Chain, large: Ints, fitting: Ints, capacity: int) -> Ints:
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


def intersection(chain: Chain, large: Ints, fitting: Ints) -> float:
    """The multiplier at which both assignments cost the same."""
    time = chain.order(fitting) - chain.order(large)
    return max(0.0, time / (chain.memory(large) - chain.memory(fitting)))


def _slack(chain: Chain, multiplier: float, capacity: int, value: float) -> float:
    """More than the rounding error of a sum of floats along the chain."""
    return 1e-15 * (chain.num_links + 8) * (abs(value) + 2 * multiplier * max(capacity, 1))


def viterbi(
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


def labels(node: Relaxed, limit: int) -> Ints | None:
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
