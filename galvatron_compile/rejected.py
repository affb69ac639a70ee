"""Why families of plans lost: other pipeline degrees, and the best plan without what it uses."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np

from galvatron_compile.passes.pipeline.problem import PipelineProblem
from galvatron_compile.passes.pipeline.searcher import Outcome, search
from galvatron_compile.planned import GIB
from galvatron_compile.strategy import Strategy

FEATURES: tuple[tuple[str, Callable[[Strategy], bool]], ...] = (
    ("tensor parallel", lambda s: s.tp > 1),
    ("sequence parallel", lambda s: s.sequence_parallel),
    ("Ulysses", lambda s: s.ulysses > 1),
    ("context parallel", lambda s: s.cp > 1),
    ("expert parallel", lambda s: s.ep > 1),
    ("ZeRO-3", lambda s: s.zero == 3),
    ("ZeRO", lambda s: s.zero > 0),
    ("full recompute", lambda s: s.recompute == "full"),
    ("recompute", lambda s: s.recompute != "none"),
)


def why_families_lost(
    problems: list[PipelineProblem], outcome: Outcome, reserve_bytes: int
) -> list[tuple[str, str]]:
    """(family, reason): every other pipeline degree, then what the best plan would lose without
    each feature that it uses, in its own pipeline."""
    best = outcome.solved[0]
    found = [
        (f"pp={pp}", _why_degree(pp, outcome, reserve_bytes))
        for pp in sorted({problem.family.pp for problem in problems})
        if pp != best.problem.family.pp
    ]
    return found + list(_without(best.problem, best.total_ns, best.options, reserve_bytes))


def _why_degree(pp: int, outcome: Outcome, reserve_bytes: int) -> str:
    best_ns = outcome.solved[0].total_ns
    solved = [s.total_ns for s in outcome.solved if s.problem.family.pp == pp]
    bounds = [b.lower_bound_ns for b in outcome.bounded if b.problem.family.pp == pp]
    if solved and (not bounds or min(solved) <= min(bounds)):
        return f"{100 * (min(solved) / best_ns - 1):.1f} % slower at best"
    if bounds or solved:
        least = min([*solved, *bounds])
        return f"at least {100 * (least / best_ns - 1):.1f} % slower (lower bound)"
    needs = [
        found.smallest_bytes
        for found in outcome.infeasible
        if found.problem.family.pp == pp and found.smallest_bytes is not None
    ]
    if needs:
        return f"does not fit: needs {(min(needs) + reserve_bytes) / GIB:.1f} GiB a rank at least"
    return "no strategy divides the batch, the heads and the ranks of a stage"


def _without(
    problem: PipelineProblem, best_ns: int, options: tuple[int, ...], reserve_bytes: int
) -> Iterator[tuple[str, str]]:
    strategies = problem.costs.strategies
    used = {strategies[option] for option in options}
    for name, has in FEATURES:
        if not any(map(has, used)):
            continue
        keep = np.array([not has(strategy) for strategy in strategies])
        costs = replace(problem.costs, allowed=problem.costs.allowed & keep)
        outcome = search([replace(problem, costs=costs)], 1)
        if outcome.solved:
            slower = 100 * (outcome.solved[0].total_ns / best_ns - 1)
            yield f"without {name}", f"{slower:.1f} % slower in the same pipeline"
        else:
            needs = [f.smallest_bytes for f in outcome.infeasible if f.smallest_bytes is not None]
            yield (
                f"without {name}",
                f"does not fit: needs {(min(needs) + reserve_bytes) / GIB:.1f} GiB a rank at least"
                if needs
                else "some layer cannot run",
            )
