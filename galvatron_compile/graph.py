"""The captured program: one graph, then the same graph as a list of layers.

Both are plain holders around ``torch.fx``; both print themselves. Everything that a pass learns
about a node lies under ``node.meta["custom"]["galvatron"]`` (see :func:`note`), the one key that
survives copies (shared/STYLE.md), and only that key is printed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from galvatron_compile.placement import Placement
from galvatron_compile.printer import format_graph, format_layers

KEY = "galvatron"


def note(node: fx.Node, **facts: object) -> None:
    """Write facts about ``node`` for later passes and for the printer."""
    node.meta.setdefault("custom", {}).setdefault(KEY, {}).update(facts)


def noted(node: fx.Node, fact: str, default: Any = None) -> Any:
    return node.meta.get("custom", {}).get(KEY, {}).get(fact, default)


def copy_annotated(module: fx.GraphModule) -> fx.GraphModule:
    """A new graph over the same parameters; annotations copied, not shared."""
    graph = fx.Graph()
    mapping: dict[fx.Node, fx.Node] = {}
    for node in module.graph.nodes:
        new = graph.node_copy(node, lambda n: mapping[n])
        new.meta = dict(node.meta)
        custom = node.meta.get("custom", {})
        new.meta["custom"] = {
            key: dict(value) if isinstance(value, dict) else value for key, value in custom.items()
        }
        mapping[node] = new
    return fx.GraphModule(module, graph)


@dataclass(frozen=True)
class InputSpec:
    """How a batch becomes the graph's flat tensor inputs.

    tree: the pytree spec of ``(args, kwargs)``.
    names: one name per leaf, the graph's placeholder names in order.
    batch_dims: the batch dimension of each leaf, None for a leaf without one.
    constants: keyword entries of the example without tensors, as (name, value); they are part of
        the program, not leaves, and a batch may leave them out but not change them.
    """

    tree: Any
    names: tuple[str, ...]
    batch_dims: tuple[int | None, ...]
    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[torch.dtype, ...]
    constants: tuple[tuple[str, Any], ...] = ()


@dataclass(frozen=True)
class Graph:
    """A training graph: placeholders are the batch's tensors, the one output is the scalar loss.

    Parameters, buffers and constants are ``get_attr`` nodes whose target is the original fully
    qualified name; tied parameters have one node, under the first of their names. Every node has
    ``meta["val"]``; the batch size is a symbol in its shapes.
    """

    module: fx.GraphModule
    inputs: InputSpec
    parameters: Mapping[str, torch.nn.Parameter]
    buffers: Mapping[str, torch.Tensor]
    tied: Mapping[str, str]  # every other name of a tied parameter -> the name it is kept under
    batch_symbol: Any  # sympy symbol of the batch size, None if the batch is not symbolic
    example_batch_size: int
    # From the batch pass: a graph from the batch's tensors to a tuple of scalars, the weights that
    # the loss's means divide by. Their sums over ranks and micro-batches come back into ``module``
    # through extra placeholders ``denominator_0``, … behind those of the batch.
    denominators: fx.GraphModule | None = None
    splits_batch: bool = True  # False if some operator mixes samples: one micro-batch only

    def __str__(self) -> str:
        return format_graph(self.module)


@dataclass(frozen=True)
class LayerClass:
    """One distinct layer as a pure function.

    graph: placeholders are the activations (``inputs``), then parameters, then buffers and
        constants, in the order of ``kinds``; the output is a tuple, one entry per layer output.
    kinds: ``"activation"``, ``"parameter"`` or ``"buffer"`` for every placeholder.
    data: placement of every activation on the data axis, from the batch pass.
    """

    name: str
    graph: fx.GraphModule
    kinds: tuple[str, ...]
    data_inputs: tuple[Placement, ...]
    data_outputs: tuple[Placement, ...]


@dataclass(frozen=True)
class Layer:
    """One layer of the model: a class and the values and parameters that it is applied to.

    inputs, outputs: names of values in the whole graph (inputs may be the graph's placeholders).
    parameters: fully qualified names, in the order of the class's parameter placeholders.
    buffers: names of buffers and constants, likewise.
    """

    name: str
    class_index: int
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    parameters: tuple[str, ...]
    buffers: tuple[str, ...]


@dataclass(frozen=True)
class LayeredGraph:
    """The model as layers in order. ``loss`` is the name of the value that is the loss."""

    graph: Graph
    classes: tuple[LayerClass, ...]
    layers: tuple[Layer, ...]
    loss: str

    def layer_class(self, layer: Layer) -> LayerClass:
        return self.classes[layer.class_index]

    def __str__(self) -> str:
        return format_layers(self)
