"""What a search found, priced and explained: the outcome of plan() as a Planned."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

from galvatron_compile import notation, work_json
from galvatron_compile.baselines import BASELINES, Priced, price_baselines
from galvatron_compile.cluster import ClusterProfile
from galvatron_compile.passes.order import order
from galvatron_compile.passes.pipeline.family import Solution
from galvatron_compile.passes.pipeline.problem import PipelineProblem
from galvatron_compile.passes.pipeline.searcher import Outcome, search
from galvatron_compile.planned import GIB, Alternative, Planned, biggest_difference
from galvatron_compile.plans import Plan, Stage
from galvatron_compile.prediction import CAUSES
from galvatron_compile.rejected import why_families_lost
from galvatron_compile.simulator import simulate
from galvatron_compile.study import Study, peak_flops_per_s

SIMULATED_ACTIONS = 1 << 15
"""Layers × micro-batches up to which a plan is also simulated, action by action (a second or two:
a layer is several actions in every micro-batch)."""


def report(
    study: Study,
    problems: list[PipelineProblem],
    outcome: Outcome,
    top: int,
    *,
    costs_s: float,
    search_s: float,
) -> Planned:
    """The outcome with names, prices by cause, baselines, and why the others lost."""
    candidates = [Candidate(s, predicted(study, plan_of(study, s))) for s in outcome.solved[:top]]
    unfit: list[tuple[str, str]] = []
    for name, (fastest, smallest) in price_baselines(problems).items():
        if fastest is not None:
            plain = _uniform(fastest)
            candidates.append(Candidate(plain, predicted(study, plan_of(study, plain)), name))
        elif smallest is not None:
            needed = smallest.memory_bytes + study.memory_bytes - study.pricer.capacity_bytes
            unfit.append((name, f"needs {needed / GIB:.1f} GiB a rank at least"))
        else:
            unfit.append((name, "no such plan within the constraints, ranks, heads and batch"))
    candidates, ranking = ranked(candidates)
    chosen, best = candidates[0].solution, candidates[0].plan
    others = [Alternative(c.plan, _why(c.plan, best), c.name) for c in candidates]
    alternatives = tuple(other for other in others if not other.name and other.plan is not best)
    baselines = sorted(
        (other for other in others if other.name),
        key=lambda other: [b.name for b in BASELINES].index(other.name),
    )
    rejected = _rejected(problems, outcome, chosen, candidates, study)
    extra = {
        "ranking": ranking,
        "alternatives": [_record(other, best) for other in alternatives],
        "baselines": [_record(other, best) for other in baselines]
        + [{"name": name, "step_ms": None, "why": why} for name, why in unfit],
        "rejected": [{"family": family, "why": why} for family, why in rejected],
    }
    best = replace(best, predicted={**best.predicted, **extra})
    return Planned(
        plan=best,
        memory_limit_bytes=study.memory_bytes,
        alternatives=alternatives,
        baselines=tuple(baselines),
        unfit_baselines=tuple(unfit),
        rejected=tuple(rejected),
        constraints=str(study.constraints),
        search_s=search_s,
        costs_s=costs_s,
    )


@dataclass(frozen=True)
class Candidate:
    """A plan with its prices, and what it is of a search. name: of a baseline."""

    solution: Solution
    plan: Plan
    name: str = ""

    @property
    def over_bytes(self) -> int:
        return over_bytes(self.plan)


def over_bytes(plan: Plan) -> int:
    """By how much the simulator sees a rank exceed the limit; 0 where it keeps it or knows not."""
    groups = plan.predicted.get("simulated", {}).get("groups", ())
    peak = max((group["peak_bytes"] for group in groups), default=0)
    return max(0, peak - int(plan.predicted["memory_limit_bytes"]))


def ranked(candidates: Sequence[Candidate]) -> tuple[list[Candidate], str]:
    """The best plans of the closed form, and baselines behind them, in the order in which the
    simulator sees them; and a sentence that says so.

    A plan that the simulator sees exceed the limit comes after those that keep it. Nothing changes
    where a plan is too large to be simulated.
    """
    for candidate in candidates:
        if "simulated_ms" not in candidate.plan.predicted:
            why = candidate.plan.predicted["not_simulated"]
            return list(candidates), f"ranked by the closed form alone, not simulated: {why}"
    found = sorted(candidates, key=lambda c: (c.over_bytes > 0, c.plan.predicted["simulated_ms"]))
    few = sum(not candidate.name for candidate in candidates)
    text = f"ranked by simulation: the best {few} of the closed form, and the baselines"
    place = next(place for place, c in enumerate(candidates, 1) if c is found[0])
    if found[0].name:
        text += f"; the baseline {found[0].name} is the best there"
    elif place > 1:
        text += f"; number {place} of the closed form is the best there"
    if found[0].over_bytes:
        text += f"; all exceed the limit for a moment, this by {_gib(found[0].over_bytes)}"
    return found, text


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / GIB:.2f} GiB"


def _uniform(found: Priced) -> Solution:
    options = (found.option,) * len(found.problem.layers)
    return Solution(found.problem, found.boundaries, options, *found.evaluation)


def _rejected(
    problems: list[PipelineProblem],
    outcome: Outcome,
    chosen: Solution,
    candidates: Sequence[Candidate],
    study: Study,
) -> list[tuple[str, str]]:
    """Why other families lost: by the closed form, and by simulation where that decided."""
    reserve_bytes = study.memory_bytes - study.pricer.capacity_bytes
    same = next((s for s in outcome.solved if s.problem is chosen.problem), chosen)
    others = tuple(s for s in outcome.solved if s is not same)
    found = why_families_lost(problems, replace(outcome, solved=(same, *others)), reserve_bytes)
    if chosen is outcome.solved[0]:
        return found
    best_ms = candidates[0].plan.predicted["simulated_ms"]
    by_simulation: dict[str, str] = {}
    for candidate in candidates[1:]:
        slower = 100 * (candidate.plan.predicted["simulated_ms"] / best_ms - 1)
        text = f"{slower:.1f} % slower in simulation"
        if candidate.over_bytes:
            text = f"exceeds the limit by {_gib(candidate.over_bytes)} in simulation"
        by_simulation.setdefault(f"pp={candidate.plan.pp}", text)
    return [(family, by_simulation.get(family, why)) for family, why in found]


def plan_of(study: Study, solution: Solution) -> Plan:
    problem, edges, options = solution.problem, solution.boundaries, solution.options
    family = problem.family
    stages = tuple(Stage(a, b) for a, b in pairwise(edges))
    return Plan(
        model="",
        world_size=study.cluster.world_size,
        global_batch_size=study.global_batch_size,
        num_micro_batches=family.num_micro_batches,
        layers=study.layer_names,
        strategies=tuple(problem.costs.strategies[option] for option in options),
        stages=stages if len(stages) > 1 else (),
        schedule=family.schedule,
        virtual=family.virtual,
        classes=study.class_names,
    )


def predicted(study: Study, given: Plan) -> Plan:
    """``given`` with all that is expected of it."""
    numbers = study.pricer.predict(given)
    seconds = numbers["step_ms"] / 1e3
    peak, basis = peak_flops_per_s(study.cluster)
    flops = 3 * study.pricer.forward_flops_per_sample() * study.global_batch_size
    causes: Mapping[str, float] = numbers["causes"]
    most = max(causes, key=lambda key: causes[key])
    share = 100 * causes[most] / numbers["step_ms"]
    numbers |= {
        "memory_limit_bytes": study.memory_bytes,
        "tokens_per_s": study.global_batch_size * study.model.seq / seconds,
        "samples_per_s": study.global_batch_size / seconds,
        "mfu": flops / (seconds * study.cluster.world_size * peak),
        "mfu_basis": basis,
        "model_name": study.model.name,
        "seq": study.model.seq,
        "hardware": f"{study.cluster.name} ({study.cluster.world_size} ranks)",
        "bound_by": f"{CAUSES[most]} of stage {numbers['slowest_group']} ({share:.0f} %)",
        "warnings": warnings_of(study.cluster),
        "alternatives": [],
        "baselines": [],
        "rejected": [],
        "ranking": "",
    }
    return replace(given, predicted={**numbers, **simulated(study, given)})


def simulated(study: Study, given: Plan) -> dict[str, Any]:
    """Parts of ``predicted``: what walking the lists that ranks follow gives, and the work that
    was walked; or why it was not."""
    from galvatron_compile.passes.plan_prices import family_of
    from galvatron_compile.passes.stage_work import stage_work

    size = len(given.layers) * given.num_micro_batches
    if size > SIMULATED_ACTIONS:
        return {
            "not_simulated": f"{len(given.layers)} layers × {given.num_micro_batches} "
            f"micro-batches, of which {SIMULATED_ACTIONS} are simulated at most"
        }
    pricer, family = study.pricer, family_of(given)
    costs = pricer.costs_for(family, given.world_size // given.pp, given.global_batch_size)
    outlines, works = stage_work(costs, pricer.switches, given)
    found = simulate(outlines, [order(outline) for outline in outlines], works)
    return {
        "simulated_ms": found.step_ms,
        "simulated": found.summary(),
        work_json.KEY: work_json.dump(outlines, works),
    }


def _why(other: Plan, best: Plan) -> str:
    text = biggest_difference(other.predicted, best.predicted)
    over = over_bytes(other)
    return f"{text}; {_gib(over)} over the limit in simulation" if over else text


def _record(other: Alternative, best: Plan) -> dict[str, Any]:
    return {
        "name": other.name,
        "notation": notation.format(other.plan),
        "step_ms": other.plan.predicted["step_ms"],
        "memory_bytes": other.plan.predicted["memory_bytes"],
        "simulated_ms": other.plan.predicted.get("simulated_ms"),
        "behind_percent": behind_percent(other.plan, best),
        "why": other.why,
    }


def behind_percent(other: Plan, best: Plan) -> float:
    """By simulation where both were simulated, which is what plans are ranked by."""
    both = all("simulated_ms" in plan.predicted for plan in (other, best))
    key = "simulated_ms" if both else "step_ms"
    return 100 * (float(other.predicted[key]) / float(best.predicted[key]) - 1)


def infeasible(study: Study, outcome: Outcome) -> str:
    """What to say when no plan fits: the smallest limit that would do."""
    reserve = study.memory_bytes - study.pricer.capacity_bytes
    needs = [found for found in outcome.infeasible if found.smallest_bytes is not None]
    if not needs:
        under = f" under the constraints ({study.constraints})" if str(study.constraints) else ""
        why = sorted({found.reason for found in outcome.infeasible})[:2]
        return (
            f"no strategy runs every layer{under}: {'; '.join(why)}; change the batch size, or "
            "relax a constraint"
        )
    least = min(needs, key=lambda found: found.smallest_bytes or 0)
    needed = (least.smallest_bytes or 0) + reserve
    return (
        f"no plan fits in {study.memory_bytes / GIB:.1f} GiB a rank; the smallest limit that would "
        f"do is {needed / GIB:.2f} GiB ({needed} bytes, {reserve / GIB:.1f} GiB of them the "
        f"framework's), with {least.problem.family}; raise the limit, use more ranks or a smaller "
        "batch"
    )


def warnings_of(cluster: ClusterProfile) -> list[str]:
    from galvatron_compile.cluster_text import warning

    text = warning(cluster)
    return [text] if text else []


def with_curve(study: Study, problems: list[PipelineProblem], found: Planned) -> Planned:
    """The best step at other memory limits beside it, from what barely fits to what binds not."""
    points = []
    reserve = study.memory_bytes - study.pricer.capacity_bytes
    for share in (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.25, 1.5):
        limit = int(study.memory_bytes * share)
        if limit <= reserve:
            continue
        outcome = search([replace(p, capacity_bytes=limit - reserve) for p in problems], 1)
        if outcome.solved:
            best = outcome.solved[0]
            text = notation.format(plan_of(study, best))
            step_ms = best.total_ns / 1e6
            points.append({"memory_bytes": limit, "step_ms": step_ms, "notation": text})
    numbers = {**found.plan.predicted, "tradeoff": points}
    return replace(found, plan=replace(found.plan, predicted=numbers))
