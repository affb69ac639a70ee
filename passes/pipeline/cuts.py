"""Where to cut layers into stages: the best partition for given times of the stages.

The objective is ``sum_weight · sum + max_weight · max`` of the stages' times. For a limit on the
slowest stage the cheapest sum is a shortest path; over ranges of that limit branch and bound finds
the best, since the sum only falls as the limit rises.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass

import numpy as np

from galvatron_compile.passes.pipeline.bounds import FAR
from galvatron_compile.passes.pipeline.closed_form import Objective, even_boundaries
from galvatron_compile.passes.pipeline.problem import Ints
from galvatron_compile.passes.pipeline.ranges import Ranges


@dataclass(frozen=True)
class Partition:
    """edges: [stages + 1]; value in the objective's units."""

    edges: tuple[int, ...]
    total: int
    slowest: int
    value: int


class Cutter:
    """times: [rows, signatures]; row_of: which row every stage has, in order.

    least_sum: what the times of all stages add up to at least; narrows the search.
    uncut: edges where no stage may begin.
    """

    def __init__(
        self,
        found: Ranges,
        row_of: list[int],
        objective: Objective,
        least_sum: int = 0,
        uncut: frozenset[int] = frozenset(),
    ) -> None:
        self.found, self.row_of, self.objective = found, row_of, objective
        self.least_sum, self.uncut = least_sum, uncut
        self.forbidden = np.array(sorted(uncut), dtype=np.int64)
        self.num_layers = len(found.alike) - 1

    def price(self, times: Ints, edges: tuple[int, ...]) -> Partition | None:
        """A given partition; None if a stage of it cannot be."""
        if not self.uncut.isdisjoint(edges):
            return None
        stages = [
            int(times[row, self.found.alike[b, b - a]])
            for row, a, b in zip(self.row_of, edges[:-1], edges[1:], strict=True)
        ]
        if max(stages) >= FAR:
            return None
        value = self.objective.value(sum(stages), max(stages))
        return Partition(edges, sum(stages), max(stages), value)

    def best(self, times: Ints, start: Partition | None) -> Partition | None:
        """The partition of the least value; None if there is none. ``start``: a known one."""
        weight, slow_weight = self.objective.sum_weight, self.objective.max_weight
        best, limit = start, FAR - 1
        if best is None:
            even = even_boundaries(self.num_layers, len(self.row_of))
            best = self.price(times, even)
        if best is not None and slow_weight:  # the slowest stage of a better one is below this
            limit = min(limit, (best.value - weight * self.least_sum) // slow_weight)
        highest = self.within(times, limit)
        if highest is None:
            return best
        if best is None or highest.value < best.value:
            best = highest
        # Nodes: the slowest stage lies in low .. high; the sum is at least that of a wider limit.
        low = -(-highest.total // len(self.row_of))
        nodes = [
            (self.objective.value(highest.total, low), low, highest.slowest - 1, highest.total)
        ]
        values = np.unique(times[(times >= low) & (times <= limit)])
        while nodes:
            bound, low, high, total = heapq.heappop(nodes)
            if bound >= best.value:
                break
            if slow_weight:  # a slower stage is worth less than what is known
                high = min(high, (best.value - 1 - weight * total) // slow_weight)
            a, b = np.searchsorted(values, [low, high + 1])  # candidates: values[a:b]
            if a >= b or self.objective.value(total, int(values[a])) >= best.value:
                continue
            middle = int(values[(a + b - 1) // 2])
            found = self.within(times, middle)
            if middle < high:
                rest = self.objective.value(total, middle + 1)
                heapq.heappush(nodes, (rest, middle + 1, high, total))
            if found is not None:
                if found.value < best.value:
                    best = found
                down = self.objective.value(found.total, low)
                heapq.heappush(nodes, (down, low, found.slowest - 1, found.total))
        return best

    def within(self, times: Ints, limit: int) -> Partition | None:
        """The least sum with no stage slower than ``limit``; None if there is no such partition."""
        num_stages, num_layers = len(self.row_of), self.num_layers
        usable = times <= limit
        longest = [int((self.found.length * usable[row]).max()) for row in range(len(times))]
        reach = [longest[row] for row in self.row_of]
        later = [sum(reach[g + 1 :]) for g in range(num_stages)]
        padded = np.concatenate(
            [np.where(usable, times, FAR), np.full((len(times), 1), FAR)], axis=1
        )
        sums: Ints = np.zeros(1, dtype=np.int64)
        low = high = 0  # ``sums`` belong to edges low .. high
        choices: list[tuple[int, Ints]] = []
        for g, row in enumerate(self.row_of):
            after_low = max(low + 1, num_layers - later[g])
            after_high = min(high + reach[g], num_layers - (num_stages - 1 - g))
            shortest, farthest = max(1, after_low - high), min(reach[g], after_high - low)
            if after_low > after_high or shortest > farthest:
                return None
            edges = np.arange(after_low, after_high + 1)
            lengths = np.arange(shortest, farthest + 1)
            before = edges[:, None] - lengths
            inside = (before >= low) & (before <= high)
            stage = padded[row, self.found.alike[edges[:, None], np.where(inside, lengths, 0)]]
            sums = sums[np.clip(before, low, high) - low] + stage
            chosen = sums.argmin(axis=1)
            sums = np.minimum(sums[np.arange(len(edges)), chosen], FAR)
            sums[np.isin(edges, self.forbidden)] = FAR
            choices.append((after_low, lengths[chosen]))
            low, high = after_low, after_high
        if sums[-1] >= FAR or high != num_layers:
            return None
        cuts = [num_layers]
        for first, chosen_length in reversed(choices):
            cuts.append(cuts[-1] - int(chosen_length[cuts[-1] - first]))
        return self.price(times, tuple(reversed(cuts)))

    def lowest_peak(self, sizes: Ints) -> tuple[int, tuple[int, ...]] | None:
        """The partition whose largest stage is smallest, by bisection over the sizes."""
        even = self.price(sizes, even_boundaries(self.num_layers, len(self.row_of)))
        limit = FAR - 1 if even is None else even.slowest
        best = None if even is None else (even.slowest, even.edges)
        values = np.unique(sizes[sizes <= limit])
        low, high = 0, len(values) - (even is not None)
        while low < high:
            # Even stages are nearly the best, and narrow limits are quick to try: look there first.
            middle = high - 1 - (high - 1 - low) // (2 if best is None else 8)
            found = self.within(sizes, int(values[middle]))
            if found is None:
                low = middle + 1
            else:
                best = found.slowest, found.edges
                high = int(np.searchsorted(values, found.slowest))
        return best
