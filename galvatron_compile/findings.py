"""What a search found, priced and explained: the outcome of plan() as a Planned."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

from galvatron_compile import notation
from galvatron_compile.baselines import price_baselines
from galvatron_compile.cluster import ClusterProfile
from galvatron_compile.passes.pipeline.family import Solution
from galvatron_compile.passes.pipeline.problem import PipelineProblem
from galvatron_compile.passes.pipeline.searcher import Outcome, search
from galvatron_compile.planned import GIB, Alternative, Planned, biggest_difference
from galvatron_compile.plans import Plan, Stage
from galvatron_compile.prediction import CAUSES
from galvatron_compile.rejected import why_families_lost
from galvatron_compile.study import Study, peak_flops_per_s
from galvatron_compile.timeline import simulate

SIMULATED_ACTIONS = 1 << 15
"""Stages × micro-batches up to which a plan is also simulated, action by action (a second)."""


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
    best, *others = [predicted(study, plan_of(study, s)) for s in outcome.solved[:top]]
    alternatives = tuple(Alternative(p, _why(p, best)) for p in others)
    baselines: list[Alternative] = []
    unfit: list[tuple[str, str]] = []
    for name, (fastest, smallest) in price_baselines(problems).items():
        if fastest is not None:
            options = [fastest.option] * len(fastest.problem.layers)
            plain = _plan(study, fastest.problem, fastest.boundaries, options)
            priced = predicted(study, plain)
            baselines.append(Alternative(priced, _why(priced, best), name))
        elif smallest is not None:
            needed = smallest.memory_bytes + study.memory_bytes - study.pricer.capacity_bytes
            unfit.append((name, f"needs {needed / GIB:.1f} GiB a rank at least"))
        else:
            unfit.append((name, "no such plan within the constraints, ranks, heads and batch"))
    reserve_bytes = study.memory_bytes - study.pricer.capacity_bytes
    rejected = why_families_lost(problems, outcome, reserve_bytes)
    extra = {
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


def plan_of(study: Study, solution: Solution) -> Plan:
    return _plan(study, solution.problem, solution.boundaries, solution.options)


def _plan(
    study: Study, problem: PipelineProblem, edges: tuple[int, ...], options: Sequence[int]
) -> Plan:
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
    }
    priced = replace(given, predicted=numbers)
    if given.pp == 1 or given.num_stages * given.num_micro_batches > SIMULATED_ACTIONS:
        return priced
    simulated_ms = simulate(priced).total_ms
    return replace(given, predicted={**numbers, "simulated_ms": simulated_ms})


def _why(other: Plan, best: Plan) -> str:
    return biggest_difference(other.predicted, best.predicted)


def _record(other: Alternative, best: Plan) -> dict[str, Any]:
    best_ms = float(best.predicted["step_ms"])
    return {
        "name": other.name,
        "notation": notation.format(other.plan),
        "step_ms": other.plan.predicted["step_ms"],
        "memory_bytes": other.plan.predicted["memory_bytes"],
        "simulated_ms": other.plan.predicted.get("simulated_ms"),
        "behind_percent": other.behind_percent(best_ms),
        "why": other.why,
    }


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
