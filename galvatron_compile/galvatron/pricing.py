"""The price of a whole plan by Galvatron's formulas: step time by cause, memory by stage.

The step of P stages and m micro-batches, with C_i the time of a micro-batch on stage i (embedding
and head included) and S_i that of its layers when gradients are synchronised too:

    r    = max(ΣC + (m - 1) · C_last,  max(k · C_0, C_1 + … ) + C_0 · max(0, m + 1 - P)),
           k = min(P, m) - 1
    step = r + max(0, max_i(S_i - (C_0 + … + C_i)))

Switching between strategies costs nothing in it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from galvatron_compile.errors import PlanError, UnsupportedError
from galvatron_compile.galvatron.formulas import (
    CONTEXT_MB,
    MB,
    EndTime,
    LayerTime,
    Workload,
    buffer_mb,
    end_memory,
    end_times,
    layer_memory,
    layer_time,
)
from galvatron_compile.plans import Plan, Stage
from galvatron_compile.strategy import Strategy

MEMORY_HELP = (
    "Memory of one GPU as Galvatron counts it: of more than 20 GiB it keeps 20 % for PyTorch's "
    "allocator, so 36GiB leaves a plan 29,492 MiB."
)
CACHE_SHARE, CACHE_FROM_MB = 0.2, 21 * 1024


@dataclass(frozen=True)
class MemoryLimit:
    """What a plan may use of a GPU of ``gpu_bytes``.

    Galvatron keeps a fifth of GPUs of more than 20 GB for the allocator's cache and rounds every
    layer up to whole MB. exact: compare unrounded bytes with the same limit instead.
    """

    gpu_bytes: int
    exact: bool = False

    @property
    def gpu_mb(self) -> int:
        return self.gpu_bytes // MB

    @property
    def plan_mb(self) -> int:
        kept = int(self.gpu_mb * CACHE_SHARE) if self.gpu_mb >= CACHE_FROM_MB else 0
        return self.gpu_mb - kept

    @property
    def unit_bytes(self) -> int:
        return 1 if self.exact else MB

    @property
    def plan_units(self) -> int:
        """The limit in bytes if exact, else in MB."""
        return self.plan_mb * (MB // self.unit_bytes)

    def units(self, size_mb: float) -> int:
        """A size, rounded up."""
        return math.ceil(size_mb * (MB // self.unit_bytes))

    def gpu_mb_for(self, units: int) -> int:
        """The smallest GPU, in MB, that leaves a plan ``units``."""
        need = -(-units * self.unit_bytes // MB)
        found = need
        while MemoryLimit(found * MB).plan_mb < need:
            found += max(1, need - MemoryLimit(found * MB).plan_mb)
        return found


@dataclass(frozen=True)
class StageMemory:
    """MB of one stage's ranks, unrounded, and as Galvatron rounds them (rounded_mb)."""

    states_mb: float
    activations_mb: float
    end_states_mb: float
    end_activations_mb: float
    buffer_mb: float
    rounded_mb: int

    @property
    def exact_bytes(self) -> int:
        parts = (self.states_mb, self.activations_mb, self.end_states_mb, self.end_activations_mb)
        return math.ceil((sum(parts) + self.buffer_mb + CONTEXT_MB) * MB)

    def used_bytes(self, limit: MemoryLimit) -> int:
        """What counts against ``limit``."""
        return self.exact_bytes if limit.exact else self.rounded_mb * MB

    def record(self, limit: MemoryLimit) -> dict[str, Any]:
        return {
            "used_bytes": self.used_bytes(limit),
            "exact_bytes": self.exact_bytes,
            "limit_bytes": limit.plan_mb * MB,
            "layer_state_bytes": math.ceil(self.states_mb * MB),
            "layer_activation_bytes": math.ceil(self.activations_mb * MB),
            "end_state_bytes": math.ceil(self.end_states_mb * MB),
            "end_activation_bytes": math.ceil(self.end_activations_mb * MB),
            "tp_buffer_bytes": math.ceil(self.buffer_mb * MB),
            "context_bytes": math.ceil(CONTEXT_MB * MB),
        }


@dataclass(frozen=True)
class StepPrice:
    """What a plan costs. parts_ms: step time by cause, in the order of reading; they add up."""

    step_ms: float
    parts_ms: dict[str, float]
    stages: tuple[StageMemory, ...]

    def fits(self, limit: MemoryLimit) -> bool:
        return all(stage.used_bytes(limit) <= limit.plan_mb * MB for stage in self.stages)

    def used_bytes(self, limit: MemoryLimit) -> list[int]:
        return [stage.used_bytes(limit) for stage in self.stages]


def price(work: Workload, plan: Plan) -> StepPrice:
    """Price a plan whose first and last layer are embedding and head.

    Raises PlanError if the plan does not belong to the workload, UnsupportedError for what
    Galvatron's formulas have no term for.
    """
    check_plan(work, plan)
    pp, chunks = plan.pp, plan.num_micro_batches
    ends = end_times(work, plan.strategies[0], pp, chunks)
    times = {s: layer_time(work, s, pp, chunks) for s in set(plan.strategies[1:-1])}
    stages = [[times[s] for s in stage] for stage in block_strategies(plan)]
    unsynchronised = [
        math.fsum(layer.unsynchronised_ms for layer in stage) + end.unsynchronised_ms
        for stage, end in zip(stages, ends, strict=True)
    ]
    synchronised = [math.fsum(layer.synchronised_ms for layer in stage) for stage in stages]
    pipeline = pipeline_ms(unsynchronised, chunks)
    exposed = exposed_ms(unsynchronised, synchronised)
    parts = _parts(stages, ends, chunks / pp)
    balanced = chunks / pp * math.fsum(unsynchronised)
    parts["pipeline bubble and imbalance"] = pipeline - balanced if pp > 1 else 0.0
    parts["gradient synchronisation"] = exposed
    kept = {name: value for name, value in parts.items() if value}
    return StepPrice(pipeline + exposed, kept, memory(work, plan))


def pipeline_ms(stages: Sequence[float], chunks: int) -> float:
    """r of the module's docstring, from C_i."""
    pp = len(stages)
    steady = sum(stages) + (chunks - 1) * stages[-1]
    fill = max((min(pp, chunks) - 1) * stages[0], sum(stages[1:]))
    return max(steady, fill + stages[0] * max(0, chunks + 1 - pp))


def exposed_ms(unsynchronised: Sequence[float], synchronised: Sequence[float]) -> float:
    """Gradient synchronisation that is hidden by no stage before."""
    exposed = (s - sum(unsynchronised[: i + 1]) for i, s in enumerate(synchronised))
    return max(0.0, *exposed)


def memory(work: Workload, plan: Plan) -> tuple[StageMemory, ...]:
    """By stage. All chunks are alive under GPipe, as many as stages follow under 1F1B."""
    pp, chunks = plan.pp, plan.num_micro_batches
    alive = in_flight(plan.schedule, pp, chunks)
    ends = end_memory(work, plan.strategies[0], chunks, alive)
    buffer = _buffer(work, plan)
    found = []
    for stage, strategies in enumerate(block_strategies(plan)):
        layers = [layer_memory(work, s, chunks, alive[stage]) for s in strategies]
        rounded = sum(math.ceil(states + kept) for states, kept in layers)
        rounded += math.ceil(sum(ends[stage]) + CONTEXT_MB) + int(buffer)
        states = math.fsum(states for states, _ in layers)
        kept = math.fsum(kept for _, kept in layers)
        found.append(StageMemory(states, kept, *ends[stage], buffer, rounded))
    return tuple(found)


def in_flight(schedule: str, pp: int, chunks: int) -> tuple[int, ...]:
    """Micro-batches alive by stage."""
    if pp == 1:
        return (1,)
    return tuple(chunks if schedule == "gpipe" else pp - stage for stage in range(pp))


def block_strategies(plan: Plan) -> list[tuple[Strategy, ...]]:
    """By stage, the strategies of its layers between embedding and head."""
    last = len(plan.layers) - 1
    stages = plan.stages or (Stage(0, last + 1),)
    return [plan.strategies[max(1, stage.first) : min(last, stage.last)] for stage in stages]


def check_plan(work: Workload, plan: Plan) -> None:
    """Raise PlanError or UnsupportedError unless the formulas apply to ``plan``."""
    layers = work.num_layers + 2
    plan.check_model("", layers, work.num_gpus, work.global_batch_size)
    if plan.strategies[0] != plan.strategies[-1]:
        raise UnsupportedError(
            "Galvatron's formulas give embedding and head one strategy, got "
            f"{plan.strategies[0]} and {plan.strategies[-1]}; make them equal"
        )
    if plan.strategies[0].recompute != "none":
        raise UnsupportedError("Galvatron does not recompute embedding and head; drop recompute")
    if plan.pp > 1 and plan.schedule not in ("1f1b", "gpipe"):
        raise UnsupportedError(
            f"Galvatron's formulas have no schedule {plan.schedule!r}; use 1f1b or gpipe"
        )
    if plan.num_micro_batches < plan.pp:
        raise PlanError(
            f"{plan.num_micro_batches} micro-batches do not fill {plan.pp} stages; use at least "
            f"micro={plan.pp}"
        )


def _buffer(work: Workload, plan: Plan) -> float:
    """None if only Ulysses is used; else for the largest degree in use, whichever kind it is."""
    if all(strategy.tp == 1 for strategy in plan.strategies):
        return 0.0
    degree = max(max(s.tp, s.ulysses) for s in plan.strategies)
    return buffer_mb(work, plan.pp, plan.num_micro_batches, degree)


def _parts(
    stages: list[list[LayerTime]], ends: Sequence[EndTime], scale: float
) -> dict[str, float]:
    layers = [layer for stage in stages for layer in stage]

    def total(name: str) -> float:
        return scale * math.fsum(getattr(layer, name) for layer in layers)

    return {
        "layers: forward": total("forward_ms"),
        "layers: backward": total("backward_ms"),
        "layers: recomputation": total("recompute_ms"),
        "layers: ZeRO-3 gathers": total("gather_ms"),
        "layers: tensor parallel and Ulysses": total("exchange_ms"),
        "layers: sends between stages": total("p2p_ms"),
        "embedding and head: computation": scale * math.fsum(e.computation_ms for e in ends),
        "embedding and head: ZeRO-3 gathers": scale * math.fsum(e.gather_ms for e in ends),
        "embedding and head: tensor parallel": scale * math.fsum(e.exchange_ms for e in ends),
    }
