"""The best plan of one family: exact stages only where the best partition wants them.

Stages start as lower bounds (:mod:`.bounds`). The partition of the least value under these bounds
(:mod:`.cuts`) bounds the family; its stages are solved exactly (:mod:`.stage`) and put in place of
the bounds. When all stages of the best partition are exact, no other partition can be better,
since the objective rises with the time of every stage.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from galvatron_compile.passes.pipeline.bounds import (
    FAR,
    Bounds,
    fastest_ns,
    quick_bound_ns,
    rows_of,
)
from galvatron_compile.passes.pipeline.closed_form import Evaluation, evaluate, even_boundaries
from galvatron_compile.passes.pipeline.cuts import Cutter, Partition
from galvatron_compile.passes.pipeline.problem import PipelineProblem
from galvatron_compile.passes.pipeline.ranges import ranges
from galvatron_compile.passes.pipeline.stage import Piece, Stage, StageSolver
from galvatron_compile.passes.pipeline.tables import Tables


@dataclass(frozen=True)
class Solution:
    """The optimum of a family.

    boundaries: edges of the stages, [stages + 1]; options: per layer, into strategies.
    total_ns: the step; group_ns, group_bytes: time and memory of every pipeline group.
    """

    problem: PipelineProblem
    boundaries: tuple[int, ...]
    options: tuple[int, ...]
    total_ns: int
    group_ns: tuple[int, ...]
    group_bytes: tuple[int, ...]

    @property
    def num_changes(self) -> int:
        """How often neighbouring layers of one stage differ in option."""
        inside = set(range(1, len(self.options))) - set(self.boundaries)
        return sum(self.options[i] != self.options[i - 1] for i in inside)


@dataclass(frozen=True)
class Infeasible:
    """smallest_bytes: the least capacity that would do; None if some layer has no option."""

    problem: PipelineProblem
    smallest_bytes: int | None
    reason: str


@dataclass(frozen=True)
class Bounded:
    """A family that cannot be among the best: nothing in it is faster than ``lower_bound_ns``."""

    problem: PipelineProblem
    lower_bound_ns: int


class Cuts:
    """Stages of a family without virtual stages: bounds that become exact times.

    times, sizes: [rows, signatures] nanoseconds and least bytes; exact: those that are solved.
    """

    def __init__(self, tables: Tables) -> None:
        self.found = ranges(tables.kinds)
        of_group = rows_of(tables)
        self.rows = sorted(set(of_group))
        self.row_of = [self.rows.index(row) for row in of_group]
        least_sum = int(fastest_ns(tables.problem).sum())
        self.cutter = Cutter(
            self.found, self.row_of, tables.objective, least_sum, tables.problem.uncut
        )
        bounds = Bounds(tables, self.found)
        self.sizes = np.stack([bounds.smallest(row) for row in self.rows])
        self.times = np.stack([bounds.times(row) for row in self.rows])
        self.times[self.sizes > tables.problem.capacity_bytes] = FAR
        self.exact: dict[tuple[int, int], Stage] = {}
        self.best: Partition | None = None
        self.stale = True

    def update(self) -> None:
        start = self.best and self.cutter.price(self.times, self.best.edges)
        self.best = self.cutter.best(self.times, start)
        self.stale = False

    def settle(self, key: tuple[int, int], stage: Stage | None) -> None:
        """The exact time of a stage; None: it cannot be."""
        self.stale = True
        if stage is None:
            self.times[key] = FAR
            return
        assert stage.time_ns >= self.times[key]
        self.exact[key] = stage
        self.times[key] = stage.time_ns

    def key(self, group: int, first: int, last: int) -> tuple[int, int]:
        return self.row_of[group], int(self.found.alike[last, last - first])

    def piece(self, group: int, first: int, last: int) -> Piece:
        row = self.rows[self.row_of[group]]
        return Piece(first, last, row.flight, row.sends_back, row.sends_next)


class FamilySearch:
    """Search of one family in rounds. ``bound_ns`` rises with every :meth:`advance` until
    ``verdict`` is there: then it is the optimum, or the family is infeasible."""

    def __init__(self, problem: PipelineProblem) -> None:
        self.problem = problem
        self.verdict: Solution | Infeasible | None = None
        missing = {k for k in set(problem.layers) if not problem.costs.allowed[k].any()}
        if missing:
            names = ", ".join(map(str, sorted(missing)))
            reason = f"no option is allowed for layer class {names}"
            self.verdict = Infeasible(problem, None, reason)
        elif problem.family.virtual > 1 and not problem.uncut.isdisjoint(
            even_boundaries(len(problem.layers), problem.family.num_stages)
        ):
            reason = "interleaved stages are of equal length and would cut what must stay together"
            self.verdict = Infeasible(problem, None, reason)
        self.bound_ns = 0 if self.verdict else quick_bound_ns(problem)

    def advance(self) -> None:
        """One round more."""
        if self.tables.chunks is not None:
            self.solve_next_group()
        else:
            self.solve_best_partition()
        if self.verdict is not None:  # a search holds many families; keep only what they say
            for name in ("cuts", "solver", "tables", "groups"):
                self.__dict__.pop(name, None)

    @cached_property
    def tables(self) -> Tables:
        return Tables(self.problem)

    @cached_property
    def solver(self) -> StageSolver:
        return StageSolver(self.tables)

    @cached_property
    def cuts(self) -> Cuts:
        return Cuts(self.tables)

    @cached_property
    def groups(self) -> list[Stage | int | None]:
        """Interleaved: what is known of every group's time; first bounds, then its options."""
        return [self.solver.bound(self.chunk_pieces(g)) for g in range(self.problem.family.pp)]

    def solve_next_group(self) -> None:
        """Interleaved: every group's layers are given, so groups are solved one by one."""
        fresh = "groups" not in self.__dict__
        groups = self.groups
        pieces = [self.chunk_pieces(g) for g in range(len(groups))]
        if not fresh:
            g = next(g for g, known in enumerate(groups) if isinstance(known, int))
            groups[g] = self.solver.solve(pieces[g])
        if None in groups:
            self.verdict = self.infeasible([self.solver.smallest(each) for each in pieces])
            return
        stages = [known for known in groups if isinstance(known, Stage)]
        if len(stages) == len(groups):
            self.verdict = self.solution(pieces, stages)
            return
        times = [known.time_ns if isinstance(known, Stage) else known or 0 for known in groups]
        self.raise_bound(self.tables.objective.value(sum(times), max(times)))

    def raise_bound(self, value: int) -> None:
        self.bound_ns = max(self.bound_ns, self.tables.objective.total_ns(value))

    def chunk_pieces(self, group: int) -> list[Piece]:
        assert self.tables.chunks is not None
        num_layers = self.tables.num_layers
        return [
            Piece(first, last, flight, first > 0, last < num_layers)
            for (first, last), flight in zip(
                self.tables.chunks[group], self.tables.flights[group], strict=True
            )
        ]

    def solve_best_partition(self) -> None:
        """Bound by the best partition; if the bound stays, solve the stages it chose."""
        cuts = self.cuts
        if cuts.stale:
            cuts.update()
            if cuts.best is None:
                self.verdict = self.infeasible([self.smallest_capacity()])
            else:
                self.raise_bound(cuts.best.value)
            return
        assert cuts.best is not None
        edges = cuts.best.edges
        keys = [cuts.key(g, *edges[g : g + 2]) for g in range(len(edges) - 1)]
        pieces = [[cuts.piece(g, *edges[g : g + 2])] for g in range(len(edges) - 1)]
        unknown = {
            key: piece for key, piece in zip(keys, pieces, strict=True) if key not in cuts.exact
        }
        for key, piece in unknown.items():
            cuts.settle(key, self.solver.solve(piece))
        if not unknown:
            self.verdict = self.solution(pieces, [cuts.exact[key] for key in keys])

    def smallest_capacity(self) -> int | None:
        """The least capacity of any partition; ties are looked into where they are chosen."""
        cuts = self.cuts
        sizes = cuts.sizes.copy()
        looked: set[tuple[int, int]] = set()
        while True:
            best = cuts.cutter.lowest_peak(sizes)
            if best is None:
                return None
            size, edges = best
            before = len(looked)
            for g in range(len(edges) - 1):
                key = cuts.key(g, *edges[g : g + 2])
                if key not in looked:
                    looked.add(key)
                    tied = self.solver.smallest([cuts.piece(g, *edges[g : g + 2])])
                    sizes[key] = FAR if tied is None else tied
            if len(looked) == before:
                return size

    def infeasible(self, smallest: list[int | None]) -> Infeasible:
        if any(size is None for size in smallest):
            reason = "tied layers have no option in common"
            if self.problem.uncut:
                reason += ", or no partition keeps together what must be"
            return Infeasible(self.problem, None, reason)
        needed = max(size for size in smallest if size is not None)
        reason = f"needs {needed} bytes a rank, {self.problem.capacity_bytes} are there"
        return Infeasible(self.problem, needed, reason)

    def solution(self, pieces: list[list[Piece]], stages: list[Stage]) -> Solution:
        options = np.zeros(self.tables.num_layers, dtype=np.int64)
        edges = {0}
        for group, stage in zip(pieces, stages, strict=True):
            at = 0
            for piece in group:
                length = piece.last - piece.first
                options[piece.first : piece.last] = stage.options[at : at + length]
                at += length
                edges.add(piece.last)
        chosen = tuple(options.tolist())
        boundaries = tuple(sorted(edges))
        price: Evaluation = evaluate(self.problem, boundaries, chosen)
        assert list(price.group_ns) == [stage.time_ns for stage in stages]
        assert max(price.group_bytes) <= self.problem.capacity_bytes
        return Solution(self.problem, boundaries, chosen, *price)
