"""Run a graph, or its layers one after the other, in one process: the oracle of every rewrite."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from galvatron_compile.batches import flatten_batch
from galvatron_compile.graph import Graph, LayeredGraph

Tensors = Mapping[str, torch.Tensor]


def run_graph(graph: Graph, batch: Any) -> torch.Tensor:
    """The scalar loss of ``graph`` on ``batch``, differentiable."""
    loss = graph.module(*graph_inputs(graph, batch))
    assert isinstance(loss, torch.Tensor)
    return loss


def graph_inputs(graph: Graph, batch: Any) -> list[torch.Tensor]:
    """One tensor per placeholder: the batch's, then the denominators of this batch alone."""
    tensors = flatten_batch(batch, graph.inputs)
    if graph.denominators is None:
        return tensors
    return [*tensors, *graph.denominators(*tensors)]


def run_layers(
    layered: LayeredGraph,
    batch: Any,
    parameters: Tensors | None = None,
    buffers: Tensors | None = None,
) -> torch.Tensor:
    """The scalar loss of ``layered`` on ``batch``, computed layer by layer, differentiable.

    parameters, buffers: used in place of the graph's own, under the same names (a model captured
        on the meta device has none to run with).
    """
    graph = layered.graph
    parameters = graph.parameters if parameters is None else parameters
    buffers = graph.buffers if buffers is None else buffers
    names = [node.name for node in graph.module.graph.find_nodes(op="placeholder")]
    values = dict(zip(names, graph_inputs(graph, batch), strict=True))
    for layer in layered.layers:
        results = layered.layer_class(layer).graph(
            *(values[name] for name in layer.inputs),
            *(parameters[name] for name in layer.parameters),
            *(buffers[name] for name in layer.buffers),
        )
        values |= zip(layer.outputs, results, strict=True)
    return values[layered.loss]
