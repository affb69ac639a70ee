"""One family of plans of a space as a pipeline of cells: bounded, settled, bettered."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from galvatron_compile.galvatron.cells import bound, solve
from galvatron_compile.galvatron.labels import Answer, Cell, Function, Option
from galvatron_compile.galvatron.outcomes import best_combination, improved, step_ps
from galvatron_compile.galvatron.pricing import pipeline_ms
from galvatron_compile.galvatron.space import Family, Space


@dataclass(frozen=True)
class Candidate:
    step_ps: int
    counts: list[tuple[int, ...]]
    family: Family


@dataclass(frozen=True)
class RelaxedPlan:
    """No plan of a family is faster than bound_ps; counts: layers by strategy of every stage."""

    bound_ps: int
    counts: list[tuple[int, ...]]


class FamilyProblem:
    """One family of a space as one cell a stage."""

    def __init__(self, space: Space, family: Family, capacity: int) -> None:
        self.space, self.family = space, family
        self.ends_ps = family.ends.time_ps
        self.chunks = space.chunks
        self.cells = []
        self.spent = []
        for length, units, ends in zip(space.lengths, space.units, family.ends.units, strict=True):
            options = tuple(
                Option(space.unsynchronised_ps[i], space.synchronised_ps[i], units[i])
                for i in family.allowed
            )
            spent = ends + family.buffer_units
            self.cells.append(Cell(options, length, capacity - spent))
            self.spent.append(spent)

    def fits(self) -> bool:
        return all(cell.fits() for cell in self.cells)

    def least_units(self) -> int:
        both = zip(self.cells, self.spent, strict=True)
        return max(cell.least_weight() + spent for cell, spent in both)

    def bound_ps(self) -> int:
        lowest = [
            ends + bound(cell, [(1, 0, 0)])
            for cell, ends in zip(self.cells, self.ends_ps, strict=True)
        ]
        return int(pipeline_ms(lowest, self.chunks))

    def solve_first(self, limit: int | None, most_labels: int) -> RelaxedPlan | None:
        """Count only the first stage's gradients.

        None if it is proven that no plan is below ``limit``.
        """
        rest = []
        for cell in self.cells[1:]:
            answer = solve(cell, [(1, 0, 0)], None, most_labels)
            assert answer is not None
            rest.append(answer)
        first = solve(self.cells[0], self._functions(rest), limit, most_labels)
        if first is None:
            return None
        return RelaxedPlan(first.bound, [first.counts, *(answer.counts for answer in rest)])

    def step_ps(self, counts: Sequence[tuple[int, ...]]) -> int:
        """The whole step."""
        return step_ps(self.cells, self.ends_ps, self.chunks, counts)

    def improve(self, counts: Sequence[tuple[int, ...]]) -> Candidate:
        better = improved(self.cells, self.ends_ps, self.chunks, counts)
        return Candidate(self.step_ps(better), better, self.family)

    def enumerate(self, limit: int) -> Candidate | None:
        """The best plan below ``limit``, from all outcomes that may be part of one.

        Raises TooManyLabels if that cannot be settled within reason.
        """
        found = best_combination(self.cells, self.ends_ps, self.chunks, limit)
        return Candidate(*found, self.family) if found else None

    def _functions(self, rest: Sequence[Answer]) -> list[Function]:
        """The step as a maximum of functions of the first stage's sums of layers."""
        pp, chunks, own = len(self.cells), self.chunks, self.ends_ps[0]
        others = [a.bound + ends for a, ends in zip(rest, self.ends_ps[1:], strict=True)]
        if pp == 1:
            pipeline = [(chunks, 0, chunks * own)]
        else:
            drained = chunks + 1 - pp
            pipeline = [
                (1, 0, own + sum(others) + (chunks - 1) * others[-1]),
                (pp - 1 + drained, 0, (pp - 1 + drained) * own),
                (drained, 0, drained * own + sum(others)),
            ]
        # … and with S_0 - C_0 on top.
        return [*pipeline, *((a - 1, 1, g - own) for a, _, g in pipeline)]
