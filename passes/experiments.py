"""Which layer graphs to time on this device before planning."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from galvatron_compile.graph import LayeredGraph
from galvatron_compile.layer_timing import Experiment, FormKey
from galvatron_compile.mesh import Axis
from galvatron_compile.passes.annotate import Workload
from galvatron_compile.passes.arguments import differentiable_flags, make_arguments
from galvatron_compile.passes.normalise import retarget_devices
from galvatron_compile.passes.sharding import localise
from galvatron_compile.passes.sharding.table import ShardingTable
from galvatron_compile.printer import full_name
from galvatron_compile.strategy import Strategy


def experiments(
    layered: LayeredGraph,
    shardings: ShardingTable,
    strategies: Sequence[Strategy],
    workload: Workload,
    device: torch.device,
) -> list[Experiment]:
    """Every form of every class, at the smallest and the largest local batch that plans may use.

    Times in between are interpolated (galvatron_compile.layer_timing.interpolate).
    """
    runs = []
    for class_index, layer_class in enumerate(layered.classes):
        for form, batches in _forms(class_index, shardings, strategies, workload).items():
            _, tp, sp = form
            strategy = next(
                s for s in strategies if (s.tp, s.sequence_parallel) == (tp, sp)
            )
            sharded = shardings.get(class_index, strategy)
            graph = localise(sharded, Axis.dry_run(f"tp{tp}", tp))
            retarget_devices(graph, device)
            for size in sorted({min(batches), max(batches)}):
                text = f"{_describe(graph, layered)} batch={size}"
                run = _runner(graph, layered, layer_class.kinds, size, device)
                runs.append(Experiment((*form, size), text, run))
    return runs


def _forms(
    class_index: int,
    shardings: ShardingTable,
    strategies: Sequence[Strategy],
    workload: Workload,
) -> dict[FormKey, set[int]]:
    """Local batch sizes that each form of the class may run with."""
    wanted: dict[FormKey, set[int]] = {}
    for strategy in strategies:
        if shardings.why_not(class_index, strategy) is None:
            form = (class_index, strategy.tp, strategy.sequence_parallel)
            for count in workload.micro_batch_counts:
                local, rest = divmod(workload.global_batch_size, count * strategy.dp)
                if not rest:
                    wanted.setdefault(form, set()).add(local)
    return wanted


def _describe(graph: fx.GraphModule, layered: LayeredGraph) -> str:
    """The graph and its shapes, with the batch symbol under one name in every process."""
    lines = [
        f"{node.op} {full_name(node.target)} {node.args} {node.kwargs} "
        f"{getattr(node.meta.get('val'), 'shape', '')} {getattr(node.meta.get('val'), 'dtype', '')}"
        for node in graph.graph.nodes
    ]
    return "\n".join(lines).replace(str(layered.graph.batch_symbol), "batch")


def _runner(
    graph: fx.GraphModule,
    layered: LayeredGraph,
    kinds: tuple[str, ...],
    batch_size: int,
    device: torch.device,
) -> Callable[[], Any]:
    """A function that runs the graph on fresh arguments, made when first called."""
    flags = differentiable_flags(graph, kinds)
    made: list[Any] = []

    def forward() -> Any:
        if not made:
            symbol = layered.graph.batch_symbol
            made.extend(make_arguments(graph, symbol, batch_size, device))
        for value, wanted in zip(made, flags, strict=True):
            if wanted:
                value.requires_grad_(True).grad = None
        return graph(*made)

    return forward
