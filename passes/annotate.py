"""annotate: LayeredGraph, ShardingTable, ClusterProfile → CostTable. Only writes, never decides."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from galvatron_compile.cluster import ClusterProfile
from galvatron_compile.costs import CostTable, LayerCost
from galvatron_compile.graph import LayeredGraph
from galvatron_compile.layer_timing import LayerTiming, TimingKey
from galvatron_compile.passes.layer_costs import LayerCosts, Workload
from galvatron_compile.passes.layer_estimate import Tallies
from galvatron_compile.passes.node_costs import note_costs
from galvatron_compile.passes.reshard_cost import resharding_ms
from galvatron_compile.passes.sharding.table import ShardingTable
from galvatron_compile.strategy import Strategy

__all__ = ["Workload", "annotate", "micro_batch_counts"]


def annotate(
    layered: LayeredGraph,
    shardings: ShardingTable,
    cluster: ClusterProfile,
    strategies: Sequence[Strategy],
    workload: Workload,
    timings: Mapping[TimingKey, LayerTiming],
    tallies: Tallies | None = None,
) -> CostTable:
    """Cost of every layer class under every strategy and number of micro-batches.

    tallies: what an Estimator (passes.layer_estimate) of this model and cluster counted already.
    """
    writer = LayerCosts.of(layered, shardings, cluster, workload, timings)
    writer.estimator.tallies.update(tallies or {})
    note_costs(layered, writer.estimator, list(strategies))
    entries: dict[tuple[int, Strategy, int], LayerCost] = {}
    illegal: dict[tuple[int, Strategy], str] = {}
    for class_index in range(len(layered.classes)):
        for strategy in strategies:
            reason = writer.why_not(class_index, strategy)
            counts = legal_counts(strategy, workload, layered)
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


def legal_counts(
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
