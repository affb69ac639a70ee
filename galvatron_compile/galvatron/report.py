"""``galvatron-compile plan --from-galvatron``: the exact plan on a profile of Galvatron's.

Everything here is plain data (for ``--json``); :mod:`.text` prints it.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from galvatron_compile import notation
from galvatron_compile.errors import InfeasibleError, ProfileError
from galvatron_compile.galvatron import plans
from galvatron_compile.galvatron.formulas import MB, Workload
from galvatron_compile.galvatron.pricing import MemoryLimit, StepPrice, price
from galvatron_compile.galvatron.profile import GalvatronProfile
from galvatron_compile.galvatron.search import Found, Outcome, search, uniform
from galvatron_compile.galvatron.shapes import SHAPES
from galvatron_compile.galvatron.space import PS_PER_MS
from galvatron_compile.plans import Plan

NO_MFU = (
    "Galvatron's profile does not say which GPU it was measured on, so its peak is not known; "
    "name one to get MFU"
)


def workload(
    directory: str | Path,
    gpus: int,
    seq: int,
    global_batch: int,
    num_layers: int | None = None,
    hidden_size: int | None = None,
) -> Workload:
    """Read a folder and add what it does not hold.

    Depth and width of the model come from the arguments, else from the plan in the folder (depth)
    and the table of known models. Raises ProfileError if they cannot be known.
    """
    profile = GalvatronProfile.load(directory, gpus)
    shape = SHAPES.get(profile.model)
    if num_layers is None and profile.plan_path is not None:
        num_layers = len(plans.load(profile.plan_path, gpus).layers) - 2
    if num_layers is None and shape is not None:
        num_layers = shape.num_layers
    if hidden_size is None and shape is not None:
        hidden_size = shape.hidden_size
    if num_layers is None or hidden_size is None:
        missing = "depth" if num_layers is None else "width"
        raise ProfileError(
            f"{profile.directory} does not hold the {missing} of model {profile.model!r}, which "
            f"is not among the known ones ({', '.join(SHAPES)}); give its number of layers and "
            "hidden size"
        )
    return Workload(profile, gpus, seq, global_batch, num_layers, hidden_size)


def memory_limit(
    profile: GalvatronProfile, memory_bytes: int | None, exact: bool = False
) -> MemoryLimit:
    """``memory_bytes`` of a GPU, or what the name of the plan in the folder says (``_36GB_``)."""
    if memory_bytes is None:
        name = Path(profile.plan_path or "").name
        match = re.search(r"_(\d+)GB", name)
        if match is None:
            raise ProfileError(
                f"{profile.directory} does not say how much memory a GPU has; give it, for "
                "example --memory 36GiB"
            )
        memory_bytes = int(match[1]) * 1024 * MB
    limit = MemoryLimit(memory_bytes, exact)
    if limit.plan_mb < 1:
        raise ProfileError(f"a GPU memory of {memory_bytes} bytes is less than 1 MiB; raise it")
    return limit


def plan_from_galvatron(
    directory: str | Path,
    gpus: int,
    seq: int,
    global_batch: int,
    memory_bytes: int | None = None,
    *,
    num_layers: int | None = None,
    hidden_size: int | None = None,
    exact_bytes: bool = False,
    gpu: str | None = None,
    top: int | None = None,
) -> dict[str, Any]:
    """The optimum of Galvatron's space by its formulas, as data for ``--json``.

    ``proven_optimal`` says that the proof is complete; where it would take too long, no plan is
    faster than ``no_plan_below_ms``.

    memory_bytes: of one GPU; see :data:`.pricing.MEMORY_HELP`. exact_bytes: do not round sizes to
    MB as Galvatron does. gpu: name of a preset (``A100-80GB``) whose peak gives the MFU. top: at
    most so many alternatives.

    Raises ProfileError, ShapeError; InfeasibleError with the least memory that would do.
    """
    start = time.perf_counter()
    work = workload(directory, gpus, seq, global_batch, num_layers, hidden_size)
    limit = memory_limit(work.profile, memory_bytes, exact_bytes)
    outcomes = search(work, limit)
    best = outcomes[0].found if outcomes else None
    if best is None:
        raise _infeasible(outcomes, limit)
    search_s = time.perf_counter() - start
    cost = price(work, best.plan)
    plan = predicted(best.plan, cost, limit)
    record = price_record(work, plan, cost, limit, gpu)
    theirs = _galvatron_plan(work)
    record |= {
        "search_s": search_s,
        **_proof(outcomes, best),
        "plan": json.loads(plan.to_json()),
        "galvatron_plan": json.loads(plans.dumps(plan)),
        "galvatron_plan_step_ms": None if theirs is None else price(work, theirs).step_ms,
        "alternatives": _alternatives(work, limit, outcomes, cost, theirs)[:top],
        "left_out": sorted({text for o in outcomes for text in o.space.left_out}),
    }
    return record


def price_record(
    work: Workload, plan: Plan, cost: StepPrice, limit: MemoryLimit, gpu: str | None = None
) -> dict[str, Any]:
    """One plan's price as data."""
    tokens_per_s = 1e3 * work.global_batch_size * work.seq_length / cost.step_ms
    profile = work.profile
    return {
        "source": f"Galvatron's formulas on {profile.directory} ({profile.model})",
        "step_ms": cost.step_ms,
        "tokens_per_s": tokens_per_s,
        "mfu": None if gpu is None else _mfu(work, tokens_per_s, gpu),
        "mfu_reason": NO_MFU if gpu is None else f"share of the peak of {gpu}",
        "parts_ms": cost.parts_ms,
        "fits": cost.fits(limit),
        "memory_limit_bytes": limit.plan_mb * MB,
        "gpu_memory_bytes": limit.gpu_bytes,
        "peak_memory_bytes": cost.used_bytes(limit),
        "stages": [stage.record(limit) for stage in cost.stages],
        "notation": notation.format(plan),
    }


def predicted(plan: Plan, cost: StepPrice, limit: MemoryLimit) -> Plan:
    """The plan with what it is expected to cost."""
    numbers: dict[str, Any] = {
        "source": "Galvatron's formulas",
        "step_ms": cost.step_ms,
        "memory_bytes": max(cost.used_bytes(limit)),
        "parts_ms": cost.parts_ms,
        "stages": [stage.record(limit) for stage in cost.stages],
    }
    return replace(plan, predicted=numbers)


def _proof(outcomes: list[Outcome], best: Found) -> dict[str, Any]:
    """Whether the plan is proven optimal, and if not how far the proof goes."""
    least = min([o.bound_ps for o in outcomes if o.may_beat(best.step_ps)], default=best.step_ps)
    return {
        "proven_optimal": least >= best.step_ps,
        "no_plan_below_ms": min(least, best.step_ps) / PS_PER_MS,
    }


def _galvatron_plan(work: Workload) -> Plan | None:
    """The plan in the folder, if it is for this batch."""
    if work.profile.plan_path is None:
        return None
    plan = plans.load(work.profile.plan_path, work.num_gpus)
    same = (plan.global_batch_size, len(plan.layers) - 2)
    return plan if same == (work.global_batch_size, work.num_layers) else None


def _alternatives(
    work: Workload,
    limit: MemoryLimit,
    outcomes: list[Outcome],
    best: StepPrice,
    theirs: Plan | None,
) -> list[dict[str, Any]]:
    """The best of every other number of stages and micro-batches, uniform plans, Galvatron's."""
    found: list[dict[str, Any]] = []
    if theirs is not None:
        found.append(_alternative("Galvatron's plan", work, limit, theirs, best))
    even = [uniform(work, outcome.space, limit.plan_units) for outcome in outcomes]
    same = min((plan for plan in even if plan), key=lambda plan: plan.step_ps, default=None)
    if same is not None:
        found.append(_alternative("one strategy for all layers", work, limit, same.plan, best))
    none: list[dict[str, Any]] = []
    for outcome in outcomes[1:]:
        name = f"pp={outcome.space.pp}, micro={outcome.space.chunks}"
        if outcome.found is not None:
            found.append(_alternative(name, work, limit, outcome.found.plan, best))
        else:
            none.append({"name": name, "step_ms": None, "why": _why_none(outcome, limit)})
    return sorted(found, key=lambda record: record["step_ms"]) + none


def _alternative(
    name: str, work: Workload, limit: MemoryLimit, plan: Plan, best: StepPrice
) -> dict[str, Any]:
    cost = price(work, plan)
    return {
        "name": name,
        "step_ms": cost.step_ms,
        "behind_percent": 100 * (cost.step_ms / best.step_ms - 1),
        "peak_memory_bytes": cost.used_bytes(limit),
        "notation": notation.format(plan),
        "why": _why(cost.parts_ms, best.parts_ms) if cost.fits(limit) else "does not fit",
    }


def _why(parts: Mapping[str, float], best: Mapping[str, float]) -> str:
    """The two causes that grew most against the best plan."""
    names = dict.fromkeys([*parts, *best])
    grown = {name: parts.get(name, 0.0) - best.get(name, 0.0) for name in names}
    largest = sorted(names, key=lambda name: -grown[name])[:2]
    told = [f"{grown[name]:+.1f} ms of {name}" for name in largest if grown[name] >= 0.05]
    return ", ".join(told) or "the same within 0.05 ms in every part"


def _why_none(outcome: Outcome, limit: MemoryLimit) -> str:
    if not outcome.space.families:
        return "no strategy splits this batch, or none was measured"
    need = outcome.least_units * limit.unit_bytes / MB
    return f"its smallest plan needs {need:,.0f} MiB, the limit is {limit.plan_mb:,} MiB"


def _infeasible(outcomes: list[Outcome], limit: MemoryLimit) -> InfeasibleError:
    possible = [o.least_units for o in outcomes if o.space.families]
    if not possible:
        return InfeasibleError(
            "no strategy of Galvatron's space splits this batch over these GPUs; use a global "
            "batch that powers of two divide"
        )
    least = limit.gpu_mb_for(min(possible))
    return InfeasibleError(
        f"no plan fits: of GPUs with {limit.gpu_mb:,} MiB Galvatron lets a plan use "
        f"{limit.plan_mb:,} MiB, and the smallest plan needs GPUs with {least:,} MiB; raise the "
        "memory to that or lower the batch"
    )


def _mfu(work: Workload, tokens_per_s: float, gpu: str) -> float:
    """6 FLOPs a parameter and 12 · layers · hidden · length of attention a token (PaLM, app. B).

    Parameters follow from the measured states: 4 bytes each of a layer's parameter_mb, 16 of
    embedding and head.
    """
    from galvatron_compile.presets import GPUS

    if gpu not in GPUS:
        raise ProfileError(f"GPU {gpu!r} is not known; use one of {', '.join(GPUS)}")
    layers = work.num_layers * work.model.parameter_mb * MB / 4
    ends = work.model.whole.states_mb[1] * MB / 16
    attention = 12 * work.num_layers * work.hidden_size * work.seq_length
    flops_per_s = (6 * (layers + ends) + attention) * tokens_per_s
    return flops_per_s / (work.num_gpus * GPUS[gpu].half_flops_per_s)
