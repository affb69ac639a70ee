"""The best plans over many families: best first, so that most families are never solved.

A family waits with a lower bound. The one with the smallest bound works a round, which raises its
bound or settles it; a settled family that comes up again is the next best of all. When ``top``
have come up, the bounds of those still waiting prove that they are not better.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

from galvatron_compile.errors import PlanError
from galvatron_compile.passes.pipeline.family import Bounded, FamilySearch, Infeasible, Solution
from galvatron_compile.passes.pipeline.problem import PipelineProblem


@dataclass(frozen=True)
class Outcome:
    """Every family is in one of the three. solved: the best first; ties go to fewer stages, then
    to fewer changes of option, then to the family that was given first."""

    solved: tuple[Solution, ...]
    bounded: tuple[Bounded, ...]
    infeasible: tuple[Infeasible, ...]

    @property
    def best(self) -> Solution | None:
        return self.solved[0] if self.solved else None


def search(problems: Sequence[PipelineProblem], top: int = 1) -> Outcome:
    """The ``top`` best families with their optima, proven; see the module.

    Families that were solved on the way and lost are among ``solved`` too. A family that its bound
    excludes is not looked into further, so it may be infeasible as well.
    """
    if top < 1:
        raise PlanError(f"top must be at least 1, got {top}")
    families = [FamilySearch(problem) for problem in problems]
    waiting = [_rank(family, index) for index, family in enumerate(families)]
    heapq.heapify(waiting)
    num_best = 0
    while waiting and num_best < top:
        *_, index = heapq.heappop(waiting)
        family = families[index]
        if isinstance(family.verdict, Infeasible):
            continue
        if family.verdict is not None:
            num_best += 1
            continue
        family.advance()
        heapq.heappush(waiting, _rank(family, index))
    ranked = sorted(_rank(family, index) for index, family in enumerate(families))
    verdicts = [families[index].verdict for *_, index in ranked]
    solved = tuple(verdict for verdict in verdicts if isinstance(verdict, Solution))
    infeasible_ones = tuple(verdict for verdict in verdicts if isinstance(verdict, Infeasible))
    bounded = tuple(
        Bounded(families[index].problem, families[index].bound_ns)
        for *_, index in ranked
        if families[index].verdict is None
    )
    return Outcome(solved, bounded, infeasible_ones)


def _rank(family: FamilySearch, index: int) -> tuple[int, int, int, int]:
    """Time, stages, changes; a family that is not settled might still tie with any changes."""
    stages = family.problem.family.num_stages
    if isinstance(family.verdict, Solution):
        return family.verdict.total_ns, stages, family.verdict.num_changes, index
    return family.bound_ns, stages, -1, index
