"""Time of changing layout between neighbouring layers, for every pair of strategies."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from galvatron_compile.cluster import ClusterProfile
from galvatron_compile.collectives import conversion
from galvatron_compile.graph import LayeredGraph
from galvatron_compile.mesh import merge_ranks, tensor_ranks
from galvatron_compile.passes.arguments import concrete_shape, placeholders
from galvatron_compile.passes.reshard import Layout, Step, steps
from galvatron_compile.passes.sharding.table import ShardingTable
from galvatron_compile.placement import Placement, R
from galvatron_compile.strategy import Strategy

if TYPE_CHECKING:
    from galvatron_compile.passes.annotate import Workload


def resharding_ms(
    layered: LayeredGraph,
    shardings: ShardingTable,
    cluster: ClusterProfile,
    strategies: Sequence[Strategy],
    workload: Workload,
) -> dict[tuple[int, Strategy, Strategy, int], float]:
    """(cut after layer i, its strategy, the next layer's, micro-batches) → forward + backward ms.

    Only pairs that cost something are listed. A value that an earlier layer made is priced as if
    layer i had: exact where layouts change once on its way, an overestimate elsewhere.
    """
    priced: dict[tuple[int, Strategy, Strategy, int], float] = {}
    known: dict[tuple[object, ...], float] = {}
    for cut in range(len(layered.layers) - 1):
        before, after = layered.layers[cut], layered.layers[cut + 1]
        for source in strategies:
            for target in strategies:
                same = (source.tp, source.sequence_parallel)
                if same == (target.tp, target.sequence_parallel):
                    continue
                forms = (before.class_index, source), (after.class_index, target)
                if any(shardings.why_not(*form) is not None for form in forms):
                    continue
                for count in workload.micro_batch_counts:
                    batch = workload.global_batch_size // count
                    key = (
                        before.class_index, after.class_index, *same,
                        target.tp, target.sequence_parallel, batch,
                    )
                    if key not in known:
                        known[key] = _cut_ms(
                            layered, shardings, cluster, cut, source, target, batch, workload
                        )
                    if known[key] > 0:
                        priced[cut, source, target, count] = known[key]
    return priced


def _cut_ms(
    layered: LayeredGraph,
    shardings: ShardingTable,
    cluster: ClusterProfile,
    cut: int,
    source: Strategy,
    target: Strategy,
    batch: int,
    workload: Workload,
) -> float:
    """Micro-batch of ``batch`` samples over all ranks crossing from one layer to the next."""
    before, after = layered.layers[cut], layered.layers[cut + 1]
    made = dict(
        zip(before.outputs, shardings.get(before.class_index, source).outputs, strict=True)
    )
    wanted = shardings.get(after.class_index, target).inputs
    after_class = layered.layer_class(after)
    total_ms = 0.0
    for name, node, tensor, data in zip(
        after.inputs, placeholders(after_class.graph), wanted, after_class.data_inputs,
        strict=False,
    ):
        value = node.meta.get("val")
        if not isinstance(value, torch.Tensor) or name in layered.graph.inputs.names:
            continue
        shape = concrete_shape(value, layered.graph.batch_symbol, batch)
        whole = torch.Size(shape).numel() * value.dtype.itemsize
        differentiable = value.dtype.is_floating_point
        layouts = Layout(source.tp, made.get(name, R), data), Layout(target.tp, tensor, data)
        for step in steps(*layouts):
            total_ms += _step_ms(step, whole, data, cluster, workload.world_size, differentiable)
    return total_ms


def _step_ms(
    step: Step,
    whole_bytes: int,
    data: Placement,
    cluster: ClusterProfile,
    world_size: int,
    differentiable: bool,
) -> float:
    """``whole_bytes``: the value over all ranks; a rank's block of the batch is 1/dp of it."""
    small, large = step.axis
    within = small == large
    axis = tensor_ranks(world_size, small) if within else merge_ranks(world_size, small, large)
    block = whole_bytes // (world_size // large) if data.is_shard else whole_bytes
    found = conversion(step.source, step.target)
    if found is None or len(axis[0]) == 1:
        return 0.0
    kinds = [found.forward, *([found.backward] if differentiable else [])]
    moving = [kind for kind in kinds if kind not in ("none", "local")]
    return sum(cluster.collective_ms(kind, block, axis[0]) for kind in moving)
