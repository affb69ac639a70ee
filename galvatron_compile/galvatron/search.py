"""The exact optimum of Galvatron's space under Galvatron's own formulas, with the proof.

For one pipeline degree and number of micro-batches the step is r + max(0, max_i(S_i - ΣC_≤i)) (see
:mod:`.pricing`), where r rises with every C_i. So

- replacing every C_i by a lower bound (a linear relaxation) bounds a family of plans from below,
  and families are settled in order of that bound until it reaches the best plan found;
- counting only the first stage's unsynchronised gradients bounds it better: then every other stage
  takes its least C_i and the first minimises a maximum of linear functions of (C_0, S_0), both
  exact cells (:mod:`.cells`). Where later stages turn out to add nothing, that is the optimum;
- elsewhere all outcomes (C_i, S_i) of every stage that may still beat the best plan are enumerated
  (:mod:`.outcomes`), but only in spaces that may hold the optimum.

Times are whole picoseconds and memory whole units, so nothing is lost to rounding in between.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise

from galvatron_compile.galvatron.families import Candidate, FamilyProblem
from galvatron_compile.galvatron.formulas import Workload
from galvatron_compile.galvatron.labels import FEW_LABELS, MANY_LABELS, TooManyLabels
from galvatron_compile.galvatron.plans import layer_classes, layer_names
from galvatron_compile.galvatron.pricing import MemoryLimit, exposed_ms, pipeline_ms
from galvatron_compile.galvatron.space import Family, Space, spaces
from galvatron_compile.plans import Plan, Stage

IMPROVED = 3  # open families of a space whose plans are bettered stage by stage


@dataclass(frozen=True)
class Found:
    """A plan and its step."""

    plan: Plan
    step_ps: int


@dataclass(frozen=True)
class Outcome:
    """The best plan known of one space; None if none fits.

    bound_ps: no plan of the space is faster. least_units: the least memory of the fullest stage
    that any plan of the space needs.
    """

    space: Space
    found: Found | None
    bound_ps: int
    least_units: int

    @property
    def is_exact(self) -> bool:
        return self.found is None or self.found.step_ps <= self.bound_ps

    def may_beat(self, step_ps: int) -> bool:
        """Whether its optimum is unknown and may be better than ``step_ps``."""
        return not self.is_exact and self.bound_ps < step_ps


def search(work: Workload, limit: MemoryLimit) -> list[Outcome]:
    """The optimum first, then the best plan known of every other space.

    A space is a pipeline degree and a number of micro-batches. Those that hold no plan within the
    limit come last, that which needs least first. What is known of another space is its optimum,
    or else ``bound_ps`` proves that its optimum is no better than the first; unless it ran out of
    labels: then its ``bound_ps`` is below the first's step and says how far the proof goes.
    """
    capacity = limit.plan_units
    outcomes = [best_of(work, space, capacity, prove=False) for space in spaces(work, limit)]
    settled: list[Outcome] = []
    while True:
        outcomes.sort(key=_rank)
        best = outcomes[0].found if outcomes else None
        if best is None:
            return outcomes
        doubtful = [o for o in outcomes if o not in settled and o.may_beat(best.step_ps)]
        if not doubtful:
            return outcomes
        first = min(doubtful, key=lambda o: o.bound_ps)
        proven = best_of(work, first.space, capacity, best.step_ps)
        both = [found for found in (proven.found, first.found) if found is not None]
        settled.append(replace(proven, found=min(both, key=lambda found: found.step_ps)))
        outcomes[outcomes.index(first)] = settled[-1]


def _rank(outcome: Outcome) -> tuple[int, int]:
    found = outcome.found
    return (0, found.step_ps) if found else (1, outcome.least_units)


@dataclass(frozen=True)
class _Open:
    """A family that may hold a plan faster than the one it was relaxed to."""

    bound_ps: int
    problem: FamilyProblem
    counts: list[tuple[int, ...]]


def best_of(
    work: Workload, space: Space, capacity: int, rival_ps: int | None = None, prove: bool = True
) -> Outcome:
    """The best plan of one space, settled family by family in order of their bounds.

    rival_ps: only plans faster than this are of interest. prove: settle families whose bound is
    below their best plan too.
    """
    families = [FamilyProblem(space, family, capacity) for family in space.families]
    least = min((problem.least_units() for problem in families), default=0)
    fitting = [problem for problem in families if problem.fits()]
    best: Candidate | None = None
    limit = rival_ps
    open_families: list[_Open] = []
    for lowest, problem in sorted(((p.bound_ps(), p) for p in fitting), key=lambda pair: pair[0]):
        if limit is not None and lowest >= limit:
            break
        relaxed = problem.solve_first(limit, MANY_LABELS if prove else FEW_LABELS)
        if relaxed is None:
            continue
        found = Candidate(problem.step_ps(relaxed.counts), relaxed.counts, problem.family)
        if found.step_ps > relaxed.bound_ps:
            open_families.append(_Open(relaxed.bound_ps, problem, relaxed.counts))
        best, limit = _better(best, found, limit)
    open_families.sort(key=lambda family: family.bound_ps)
    for family in open_families[:IMPROVED]:
        best, limit = _better(best, family.problem.improve(family.counts), limit)
    proven = limit if limit is not None else 0
    for family in open_families:
        if limit is None or family.bound_ps >= limit:
            break
        try:
            if not prove:
                raise TooManyLabels
            better = family.problem.enumerate(limit)
        except TooManyLabels:
            # Families of higher bounds cannot better the proof now.
            proven = min(proven, family.bound_ps)
            break
        if better is not None:
            best, limit = _better(best, better, limit)
    if limit is not None:
        proven = min(proven, limit)
    if best is None:
        return Outcome(space, None, proven, least)
    plan = _plan(work, space, best.family, best.counts)
    return Outcome(space, Found(plan, best.step_ps), proven, least)


def _better(best: Candidate | None, found: Candidate, limit: int | None) -> tuple[Candidate, int]:
    """The faster of two, and what a still better plan must be below."""
    best = found if best is None or found.step_ps < best.step_ps else best
    return best, best.step_ps if limit is None else min(limit, best.step_ps)


def uniform(work: Workload, space: Space, capacity: int) -> Found | None:
    """The best plan of one strategy for all layers, embedding and head with it; None if none fits.

    What Galvatron calls its coarse-grained mode.
    """
    best: tuple[int, Family, list[tuple[int, ...]]] | None = None
    by_strategy = {ends.strategy: ends for ends in space.ends}
    buffers = dict(space.buffers)
    for index, strategy in enumerate(space.strategies):
        ends = by_strategy.get(replace(strategy, recompute="none"))
        if ends is None:
            continue
        units = buffers[strategy.tp] if strategy.tp > 1 else 0
        family = Family(ends, None, (index,), units)
        problem = FamilyProblem(space, family, capacity)
        if not problem.fits():
            continue
        c, s = space.unsynchronised_ps[index], space.synchronised_ps[index]
        both = list(zip(space.lengths, ends.time_ps, strict=True))
        stages = [length * c + end for length, end in both]
        exposed = exposed_ms(stages, [length * s for length in space.lengths])
        step = int(pipeline_ms(stages, space.chunks) + exposed)
        if best is None or step < best[0]:
            best = step, family, [(length,) for length in space.lengths]
    return Found(_plan(work, space, best[1], best[2]), best[0]) if best else None


def _plan(work: Workload, space: Space, family: Family, counts: Sequence[tuple[int, ...]]) -> Plan:
    """Layers of a stage in the order of the space's strategies; their order costs nothing."""
    layers = [
        space.strategies[index]
        for stage in counts
        for index, number in zip(family.allowed, stage, strict=True)
        for _ in range(number)
    ]
    edges = [0, *(edge + 1 for edge in accumulate(space.lengths))]
    edges[-1] += 1
    stages = tuple(Stage(first, last) for first, last in pairwise(edges))
    return Plan(
        model="",
        world_size=work.num_gpus,
        global_batch_size=work.global_batch_size,
        num_micro_batches=space.chunks,
        layers=layer_names(work.num_layers),
        strategies=(family.ends.strategy, *layers, family.ends.strategy),
        stages=stages if space.pp > 1 else (),
        classes=layer_classes(work.num_layers),
    )
