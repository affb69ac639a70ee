"""Which layouts a stage visits, in order of a lower bound.

A *walk* is the order of layouts within a run of alike layers; a *pattern* is one walk per run. A
walk takes one layer for every layout it visits, and leaves the others free to take any layout
of the walk: where the changes happen within alike layers does not matter. So a pattern says what
switching costs and which menus the layers choose from, exactly and for any switching costs, and
the number of patterns does not depend on the length of a run.

:func:`patterns` is A* (Hart, Nilsson and Raphael 1968) over walks: the cost so far is switching
plus, for every layer, how much its cheapest option of the layout exceeds its cheapest option at
the multiplier of the relaxation. What remains is bounded by shortest paths backwards.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from galvatron_compile.passes.pipeline.problem import Ints

Floats = NDArray[np.float64]
Walk = tuple[int, ...]
Content = tuple[tuple[tuple[Any, Walk], int], ...]
"""((menu, layouts), number of layers), sorted: what the layers of a pattern choose from."""


@dataclass(frozen=True)
class Run:
    """Alike layers in a row. menu: names their costs (an integer); tie: which tie, or -1.

    first, length: which layers; hop_ns: [layouts, layouts] within the run, join_ns: to the run
    that follows, None where the next run is in another stage.
    """

    menu: int
    tie: int
    first: int
    length: int
    hop_ns: Ints
    join_ns: Ints | None


@dataclass(frozen=True)
class Pattern:
    """excess: what it takes above the relaxation, at least; switch_ns: part of that."""

    excess: float
    content: Content
    walks: tuple[Walk, ...]


def switching_ns(runs: Sequence[Run], walks: Sequence[Walk]) -> int:
    total = 0
    for i, (run, walk) in enumerate(zip(runs, walks, strict=True)):
        total += sum(int(run.hop_ns[a, b]) for a, b in pairwise(walk))
        if run.join_ns is not None:
            total += int(run.join_ns[walk[-1], walks[i + 1][0]])
    return total


class _Search:
    """excess[i]: [layouts] of run i, infinite where it has no option."""

    def __init__(self, runs: Sequence[Run], excess: Sequence[Floats]) -> None:
        self.runs, self.excess = runs, excess
        none = np.zeros_like(runs[0].hop_ns)
        self.joins = [none if run.join_ns is None else run.join_ns for run in runs]
        self.leave: list[Floats] = []  # from a layout to the end, once its run is closed
        self.extend: list[Floats] = []  # the same, if the run visits another layout first
        to_go: Floats = np.zeros(len(none))
        for i in range(len(runs) - 1, -1, -1):
            if i + 1 < len(runs):
                leave = (self.joins[i] + (excess[i + 1] + to_go)).min(axis=1)
            else:
                leave = np.zeros(len(none))
            to_go, extend = leave, np.full(len(none), np.inf)
            hops = runs[i].hop_ns + np.where(np.eye(len(none), dtype=np.bool_), np.inf, 0.0)
            for _ in range(min(len(none), runs[i].length) - 1):
                extend = (hops + (excess[i] + to_go)).min(axis=1)
                lower = np.minimum(leave, extend)
                if (lower >= to_go).all():
                    break
                to_go = np.minimum(to_go, lower)
            self.leave.append(leave)
            self.extend.append(extend)
            self.after = to_go
        self.leave.reverse()
        self.extend.reverse()

    def patterns(self) -> Iterator[Pattern]:
        heap: list[tuple[float, int, int, float, Walk, Content, tuple[Walk, ...]]] = []
        seen: set[tuple[Any, ...]] = set()
        num_pushed = 0

        def push(
            i: int, cost: float, walk: Walk, content: Content, walks: tuple[Walk, ...]
        ) -> None:
            nonlocal num_pushed
            bound = cost
            if i < len(self.runs):
                closed = cost + self.rest(i, walk) + self.leave[i][walk[-1]]
                extend = self.extend[i][walk[-1]] if len(walk) < self.runs[i].length else np.inf
                bound = min(closed, cost + extend)
            if bound < np.inf:
                num_pushed += 1
                heapq.heappush(heap, (float(bound), num_pushed, i, cost, walk, content, walks))

        def enter(i: int, cost: Floats, content: Content, walks: tuple[Walk, ...]) -> None:
            for layout in np.flatnonzero(np.isfinite(cost + self.excess[i])):
                push(
                    i, float(cost[layout] + self.excess[i][layout]), (int(layout),), content, walks
                )

        enter(0, np.zeros(len(self.excess[0])), (), ())
        while heap:
            bound, _, i, cost, walk, content, walks = heapq.heappop(heap)
            if i == len(self.runs):
                yield Pattern(bound, content, walks)
                continue
            again = walk[-1] in walk[:-1]
            key = (i, walk[-1], walk[-2] if again else -1, tuple(sorted(walk)), content)
            if key in seen:
                continue
            seen.add(key)
            run, at = self.runs[i], walk[-1]
            useful: Any = True
            if again:  # worth it only where the way round is cheaper than the direct one
                before = walk[-2]
                useful = run.hop_ns[before] > run.hop_ns[before, at] + run.hop_ns[at]
            if len(walk) < run.length:
                onward = cost + run.hop_ns[at] + self.excess[i]
                onward = np.where(useful, onward, np.inf)
                onward[at] = np.inf
                for layout in np.flatnonzero(np.isfinite(onward)):
                    push(i, float(onward[layout]), (*walk, int(layout)), content, walks)
            closed = cost + self.rest(i, walk)
            after = _with(content, run, walk)
            if i + 1 == len(self.runs):
                if not again:
                    push(i + 1, closed, walk, after, (*walks, walk))
                continue
            onward = closed + self.joins[i][at]
            if again:
                join = self.joins[i]
                useful = join[walk[-2]] > run.hop_ns[walk[-2], at] + join[at]
                onward = np.where(useful, onward, np.inf)
            enter(i + 1, onward.astype(np.float64), after, (*walks, walk))

    def rest(self, i: int, walk: Walk) -> float:
        free = self.runs[i].length - len(walk)
        return free * min(float(self.excess[i][layout]) for layout in walk) if free else 0.0


def patterns(runs: Sequence[Run], excess: Sequence[Floats]) -> Iterator[Pattern]:
    """Patterns by rising excess; of those with equal content only one that switches cheapest.

    Among equal content the first is the cheapest: the excess differs by switching alone.
    """
    seen: set[Content] = set()
    for pattern in _Search(runs, excess).patterns():
        if pattern.content not in seen:
            seen.add(pattern.content)
            yield pattern


def _with(content: Content, run: Run, walk: Walk) -> Content:
    """Content once ``run`` is walked: one layer forced per visit, the rest in any of them."""
    counts = dict(content)
    if run.tie >= 0:
        counts[(("tie", run.tie), walk)] = 1
    elif len(walk) == 1:
        counts[(("run", run.menu), walk)] = counts.get((("run", run.menu), walk), 0) + run.length
    else:
        for layout in walk:
            item = ("run", run.menu), (layout,)
            counts[item] = counts.get(item, 0) + 1
        free = run.length - len(walk)
        if free:
            anywhere = ("run", run.menu), tuple(sorted(set(walk)))
            counts[anywhere] = counts.get(anywhere, 0) + free
    return tuple(sorted(counts.items()))
