"""annotate: LayeredGraph, ShardingTable, ClusterProfile → CostTable. Only writes, never decides."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypedDict

from galvatron_compile.cluster import ClusterProfile
from galvatron_compile.costs import CostTable, LayerCost
from galvatron_compile.graph import LayeredGraph
from galvatron_compile.layer_timing import LayerTiming, TimingKey, interpolate
from galvatron_compile.mesh import data_ranks, tensor_ranks
from galvatron_compile.passes.layer_estimate import Estimate, Estimator
from galvatron_compile.passes.node_costs import note_costs
from galvatron_compile.passes.reshard_cost import resharding_ms
from galvatron_compile.passes.sharding.sharded_layer import ShardedLayer
from galvatron_compile.passes.sharding.table import ShardingTable
from galvatron_compile.precision import Precision
from galvatron_compile.strategy import Strategy

# What an optimizer keeps beside the master weights; AdamW's two moments unless told otherwise.
ADAM_MOMENTS = 2


@dataclass(frozen=True)
class Workload:
    """What is trained: samples per optimizer step, and the numbers of micro-batches considered."""

    world_size: int
    global_batch_size: int
    micro_batch_counts: tuple[int, ...]
    precision: Precision


def annotate(
    layered: LayeredGraph,
    shardings: ShardingTable,
    cluster: ClusterProfile,
    strategies: Sequence[Strategy],
    workload: Workload,
    timings: Mapping[TimingKey, LayerTiming],
) -> CostTable:
    """Cost of every layer class under every strategy and number of micro-batches.

    Computation comes from ``timings`` where the class was measured at that degree, else from the
    operators' FLOPs and bytes on the profile's rates (roofline, Williams et al. 2009).
    """
    writer = _Writer(layered, shardings, cluster, workload, timings)
    note_costs(layered, writer.estimator, list(strategies))
    entries: dict[tuple[int, Strategy, int], LayerCost] = {}
    illegal: dict[tuple[int, Strategy], str] = {}
    for class_index in range(len(layered.classes)):
        for strategy in strategies:
            reason = shardings.why_not(class_index, strategy)
            counts = _legal_counts(strategy, workload, layered)
            if reason is None and not counts:
                reason = _indivisible(strategy, workload)
            if reason is not None:
                illegal[class_index, strategy] = reason
                continue
            for count in counts:
                entries[class_index, strategy, count] = writer.cost(class_index, strategy, count)
    return CostTable(
        layers=tuple(layer.class_index for layer in layered.layers),
        class_names=tuple(layer_class.name for layer_class in layered.classes),
        strategies=tuple(strategies),
        micro_batch_counts=workload.micro_batch_counts,
        entries=entries,
        resharding_ms=resharding_ms(layered, shardings, cluster, strategies, workload),
        same_strategy=shardings.tied,
        overlap_slowdown=cluster.overlap_slowdown,
        world_size=workload.world_size,
        global_batch_size=workload.global_batch_size,
        illegal=illegal,
    )


def micro_batch_counts(global_batch_size: int, limit: int = 64) -> tuple[int, ...]:
    """Divisors of the global batch that are considered: all, up to ``limit``."""
    top = min(global_batch_size, limit)
    return tuple(n for n in range(1, top + 1) if global_batch_size % n == 0)


def _legal_counts(
    strategy: Strategy, workload: Workload, layered: LayeredGraph
) -> list[int]:
    counts: Iterable[int] = workload.micro_batch_counts
    if not layered.graph.splits_batch:
        counts = [count for count in counts if count == 1]
    return [n for n in counts if workload.global_batch_size % (n * strategy.dp) == 0]


def _indivisible(strategy: Strategy, workload: Workload) -> str:
    return (
        f"global batch {workload.global_batch_size} does not divide by dp {strategy.dp} × any of "
        f"{workload.micro_batch_counts} micro-batches; choose a batch size that is a multiple of "
        f"{strategy.dp}"
    )


class _Writer:
    """Fills in one entry at a time; estimates are shared by entries of one form and batch."""

    def __init__(
        self,
        layered: LayeredGraph,
        shardings: ShardingTable,
        cluster: ClusterProfile,
        workload: Workload,
        timings: Mapping[TimingKey, LayerTiming],
    ) -> None:
        self.layered, self.shardings, self.cluster = layered, shardings, cluster
        self.workload, self.timings = workload, timings
        self.estimator = Estimator(layered, shardings, cluster)

    def cost(self, class_index: int, strategy: Strategy, count: int) -> LayerCost:
        sharded = self.shardings.get(class_index, strategy)
        local_batch = self.workload.global_batch_size // (count * strategy.dp)
        estimate = self.estimator.estimate(class_index, strategy, local_batch)
        form = (class_index, strategy.tp, strategy.sequence_parallel)
        timing = interpolate(self.timings, form, local_batch)
        run = timing or self.estimator.computation(class_index, strategy, local_batch)
        comm = self._tensor_collectives(sharded, local_batch)
        size = parameter_bytes(self.layered, class_index, sharded, self.workload.precision)
        again = strategy.recompute == "full"
        return LayerCost(
            forward_ms=run.forward_ms,
            backward_ms=run.backward_ms + run.forward_ms * again,
            forward_comm_ms=comm["forward"],
            backward_comm_ms=comm["backward"] + comm["forward"] * again,
            **self._synchronisation(size, strategy, sharded),
            **_memory(size, strategy, estimate),
            source="measured" if timing else "analytic",
        )

    def _tensor_collectives(self, sharded: ShardedLayer, local_batch: int) -> dict[str, float]:
        """Time of the collectives inside the layer, by direction, for one micro-batch."""
        ranks = tensor_ranks(self.workload.world_size, sharded.tp)[0]
        total_ms = {"forward": 0.0, "backward": 0.0}
        for item in sharded.collectives:
            num_bytes = int(item.bytes(local_batch))
            total_ms[item.direction] += self.cluster.collective_ms(item.kind, num_bytes, ranks)
        return total_ms

    def _synchronisation(
        self, size: ParameterBytes, strategy: Strategy, sharded: ShardedLayer
    ) -> _Times:
        """Times of moving parameters and gradients along the data axis, and of the optimizer."""
        cluster = self.cluster
        ranks = data_ranks(self.workload.world_size, strategy.tp)[0]
        tensor = tensor_ranks(self.workload.world_size, strategy.tp)[0]

        def move(kind: str, num_bytes: int) -> float:
            return cluster.collective_ms(kind, num_bytes, ranks) if strategy.dp > 1 else 0.0

        gather, scatter = move("all_gather", size.working), move("reduce_scatter", size.gradient)
        once = {0: move("all_reduce", size.gradient), 1: scatter}.get(strategy.zero, 0.0)
        deferred = 0.0
        if size.partial:
            deferred = cluster.collective_ms("all_reduce", size.partial, tensor)
        # The update reads weight, gradient and moments, and writes weight and moments.
        touched = size.master // size.owners(strategy) * (3 + 2 * ADAM_MOMENTS)
        return {
            "forward_gather_ms": gather if strategy.zero == 3 else 0.0,
            "backward_gather_ms": gather if strategy.zero == 3 else 0.0,
            "step_gather_ms": gather if strategy.zero in (1, 2) else 0.0,
            "micro_reduce_ms": scatter if strategy.zero >= 2 else 0.0,
            "step_reduce_ms": once + deferred,
            "optimizer_ms": cluster.memory_ms(touched),
        }


class _Times(TypedDict):
    forward_gather_ms: float
    backward_gather_ms: float
    step_gather_ms: float
    micro_reduce_ms: float
    step_reduce_ms: float
    optimizer_ms: float


class _Bytes(TypedDict):
    parameter_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    saved_bytes: int
    transient_bytes: int


def _memory(size: ParameterBytes, strategy: Strategy, estimate: Estimate) -> _Bytes:
    """Bytes on one rank, as the runtime's parameter units hold them (galvatron_compile.units)."""
    owners = size.owners(strategy)
    copy = size.working if strategy.zero in (1, 2) or (strategy.zero == 0 and size.mixed) else 0
    shard = -(-size.gradient // owners)
    held = {0: size.gradient, 1: size.gradient + shard}.get(strategy.zero, shard)
    # ZeRO-3 holds this layer's gathered parameters and the next one's; ZeRO-2 and 3 a full
    # gradient until it is scattered.
    passing = (2 * size.working if strategy.zero == 3 else 0) + (
        size.gradient if strategy.zero >= 2 else 0
    )
    saved = estimate.input_bytes if strategy.recompute == "full" else estimate.saved_bytes
    return {
        "parameter_bytes": -(-size.master // owners) + copy,
        "gradient_bytes": held,
        "optimizer_bytes": -(-size.master // owners) * ADAM_MOMENTS,
        "saved_bytes": saved,
        "transient_bytes": max(0, estimate.peak_bytes - saved) + passing,
    }


@dataclass(frozen=True)
class ParameterBytes:
    """Bytes of one layer's parameters on one rank before ZeRO divides them.

    working, master, gradient: in the dtypes that compute, that the optimizer updates, and that
    gradients are summed in. partial: gradients that are also summed over the tensor axis.
    """

    working: int
    master: int
    gradient: int
    partial: int
    mixed: bool

    @staticmethod
    def owners(strategy: Strategy) -> int:
        return strategy.dp if strategy.zero else 1


def parameter_bytes(
    layered: LayeredGraph, class_index: int, sharded: ShardedLayer, precision: Precision
) -> ParameterBytes:
    """Sizes of a class's parameters in its sharded form, from one of its layers."""
    layer = next(layer for layer in layered.layers if layer.class_index == class_index)
    working = master = gradient = partial = 0
    mixed = False
    for name, placement in zip(layer.parameters, sharded.parameters, strict=True):
        parameter = layered.graph.parameters[name]
        count = parameter.numel() // (sharded.tp if placement.is_shard else 1)
        dtype = parameter.dtype
        working += count * precision.compute_of(dtype).itemsize
        master += count * precision.master_of(dtype).itemsize
        mixed = mixed or precision.compute_of(dtype) != precision.master_of(dtype)
        if parameter.requires_grad:
            gradient += count * precision.reduce_of(dtype).itemsize
            if placement.kind == "V" and sharded.tp > 1:
                partial += count * precision.reduce_of(dtype).itemsize
    return ParameterBytes(working, master, gradient, partial, mixed)
