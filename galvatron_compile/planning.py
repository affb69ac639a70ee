"""plan: a model and a cluster in, the fastest pipeline of layers and strategies out.

Read :func:`plan`: capture → shard → price → search → report. Nothing runs; a laptop will do.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from galvatron_compile import notation
from galvatron_compile.baselines import price_baselines
from galvatron_compile.cluster import ClusterProfile
from galvatron_compile.constraints import Constraints
from galvatron_compile.errors import InfeasibleError, PlanError, ShapeError
from galvatron_compile.passes.pipeline.family import Solution
from galvatron_compile.passes.pipeline.problem import PipelineProblem
from galvatron_compile.passes.pipeline.searcher import Outcome, search
from galvatron_compile.planned import GIB, Alternative, Planned, biggest_difference
from galvatron_compile.plans import Plan, Stage
from galvatron_compile.prediction import CAUSES
from galvatron_compile.rejected import why_families_lost
from galvatron_compile.study import Say, Study, peak_flops_per_s

if TYPE_CHECKING:
    from galvatron_compile.models import Workable


def plan(
    model: str | Workable | Study,
    cluster: ClusterProfile | str,
    *,
    global_batch_size: int,
    seq: int | None = None,
    memory_bytes: int | None = None,
    precision: str | None = "bf16",
    constraints: str | Constraints = "",
    top: int = 5,
    curve: bool = False,
    certify: bool = False,
    say: Say = lambda text: None,
) -> Planned:
    """The optimum of the closed form in passes.pipeline.closed_form over the whole space.

    Args:
        model: ``llama3-70b`` and other built-in names, a Hugging Face config, or
            ``package.module:callable`` (see :func:`galvatron_compile.models.load_model`); or the
            study of an earlier search (:class:`galvatron_compile.study.Study`), which captures
            and prices nothing again.
        cluster: a profile, or the name of a preset (``128x8xH100``).
        global_batch_size: samples of one optimizer step over all ranks.
        seq: tokens of a sample, for models by name.
        memory_bytes: of a rank, the framework's reserve included; the device's if not given.
        precision: None, ``"fp32"`` or ``"bf16"`` (with fp32 masters).
        constraints: what must hold, see :mod:`galvatron_compile.constraints`.
        top: how many plans are wanted, the best included.
        curve: also find the best plan at other memory limits, for ``explain``.
        certify: also solve the best plan's pipeline as a MILP by HiGHS, and say what it found.
        say: called with what is being done.

    Raises GalvatronError: nothing fits (with the smallest limit that would do), the constraints
    contradict each other, or the model cannot be captured.
    """
    start = time.process_time()
    study = _study(
        model, cluster, seq, global_batch_size, memory_bytes, precision, constraints, say
    )
    say("pricing every distinct layer under every strategy")
    problems = study.problems()
    costs_s = time.process_time() - start
    say(f"searching {len(problems)} pipelines")
    start = time.process_time()
    outcome = search(problems, top)
    search_s = time.process_time() - start
    if not outcome.solved:
        raise InfeasibleError(_infeasible(study, outcome))
    found = report(study, problems, outcome, costs_s=costs_s, search_s=search_s)
    if curve:
        say("searching at other memory limits")
        found = with_curve(study, problems, found)
    if certify:
        from galvatron_compile.passes.pipeline.certify import certify as certified

        say("certifying the best plan's pipeline with HiGHS")
        best = outcome.solved[0]
        found = replace(found, certificate=str(certified(best.problem, best)))
    return found


def price(
    text: str | Plan,
    model: str | Workable | Study,
    cluster: ClusterProfile | str,
    *,
    global_batch_size: int,
    seq: int | None = None,
    memory_bytes: int | None = None,
    precision: str | None = "bf16",
    say: Say = lambda text: None,
) -> Plan:
    """A given plan (an object, or the compact notation) with ``predicted`` filled in.

    Arguments and errors as :func:`plan`; PlanError where a layer cannot run with its strategy.
    """
    study = _study(model, cluster, seq, global_batch_size, memory_bytes, precision, "", say)
    if isinstance(text, Plan):
        given = named_as(text, study.layer_names)
        given.check_model(
            given.model, len(study.layer_names), study.cluster.world_size, global_batch_size
        )
    else:
        ranks = study.cluster.world_size
        given = notation.parse(text, study.layer_names, ranks, global_batch_size)
    return predicted(study, given)


def named_as(given: Plan, layer_names: tuple[str, ...]) -> Plan:
    """A plan that is for any model of as many layers, with this model's names.

    Plans of Galvatron's know no final norm of its own: it runs as the head does.
    """
    if given.model or given.layers == layer_names:
        return given
    if len(given.layers) == len(layer_names) - 1 and "norm" in layer_names[-2:]:
        stages = given.stages
        if stages:
            last = stages[-1]
            stages = (*stages[:-1], Stage(last.first, last.last + 1))
        strategies = (*given.strategies, given.strategies[-1])
        return replace(
            given, layers=layer_names, strategies=strategies, stages=stages, classes=(),
            predicted={},
        )  # fmt: skip
    return replace(given, layers=layer_names) if len(given.layers) == len(layer_names) else given


def _study(
    model: str | Workable | Study,
    cluster: ClusterProfile | str,
    seq: int | None,
    global_batch_size: int,
    memory_bytes: int | None,
    precision: str | None,
    constraints: str | Constraints,
    say: Say,
) -> Study:
    if isinstance(cluster, str):
        cluster = ClusterProfile.preset(cluster)
    if isinstance(constraints, str):
        constraints = Constraints.parse(constraints)
    if isinstance(model, Study):
        if (model.cluster, model.global_batch_size) != (cluster, global_batch_size):
            raise PlanError("the study was made for another cluster or batch; make a new one")
        return model.under(constraints, memory_bytes)
    if isinstance(model, str):
        from galvatron_compile.models import load_model

        model = load_model(model, seq)
    elif seq is not None and seq != model.seq:
        raise ShapeError(f"the model was made for a sequence of {model.seq}, not {seq}")
    return Study.of(model, cluster, global_batch_size, memory_bytes, precision, constraints, say)


def report(
    study: Study,
    problems: list[PipelineProblem],
    outcome: Outcome,
    *,
    costs_s: float,
    search_s: float,
) -> Planned:
    """The outcome with names, prices by cause, baselines, and why the others lost."""
    best, *others = [predicted(study, plan_of(study, s)) for s in outcome.solved]
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
            unfit.append((name, "no such plan divides the ranks, heads and batch"))
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
    study: Study, problem: PipelineProblem, edges: tuple[int, ...], options: Any
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
    return replace(given, predicted=numbers)


def _why(other: Plan, best: Plan) -> str:
    return biggest_difference(other.predicted, best.predicted)


def _record(other: Alternative, best: Plan) -> dict[str, Any]:
    best_ms = float(best.predicted["step_ms"])
    return {
        "name": other.name,
        "notation": notation.format(other.plan),
        "step_ms": other.plan.predicted["step_ms"],
        "memory_bytes": other.plan.predicted["memory_bytes"],
        "behind_percent": other.behind_percent(best_ms),
        "why": other.why,
    }


def _infeasible(study: Study, outcome: Outcome) -> str:
    reserve = study.memory_bytes - study.pricer.capacity_bytes
    needs = [found for found in outcome.infeasible if found.smallest_bytes is not None]
    if not needs:
        return "no strategy runs every layer; change the batch size or relax a constraint"
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
