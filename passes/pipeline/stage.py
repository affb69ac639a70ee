"""The fastest options of one pipeline group, exactly.

The peak of the transients is a threshold: allow options up to p and take p off the capacity. A
node of the search holds a range of thresholds, allows up to the highest and takes off only the
lowest, and splits where its answer breaks the limit. Within a node the patterns of layouts
(:mod:`.patterns`) come by rising lower bound and each is a knapsack (:mod:`.knapsack`).
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise, product

import numpy as np

from galvatron_compile.passes.pipeline.choices import Choices
from galvatron_compile.passes.pipeline.knapsack import fill, relax
from galvatron_compile.passes.pipeline.menu import Menu
from galvatron_compile.passes.pipeline.patterns import (
    Floats,
    Pattern,
    PatternSearch,
    Run,
    fold,
    folded_item,
    switching_ns,
)
from galvatron_compile.passes.pipeline.problem import Ints
from galvatron_compile.passes.pipeline.ranges import runs as equal_runs
from galvatron_compile.passes.pipeline.tables import Tables


@dataclass(frozen=True)
class Piece:
    """One stage of a group: its layers, the micro-batches it holds, and which ends send."""

    first: int
    last: int
    flight: int
    sends_back: bool
    sends_next: bool


@dataclass(frozen=True)
class Stage:
    """The answer for one group: options per layer of its pieces, in order."""

    time_ns: int
    options: tuple[int, ...]


_NUM_RANGES = 4  # of transient peaks, for a quick bound


class StageSolver:
    """Solves the stages of one family."""

    def __init__(self, tables: Tables) -> None:
        self.tables = tables
        self.choices = Choices(tables)

    def solve(self, pieces: Sequence[Piece], limit: int | None = None) -> Stage | None:
        """The fastest options below ``limit`` nanoseconds; None if there are none that fit."""
        return _Group(self, pieces).solve(limit)

    def bound(self, pieces: Sequence[Piece]) -> int | None:
        """A lower bound in nanoseconds by linear relaxation; None if nothing fits."""
        return _Group(self, pieces).bound()

    def smallest(self, pieces: Sequence[Piece]) -> int | None:
        """The least capacity that would do; None if a layer has no option."""
        return _Group(self, pieces).smallest()


class _Group:
    """One group: its runs, and branch and bound over ranges of the transient peak."""

    def __init__(self, solver: StageSolver, pieces: Sequence[Piece]) -> None:
        self.choices, self.tables = solver.choices, solver.tables
        self.capacity = solver.tables.problem.capacity_bytes
        self.offset_ns = 0  # sends that cost the same under every option
        self.runs = [run for piece in pieces for run in self.piece_runs(piece)]
        members: dict[int, list[int]] = {}
        for run in self.runs:
            if run.tie >= 0:
                members.setdefault(run.tie, []).append(run.menu)
        # A tie with a single layer in this group ties nothing.
        self.members = {tie: tuple(menus) for tie, menus in members.items() if len(menus) > 1}
        self.runs = [run if run.tie in self.members else replace(run, tie=-1) for run in self.runs]
        self.runs = fold(self.runs)
        parts = [self.choices.costs[run.menu] for run in self.runs if run.tie < 0]
        parts += [self.choices.joint(menus) for menus in self.members.values()]
        if any(not len(part.options) for part in parts):
            self.thresholds: Ints = np.zeros(0, dtype=np.int64)
        else:
            lowest = max(int(part.transient_bytes.min()) for part in parts)
            values = np.unique(np.concatenate([part.transient_bytes for part in parts]))
            self.thresholds = values[values >= lowest]

    def piece_runs(self, piece: Piece) -> Iterator[Run]:
        """Runs of alike layers; an end whose send depends on the option is a run of its own."""
        tables = self.tables
        back = piece.sends_back and self.send_varies(tables.send_back_ns, piece.first)
        following = piece.sends_next and self.send_varies(tables.send_next_ns, piece.last - 1)
        marks = [
            (kind, back and i == 0, following and i == piece.last - piece.first - 1)
            for i, kind in enumerate(tables.kinds[piece.first : piece.last])
        ]
        found = equal_runs(marks)
        for start, length in found:
            first = piece.first + start
            kind = int(tables.classes[first])
            end = first + length
            join = None
            if end < piece.last:
                join = tables.switch(kind, int(tables.classes[end]))
            menu = self.choices.menu_of((kind, piece.flight, *marks[start][1:]))
            tie = tables.tie_of.get(first, -1)
            yield Run(menu, tie, first, length, kind, tables.switch(kind, kind), join)

    def send_varies(self, sends: Ints, layer: int) -> bool:
        kind = self.tables.classes[layer]
        values = sends[kind, self.tables.allowed[kind]]
        if len(values) and (values == values[0]).all():
            self.offset_ns += int(values[0])
            return False
        return True

    def smallest(self) -> int | None:
        choices, best = self.choices, None
        for peak in self.thresholds.tolist():
            needed = peak + sum(
                run.length * int(choices.menu(run.menu, peak, None).memory_bytes[0])
                for run in self.runs
                if run.tie < 0
            )
            for members in self.members.values():
                menu = choices.tied_menu(members, peak, None)
                assert menu is not None
                needed += int(menu.memory_bytes[0])
            best = needed if best is None else min(best, needed)
        return best

    def bound(self) -> int | None:
        """The least relaxation over a few ranges of thresholds."""
        edges = np.linspace(0, len(self.thresholds), _NUM_RANGES + 1).astype(np.int64)
        found = []
        for low, high in pairwise(np.unique(edges)):
            peak = int(self.thresholds[high - 1])
            relaxed = self.relax(peak, self.capacity - int(self.thresholds[low]))
            if relaxed is not None:
                found.append(max(0, math.ceil(relaxed[0]) + self.offset_ns))
        return min(found, default=None)

    def relax(self, peak: int, capacity: int) -> tuple[float, float] | None:
        """(bound, multiplier) without switching; None if nothing fits."""
        menus = [self.choices.menu(run.menu, peak, None) for run in self.runs]
        found = relax(menus, [run.length for run in self.runs], capacity)
        if found is None:
            return None
        slack = 1e-12 * (abs(found.bound) + found.multiplier * 2.0**44)
        return found.bound - slack, found.multiplier

    def solve(self, limit: int | None) -> Stage | None:
        best: Stage | None = None
        if limit is not None:
            limit -= self.offset_ns
        last = len(self.thresholds) - 1
        nodes = [(0, 0, last)] if last >= 0 else []  # bound, range of thresholds
        while nodes:
            bound, low, high = heapq.heappop(nodes)
            if limit is not None and bound >= limit:
                break
            peak = int(self.thresholds[high])
            answer = self.relaxed(peak, self.capacity - int(self.thresholds[low]), limit)
            if answer is None:
                continue
            at = int(np.searchsorted(self.thresholds, self.peak(answer)))
            if at == low or self.memory(answer) + self.thresholds[at] <= self.capacity:
                best, limit = answer, answer.time_ns
                continue
            heapq.heappush(nodes, (answer.time_ns, low, at - 1))
            heapq.heappush(nodes, (answer.time_ns, at, high))
        return best and replace(best, time_ns=best.time_ns + self.offset_ns)

    def relaxed(self, peak: int, capacity: int, limit: int | None) -> Stage | None:
        """The fastest below ``limit`` with transients up to ``peak`` within ``capacity``."""
        found = self.relax(peak, capacity)
        if found is None:
            return None
        base, multiplier = found
        best: Stage | None = None
        if limit is not None and base > limit - 1:
            return None
        for excess in self.excesses(peak, multiplier):
            search = PatternSearch(self.runs, excess, np.inf if limit is None else limit - 1 - base)
            for pattern in search.patterns():
                answer = self.fill(pattern, peak, capacity, limit)
                if answer is not None:
                    best, limit = answer, answer.time_ns
                    search.most = limit - 1 - base
        return best

    def excesses(self, peak: int, multiplier: float) -> Iterator[list[Floats]]:
        """[layouts] of every run, once for every choice of a layout by each tie."""
        by_menu: dict[int, Floats] = {}
        for index in {run.menu for run in self.runs}:
            costs = self.choices.costs[index]
            value = costs.time_ns + multiplier * costs.memory_bytes
            value = np.where(costs.transient_bytes <= peak, value, np.inf)
            least = np.full(self.tables.num_layouts, np.inf)
            np.minimum.at(least, costs.layout, value)
            by_menu[index] = least - least.min()
        layouts = range(self.tables.num_layouts)
        choices = [
            [q for q in layouts if self.choices.tied_menu(members, peak, q) is not None]
            for members in self.members.values()
        ]
        for chosen in product(*choices):
            fixed = dict(zip(self.members, chosen, strict=True))
            result = []
            for run in self.runs:
                excess = by_menu[run.menu]
                if run.tie >= 0:
                    only = np.arange(len(excess)) == fixed[run.tie]
                    excess = np.where(only, excess, np.inf)
                result.append(excess)
            yield result

    def fill(self, pattern: Pattern, peak: int, capacity: int, limit: int | None) -> Stage | None:
        switching = switching_ns(self.runs, pattern.walks)
        menus, counts = [], []
        for item, count in pattern.content:
            name, layouts = item
            if name[0] == "fold":
                menu: Menu | None = self.choices.folded_menu(item, peak)
            elif name[0] == "tie":
                menu = self.choices.tied_menu(self.members[name[1]], peak, layouts[0])
            else:
                menu = self.choices.menu(name[1], peak, layouts)
            assert menu is not None
            menus.append(menu)
            counts.append(count)
        found = fill(menus, counts, capacity, None if limit is None else limit - switching)
        if found is None:
            return None
        return Stage(found.time_ns + switching, self.spread(pattern, found.picks))

    def spread(self, pattern: Pattern, picks: Sequence[dict[int, int]]) -> tuple[int, ...]:
        """Options per layer: what the menus chose, alike options beside each other."""
        pools = {
            item: [option for option in sorted(chosen) for _ in range(chosen[option])]
            for (item, _), chosen in zip(pattern.content, picks, strict=True)
        }
        result: list[int] = []
        walks = pattern.walks
        for i, (run, walk) in enumerate(zip(self.runs, walks, strict=True)):
            if run.folded:
                after = walks[i + 1][0] if i + 1 < len(walks) else 0
                result.append(pools[folded_item(self.runs, walks, i, after)].pop())
                continue
            if run.tie >= 0:
                result.append(pools[(("tie", run.tie), walk)][0])
                continue
            name = ("run", run.menu)
            if len(walk) == 1:
                pool = pools[(name, walk)]
                result += [pool.pop() for _ in range(run.length)]
                continue
            free = run.length - len(walk)
            pool = pools[(name, tuple(sorted(set(walk))))] if free else []
            rest = [pool.pop() for _ in range(free)]
            for layout in walk:
                here = [pools[(name, (layout,))].pop()]
                here += [option for option in rest if self.tables.layout[option] == layout]
                rest = [option for option in rest if self.tables.layout[option] != layout]
                result += sorted(here)
        return tuple(result)

    def memory(self, stage: Stage) -> int:
        """Bytes without the transient peak."""
        return sum(self.of_layers(stage, "memory_bytes"))

    def peak(self, stage: Stage) -> int:
        return max(self.of_layers(stage, "transient_bytes"))

    def of_layers(self, stage: Stage, name: str) -> list[int]:
        result: list[int] = []
        for run in self.runs:
            costs = self.choices.costs[run.menu]
            options = stage.options[len(result) : len(result) + run.length]
            at = np.searchsorted(costs.options, options)
            result += getattr(costs, name)[at].tolist()
        return result
