"""Which layouts a stage visits, in order of a lower bound.

A *walk* is the order of layouts within a run of alike layers; a *pattern* is one walk per run. A
walk takes one layer for every layout it visits, and leaves the others free to take any layout
of the walk: where the changes happen within alike layers does not matter. So a pattern says what
switching costs and which menus the layers choose from, exactly and for any switching costs, and
the number of patterns does not depend on the length of a run.

:class:`PatternSearch` is A* (Hart, Nilsson and Raphael 1968) over walks: the cost so far is
switching plus, for every layer, how much its cheapest option of the layout exceeds its cheapest
option at the multiplier of the relaxation. What remains is bounded by shortest paths backwards.

A single layer between walks need not be walked: given the layouts on both sides, switching is part
of its options' times. Such a run is *folded*, and one knapsack serves all its layouts.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from galvatron_compile.passes.pipeline.problem import Ints

_FINITE = float(1 << 60)

Floats = NDArray[np.float64]
Walk = tuple[int, ...]
Item = tuple[Any, Walk]
"""What layers choose from: ("run", menu) in some layouts, ("tie", tie) in a layout, or
("fold", menu, class before, class after) between two layouts."""
Content = tuple[tuple[Item, int], ...]
"""Items with their numbers of layers, sorted."""


@dataclass(frozen=True)
class Run:
    """Alike layers in a row. menu: names their costs (an integer); tie: which tie, or -1.

    first, length: which layers; kind: their class; hop_ns: [layouts, layouts] within the run,
    join_ns: to the run that follows, None where the next run is in another stage; folded: a single
    layer whose switching on both sides (``kinds``: classes there, -1 for none) is in its menu.
    """

    menu: int
    tie: int
    first: int
    length: int
    kind: int
    hop_ns: Ints
    join_ns: Ints | None
    folded: bool = False
    kinds: tuple[int, int] = (-1, -1)


@dataclass(frozen=True)
class Pattern:
    """excess: what it takes above the relaxation, at least; switch_ns: part of that."""

    excess: float
    content: Content
    walks: tuple[Walk, ...]


def fold(runs: list[Run]) -> list[Run]:
    """Fold single layers, no two beside each other, and not the only run."""
    result: list[Run] = []
    for i, run in enumerate(runs):
        can = run.length == 1 and run.tie < 0 and len(runs) > 1
        if can and not (result and result[-1].folded):
            before = runs[i - 1].kind if i and runs[i - 1].join_ns is not None else -1
            after = -1 if run.join_ns is None else runs[i + 1].kind
            run = replace(run, folded=True, kinds=(before, after))
        result.append(run)
    return result


def switching_ns(runs: Sequence[Run], walks: Sequence[Walk]) -> int:
    """What switching takes that is not in the menu of a folded run."""
    total = 0
    for i, (run, walk) in enumerate(zip(runs, walks, strict=True)):
        total += sum(int(run.hop_ns[a, b]) for a, b in pairwise(walk))
        if run.join_ns is not None and not run.folded and not runs[i + 1].folded:
            total += int(run.join_ns[walk[-1], walks[i + 1][0]])
    return total


def folded_item(runs: Sequence[Run], walks: Sequence[Walk], i: int, after: int) -> Item:
    """What a folded run chooses from: depends on the layouts around it, where they are in reach.

    walks: of the runs before i; after: first layout of the run after it.
    """
    before, following = runs[i].kinds
    a = -1 if before < 0 else walks[i - 1][-1]
    return ("fold", runs[i].menu, before, following), (a, -1 if following < 0 else after)


class PatternSearch:
    """excess[i]: [layouts] of run i, infinite where it has no option.

    most: patterns of a larger excess are of no interest; may be lowered on the way.
    """

    def __init__(self, runs: Sequence[Run], excess: Sequence[Floats], most: float) -> None:
        self.runs, self.excess, self.most = runs, excess, most
        self.heap: list[tuple[float, int, int, float, Walk, Content, tuple[Walk, ...]]] = []
        self.num_pushed = 0
        num_layouts = len(runs[0].hop_ns)
        self.joins = [
            np.zeros_like(run.hop_ns) if run.join_ns is None else run.join_ns for run in runs
        ]
        # To the end from a layout of run i, its own layers apart: once the run is closed, and if
        # it visits another layout first; and with its layers, from its first layer.
        self.leave: list[Floats] = []
        self.extend: list[Floats] = []
        self.entry: list[Floats] = []
        elsewhere = np.where(np.eye(num_layouts, dtype=np.bool_), np.inf, 0.0)
        entry: Floats = np.zeros(num_layouts)
        for i in range(len(runs) - 1, -1, -1):
            own, length = excess[i], runs[i].length
            leave = entry if i + 1 == len(runs) else (self.joins[i] + entry).min(axis=1)
            to_go, extend = leave, np.full(num_layouts, np.inf)
            for _ in range(min(num_layouts, length) - 1):
                extend = (runs[i].hop_ns + elsewhere + (own + to_go)).min(axis=1)
                if (extend >= to_go).all():
                    break
                to_go = np.minimum(to_go, extend)
            alone = leave + (own * (length - 1) if length > 1 else 0.0)
            entry = own + np.minimum(alone, extend)
            self.leave.insert(0, leave)
            self.extend.insert(0, extend)
            self.entry.insert(0, entry)

    def patterns(self) -> Iterator[Pattern]:
        """By rising excess; of those with equal content only one, which switches cheapest.

        Among equal content the first is the cheapest: their excess differs by switching alone.
        """
        seen: set[object] = set()
        self.enter(0, np.zeros(len(self.excess[0])), (), ())
        while self.heap:
            bound, _, i, cost, walk, content, walks = heapq.heappop(self.heap)
            if bound > self.most:
                return
            if i == len(self.runs):
                if content not in seen:
                    seen.add(content)
                    yield Pattern(bound, content, walks)
                continue
            again = walk[-1] in walk[:-1]
            key = (i, walk[-1], walk[-2] if again else -1, tuple(sorted(walk)), content)
            if key not in seen:
                seen.add(key)
                self.lengthen(i, cost, walk, content, walks)
                self.close(i, cost, walk, content, walks)

    def push(
        self,
        bounds: Floats,
        i: int,
        costs: Floats,
        walk: Walk,
        content: Content,
        walks: tuple[Walk, ...],
    ) -> None:
        """One node for every layout within the limit: ``walk`` goes on to it."""
        for layout in np.flatnonzero(bounds <= min(self.most, _FINITE)).tolist():
            self.num_pushed += 1
            node = (float(bounds[layout]), self.num_pushed, i, float(costs[layout]))
            heapq.heappush(self.heap, (*node, (*walk, layout), content, walks))

    def enter(self, i: int, onward: Floats, content: Content, walks: tuple[Walk, ...]) -> None:
        """Start run i, or end after the last run. onward: [layouts] cost of getting there."""
        if i == len(self.runs):
            bounds, costs = onward, onward
        else:
            bounds, costs = onward + self.entry[i], onward + self.excess[i]
        if i == 0 or not self.runs[i - 1].folded:
            self.push(bounds, i, costs, (), content, walks)
            return
        for layout in np.flatnonzero(bounds <= min(self.most, _FINITE)).tolist():
            item = folded_item(self.runs, walks, i - 1, layout)
            only = np.where(np.arange(len(bounds)) == layout, bounds, np.inf)
            self.push(only, i, costs, (), _more(content, [(item, 1)]), walks)

    def lengthen(
        self, i: int, cost: float, walk: Walk, content: Content, walks: tuple[Walk, ...]
    ) -> None:
        """Visit another layout within run i."""
        run, own, at = self.runs[i], self.excess[i], walk[-1]
        free = run.length - len(walk) - 1
        if free < 0:
            return
        onward = cost + run.hop_ns[at] + own
        onward[at] = np.inf
        if at in walk[:-1]:  # worth it only where the way round is cheaper than the direct one
            before = run.hop_ns[walk[-2]]
            onward = np.where(before > before[at] + run.hop_ns[at], onward, np.inf)
        bounds = onward + self.leave[i]
        if free:
            rest = free * np.minimum(own, min(own[layout] for layout in walk))
            bounds = onward + np.minimum(self.leave[i] + rest, self.extend[i])
        self.push(bounds, i, onward, walk, content, walks)

    def close(
        self, i: int, cost: float, walk: Walk, content: Content, walks: tuple[Walk, ...]
    ) -> None:
        """The walk of run i is complete: go on to the next run."""
        run, own, at = self.runs[i], self.excess[i], walk[-1]
        again = at in walk[:-1]
        free = run.length - len(walk)
        cost += free * min(float(own[layout]) for layout in walk) if free else 0.0
        if not run.folded:
            content = _more(content, _items(run, walk))
        join = self.joins[i]
        if i + 1 == len(self.runs):
            join = join[:, :1]  # only one way to end
        onward = (cost + join[at]).astype(np.float64)
        if again:
            before = walk[-2]
            useful = join[before] > run.hop_ns[before, at] + join[at]
            onward = np.where(useful, onward, np.inf)
        self.enter(i + 1, onward, content, (*walks, walk))


def _items(run: Run, walk: Walk) -> list[tuple[Item, int]]:
    """What the layers of a walk choose from: one per visit is forced, the rest is free."""
    if run.tie >= 0:
        return [((("tie", run.tie), walk), 1)]
    name = ("run", run.menu)
    if len(walk) == 1:
        return [((name, walk), run.length)]
    forced: list[tuple[Item, int]] = [((name, (layout,)), 1) for layout in walk]
    free = run.length - len(walk)
    return forced + ([((name, tuple(sorted(set(walk)))), free)] if free else [])


def _more(content: Content, items: list[tuple[Item, int]]) -> Content:
    """Content with more layers. The layers of a tie count once."""
    counts = dict(content)
    for item, count in items:
        counts[item] = 1 if item[0][0] == "tie" else counts.get(item, 0) + count
    return tuple(sorted(counts.items()))
