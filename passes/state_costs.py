"""Parameters, gradients and optimizer states of a layer: their bytes, and the time to move them."""

from __future__ import annotations

from typing import TypedDict

from galvatron_compile.cluster import ClusterProfile
from galvatron_compile.passes.layer_estimate import Estimate
from galvatron_compile.passes.parameter_sizes import ParameterBytes
from galvatron_compile.strategy import Strategy

# What an optimizer keeps beside the master weights; AdamW's two moments unless told otherwise.
ADAM_MOMENTS = 2

Sizes = tuple[ParameterBytes, ParameterBytes]
"""Parameters that every token uses, and those of experts before expert parallelism divides them."""


class StateTimes(TypedDict):
    """Fields of :class:`galvatron_compile.costs.LayerCost` of the same names."""

    forward_gather_ms: float
    backward_gather_ms: float
    step_gather_ms: float
    micro_reduce_ms: float
    step_reduce_ms: float
    optimizer_ms: float


class StateBytes(TypedDict):
    parameter_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    saved_bytes: int
    transient_bytes: int


def state_times(cluster: ClusterProfile, sizes: Sizes, strategy: Strategy) -> StateTimes:
    """Moving parameters and gradients over the data ranks, and the optimizer's reads and writes.

    Experts are replicated over data ranks / ep only; groups of their copies lie tp × ep apart.
    """
    shared, experts = sizes[0], sizes[1].divided(strategy.ep)
    total: StateTimes = _times(cluster, shared, strategy, strategy.data_ranks, strategy.tp)
    if experts.master:
        copies = strategy.data_ranks // strategy.ep
        more = _times(cluster, experts, strategy, copies, strategy.tp * strategy.ep)
        for key, value in more.items():
            total[key] += value  # type: ignore[literal-required, operator]
    return total


def _times(
    cluster: ClusterProfile, size: ParameterBytes, strategy: Strategy, num_ranks: int, stride: int
) -> StateTimes:
    def move(kind: str, num_bytes: int) -> float:
        return cluster.group_ms(kind, num_bytes, num_ranks, stride)

    zero = strategy.zero
    gather = move("all_gather", size.working) if zero else 0.0
    scatter = move("reduce_scatter", size.gradient) if zero else 0.0
    once = {0: move("all_reduce", size.gradient) if zero == 0 else 0.0, 1: scatter}.get(zero, 0.0)
    deferred = cluster.group_ms("all_reduce", size.partial, strategy.tp)
    # The update reads weight, gradient and moments, and writes weight and moments.
    touched = size.master // (num_ranks if zero else 1) * (3 + 2 * ADAM_MOMENTS)
    return {
        "forward_gather_ms": gather if zero == 3 else 0.0,
        "backward_gather_ms": gather if zero == 3 else 0.0,
        "step_gather_ms": gather if zero in (1, 2) else 0.0,
        "micro_reduce_ms": scatter if zero >= 2 else 0.0,
        "step_reduce_ms": once + deferred,
        "optimizer_ms": cluster.memory_ms(touched),
    }


def state_bytes(sizes: Sizes, strategy: Strategy, estimate: Estimate) -> StateBytes:
    """Bytes on one rank, as the runtime's parameter units hold them (galvatron_compile.units)."""
    parts = [(sizes[0], strategy.data_ranks)]
    if sizes[1].master:
        parts.append((sizes[1].divided(strategy.ep), strategy.data_ranks // strategy.ep))
    parameters = gradients = optimizer = passing = 0
    zero = strategy.zero
    for size, ranks in parts:
        owners = ranks if zero else 1
        copy = size.working if zero in (1, 2) or (zero == 0 and size.mixed) else 0
        shard = -(-size.gradient // owners)
        parameters += -(-size.master // owners) + copy
        gradients += {0: size.gradient, 1: size.gradient + shard}.get(zero, shard)
        optimizer += -(-size.master // owners) * ADAM_MOMENTS
        # ZeRO-3 holds this layer's gathered parameters and the next one's; ZeRO-2 and 3 a full
        # gradient until it is scattered.
        passing += 2 * size.working if zero == 3 else 0
        passing += size.gradient if zero >= 2 else 0
    saved = {"none": estimate.saved_bytes, "selective": estimate.selective_bytes}.get(
        strategy.recompute, estimate.input_bytes
    )
    return {
        "parameter_bytes": parameters,
        "gradient_bytes": gradients,
        "optimizer_bytes": optimizer,
        "saved_bytes": saved,
        "transient_bytes": max(0, estimate.peak_bytes - saved) + passing,
    }
