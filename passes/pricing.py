"""The price of a plan on a cost table: step time and memory of one rank.

One source of truth: the searcher minimises, and reports and given plans quote, these very numbers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from galvatron_compile.costs import CostTable, LayerCost
from galvatron_compile.errors import PlanError
from galvatron_compile.plans import Plan
from galvatron_compile.strategy import Strategy

NS_PER_MS = 1_000_000


@dataclass(frozen=True, slots=True)
class LayerTime:
    """What one layer takes, by what the rank waits for."""

    compute_ms: float
    tensor_comm_ms: float
    context_comm_ms: float
    expert_comm_ms: float
    data_comm_ms: float
    optimizer_ms: float

    @property
    def step_ms(self) -> float:
        return sum(getattr(self, field.name) for field in fields(self))


def micro_time(cost: LayerCost, overlap_slowdown: float) -> LayerTime:
    """Time of a layer in one micro-batch, what every micro-batch repeats.

    Computation and the collectives inside the layer run one after the other. ZeRO-3's gathers,
    started one layer ahead, run beside forward and backward, and so do the gradient reductions of
    ZeRO-2/3: communication x beside computation c takes max(x, c) + (o - 1) · min(x, c) with
    slowdown o (Galvatron, arXiv 2211.13878, section 4.2).
    """
    backward = cost.backward_gather_ms + cost.micro_reduce_ms
    return LayerTime(
        compute_ms=cost.forward_ms + cost.backward_ms,
        tensor_comm_ms=cost.forward_comm_ms + cost.backward_comm_ms,
        context_comm_ms=cost.context_ms,
        expert_comm_ms=cost.expert_ms,
        data_comm_ms=(
            exposed_ms(cost.forward_gather_ms, cost.forward_ms, overlap_slowdown)
            + exposed_ms(backward, cost.backward_ms, overlap_slowdown)
        ),
        optimizer_ms=0.0,
    )


def once_time(cost: LayerCost, overlap_slowdown: float) -> LayerTime:
    """Time of a layer once a step: the gradient reduction of ZeRO-0/1 beside the last backward,
    the gather of updated parameters, the optimizer."""
    every = cost.backward_gather_ms + cost.micro_reduce_ms
    last = exposed_ms(every + cost.step_reduce_ms, cost.backward_ms, overlap_slowdown)
    reduction = last - exposed_ms(every, cost.backward_ms, overlap_slowdown)
    return LayerTime(0.0, 0.0, 0.0, 0.0, reduction + cost.step_gather_ms, cost.optimizer_ms)


def layer_time(cost: LayerCost, num_micro_batches: int, overlap_slowdown: float) -> LayerTime:
    """Time of a layer in a step of ``num_micro_batches``, see :func:`micro_time`."""
    micro, once = micro_time(cost, overlap_slowdown), once_time(cost, overlap_slowdown)
    values = {
        field.name: num_micro_batches * getattr(micro, field.name) + getattr(once, field.name)
        for field in fields(LayerTime)
    }
    return LayerTime(**values)


def exposed_ms(communication_ms: float, compute_ms: float, overlap_slowdown: float) -> float:
    """By how much communication beside computation lengthens it."""
    return overlapped_ms(communication_ms, compute_ms, overlap_slowdown) - compute_ms


def overlapped_ms(communication_ms: float, compute_ms: float, overlap_slowdown: float) -> float:
    longer = max(communication_ms, compute_ms)
    return longer + (overlap_slowdown - 1) * min(communication_ms, compute_ms)


def layer_step_ms(cost: LayerCost, num_micro_batches: int, overlap_slowdown: float) -> float:
    """Time that a layer adds to the whole optimizer step; see :func:`layer_time`."""
    return layer_time(cost, num_micro_batches, overlap_slowdown).step_ms


def layer_step_ns(cost: LayerCost, num_micro_batches: int, overlap_slowdown: float) -> int:
    """The same in whole nanoseconds: sums of these are exact and do not depend on their order."""
    return whole_ns(layer_step_ms(cost, num_micro_batches, overlap_slowdown))


def whole_ns(time_ms: float) -> int:
    return round(time_ms * NS_PER_MS)


def resident_bytes(cost: LayerCost) -> int:
    """What a layer holds when the last forward ends: states, and activations of one micro-batch."""
    return cost.state_bytes + cost.saved_bytes


def costs_of(
    table: CostTable, strategies: Sequence[Strategy], num_micro_batches: int
) -> tuple[LayerCost, ...]:
    """The table's entry for every layer. PlanError names a layer whose entry is missing."""
    if num_micro_batches not in table.micro_batch_counts:
        counts = ", ".join(map(str, table.micro_batch_counts))
        raise PlanError(f"no costs for {num_micro_batches} micro-batches; the table has {counts}")
    costs = []
    for layer, (index, strategy) in enumerate(zip(table.layers, strategies, strict=True)):
        cost = table.entries.get((index, strategy, num_micro_batches))
        if cost is None:
            why = table.illegal.get((index, strategy), "no cost was made for it")
            name = table.class_names[index]
            raise PlanError(f"layer {layer} ({name}) cannot run with {strategy}: {why}")
        costs.append(cost)
    return tuple(costs)


def price(table: CostTable, plan: Plan) -> Mapping[str, Any]:
    """What a step of ``plan`` is expected to take, JSON-able, units in the keys.

    ``step_ms`` and ``memory_bytes`` per rank; the parts of the time (``compute_ms``,
    ``tensor_comm_ms``, ``data_comm_ms`` exposed, ``optimizer_ms``, ``resharding_ms``); the largest
    ``transient_bytes``; ``sources``: of how many layers the computation was measured, of how many
    it is analytic; ``layers``: one mapping per layer.

    Raises PlanError where the plan does not belong to the table or uses what it does not offer.
    """
    plan.check_model(plan.model, len(table.layers), table.world_size, table.global_batch_size)
    m, slowdown = plan.num_micro_batches, table.overlap_slowdown
    costs = costs_of(table, plan.strategies, m)
    for group in table.same_strategy:
        if len({plan.strategies[i] for i in group}) > 1:
            each = ", ".join(f"{plan.layers[i]}: {plan.strategies[i]}" for i in group)
            raise PlanError(f"layers with tied parameters need one strategy, got {each}")
    step_ns = [layer_step_ns(cost, m, slowdown) for cost in costs]
    cuts = zip(plan.strategies[:-1], plan.strategies[1:], strict=True)
    resharding_ns = [
        resharding_step_ns(table.resharding_ms.get((cut, before, after, m), 0.0), m)
        for cut, (before, after) in enumerate(cuts)
    ]
    times = [layer_time(cost, m, slowdown) for cost in costs]
    transient = max(cost.transient_bytes for cost in costs)
    return {
        "step_ms": (sum(step_ns) + sum(resharding_ns)) / NS_PER_MS,
        "memory_bytes": sum(map(resident_bytes, costs)) + transient,
        "compute_ms": sum(time.compute_ms for time in times),
        "tensor_comm_ms": sum(time.tensor_comm_ms for time in times),
        "context_comm_ms": sum(time.context_comm_ms for time in times),
        "expert_comm_ms": sum(time.expert_comm_ms for time in times),
        "data_comm_ms": sum(time.data_comm_ms for time in times),
        "optimizer_ms": sum(time.optimizer_ms for time in times),
        "resharding_ms": sum(resharding_ns) / NS_PER_MS,
        "transient_bytes": transient,
        "sources": {
            source: sum(cost.source == source for cost in costs)
            for source in ("measured", "analytic")
        },
        "layers": [
            {
                "step_ms": ns / NS_PER_MS,
                "resharding_ms": after / NS_PER_MS,
                "state_bytes": cost.state_bytes,
                "saved_bytes": cost.saved_bytes,
                "transient_bytes": cost.transient_bytes,
            }
            for ns, after, cost in zip(step_ns, [*resharding_ns, 0], costs, strict=True)
        ],
    }


def resharding_step_ns(resharding_ms: float, num_micro_batches: int) -> int:
    """Changing layout costs its time in every micro-batch."""
    return num_micro_batches * whole_ns(resharding_ms)
