"""trace: PieceGraph → LayerGraphs, explicit forward and backward graphs without autograd.

The piece runs once on fake tensors while every operator is recorded, its backward too; what was
recorded before backward began is the forward graph. Forward keeps what backward reads: never a
parameter, which may be freed in between and is given again, and of a view its base.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx

from galvatron_compile import random_operators, transport
from galvatron_compile.errors import UnsupportedError
from galvatron_compile.mesh import Axis
from galvatron_compile.pieces import PieceGraph
from galvatron_compile.torch_private import fake_mode, record, recorded_graph

_SEEDED = "galvatron_seeded"  # in a node's meta: offset and coordinate of a random operator


@dataclass(frozen=True)
class Recorded:
    """One graph of forward and backward in the order in which they ran.

    arguments: values, parameters, buffers. tangents: gradients of the outputs that have one.
    backward: what ran in backward, and the tangents.
    outputs, gradients: nodes; a gradient may be None. tracked: which outputs have a gradient.
    examples: fake outputs.
    """

    module: fx.GraphModule
    arguments: tuple[fx.Node, ...]
    tangents: tuple[fx.Node, ...]
    backward: frozenset[fx.Node]
    outputs: tuple[fx.Node, ...]
    tracked: tuple[bool, ...]
    gradients: tuple[fx.Node | None, ...]
    examples: tuple[Tensor, ...]


def trace(piece: PieceGraph, arguments: Sequence[Tensor], wanted: Sequence[bool]) -> Recorded:
    """Record forward and backward of ``piece``.

    arguments: fake tensors for values, parameters and buffers; wanted: which get a gradient.

    Raises UnsupportedError, which names the operator, for what cannot be recorded.
    """
    try:
        return _trace(piece, arguments, wanted)
    except UnsupportedError:
        raise
    except Exception as error:
        what = str(error).strip().split("\n", 1)[0]  # behind it is the interpreter's state
        raise UnsupportedError(
            f"layer {piece.name!r} cannot be traced: {type(error).__name__}: {what}"
        ) from error


def _trace(piece: PieceGraph, arguments: Sequence[Tensor], wanted: Sequence[bool]) -> Recorded:
    outputs = _run(piece, arguments, wanted)[1]
    tracked = [output.requires_grad for output in outputs]
    with fake_mode(arguments), torch.no_grad():
        tangents = [
            torch.empty(output.shape, dtype=output.dtype, device=output.device)
            for output in outputs
            if output.requires_grad
        ]
    boundary: list[fx.Node] = []
    placed: list[int | None] = []

    def joint(given: Sequence[Tensor], tangents: Sequence[Tensor]) -> list[Tensor]:
        leaves, outputs = _run(piece, given, wanted)
        graph = recorded_graph()
        assert graph is not None, "joint runs while it is recorded"
        boundary.append(next(iter(reversed(graph.nodes))))
        ends = [output for output in outputs if output.requires_grad]
        inputs = [leaf for leaf in leaves if leaf.requires_grad]
        found: Sequence[Tensor | None] = []
        if ends and inputs:
            with fake_mode(given):  # the backward of ``where`` makes a number of its own
                found = torch.autograd.grad(ends, inputs, list(tangents), allow_unused=True)
        gradients = iter(found)
        each = [next(gradients) if leaf.requires_grad else None for leaf in leaves]
        placed.clear()
        results = list(outputs)
        for gradient in each:
            placed.append(None if gradient is None else len(results))
            if gradient is not None:
                results.append(gradient)
        return results

    module = record(joint, list(arguments), tangents)
    graph = module.graph
    nodes = list(graph.nodes)
    last = nodes.index(boundary[-1])
    results = list(graph.output_node().args[0])  # type: ignore[arg-type]
    places = [node for node in nodes if node.op == "placeholder"]
    count = len(arguments)
    backward = {node for node in nodes[last + 1 :] if node.op == "call_function"}
    return Recorded(
        module=module,
        arguments=tuple(places[:count]),
        tangents=tuple(places[count:]),
        backward=frozenset(backward | set(places[count:])),
        outputs=tuple(results[: len(outputs)]),
        tracked=tuple(tracked),
        gradients=tuple(None if at is None else results[at] for at in placed),
        examples=tuple(outputs),
    )


def shapes(piece: PieceGraph, arguments: Sequence[Tensor]) -> Sequence[Tensor]:
    """Fake outputs of the piece."""
    return _run(piece, arguments, [False] * len(arguments))[1]


def _run(
    piece: PieceGraph, given: Sequence[Tensor], wanted: Sequence[bool]
) -> tuple[list[Tensor], Sequence[Tensor]]:
    """Leaves and outputs of the piece, with autograd on and axes that record."""
    leaves = [
        value.detach().requires_grad_(flag) for value, flag in zip(given, wanted, strict=True)
    ]
    with fake_mode(given), torch.enable_grad():
        return leaves, _Recording(piece.module).run(*leaves, 0)


class _Recording(fx.Interpreter):
    """Runs a graph and the graphs that it calls, with collectives that are recorded."""

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        value = super().get_attr(target, args, kwargs)
        if isinstance(value, Axis) and value.size > 1:
            return replace(value, group=None, traced=True)
        return value

    def call_module(self, target: Any, args: Any, kwargs: Any) -> Any:
        module = self.fetch_attr(target)
        if isinstance(module, fx.GraphModule):
            return _Recording(module).run(*args, **kwargs)
        return super().call_module(target, args, kwargs)

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        if target is not random_operators.seeded:
            return super().call_function(target, args, kwargs)
        op, _, offset, coordinate, *rest = args
        graph = recorded_graph()
        before = len(graph.nodes) if graph is not None else 0
        result = op(*rest, **kwargs)
        place = coordinate.index if isinstance(coordinate, Axis) else coordinate
        if graph is not None:
            for node in list(graph.nodes)[before:]:
                if random_operators.is_random(node):
                    node.meta[_SEEDED] = (offset, place)
        return result


def bind(source: fx.Graph, constants: fx.GraphModule, axes: Mapping[str, Axis]) -> fx.GraphModule:
    """A copy with real collectives and seeded random operators in the place of what was recorded.

    constants: holds the tensors that the graph refers to by name. axes: by name.
    """
    graph = copy.deepcopy(source)
    attributes: dict[str, Any] = {
        str(node.target): getattr(constants, str(node.target))
        for node in graph.find_nodes(op="get_attr")
    }
    seeds = [node for node in graph.find_nodes(op="placeholder") if node.target == "seed"]
    for node in list(graph.nodes):
        if node.op != "call_function":
            continue
        if (found := _COLLECTIVES.get(str(node.target))) is not None:
            name = str(node.args[-1])
            attributes[f"axis_{name}"] = axes[name]
            with graph.inserting_before(node):
                axis = graph.create_node("get_attr", f"axis_{name}")
            node.target, node.args = found, (*_arguments(node), axis)
        elif _SEEDED in node.meta:
            offset, place = node.meta[_SEEDED]
            node.args = (node.target, seeds[0], offset, place, *node.args)
            node.target = random_operators.seeded
    module = fx.GraphModule(attributes, graph, class_name="Lowered")
    module.graph.lint()
    return module


def _all_reduce_max(x: Tensor, axis: Axis) -> Tensor:
    return transport.all_reduce(x, axis, transport.MAX)


_COLLECTIVES: dict[str, Callable[..., Any]] = {
    "galvatron.all_reduce.default": transport.all_reduce,
    "galvatron.all_gather.default": transport.all_gather,
    "galvatron.reduce_scatter.default": transport.reduce_scatter,
    "galvatron.all_to_all.default": transport.all_to_all,
    "galvatron.sum_add_rms_norm.default": transport.all_reduce_add_rms_norm,
    "galvatron.gather_linear.default": transport.gather_linear,
    "galvatron.linear_reduce_scatter.default": transport.linear_reduce_scatter,
}


def _arguments(node: fx.Node) -> tuple[Any, ...]:
    """Of the transport function: the operator's without the number of ranks and the name."""
    if str(node.args[1]) in ("sum", "max"):
        if node.args[1] == "max":
            node.target = _all_reduce_max
        return node.args[:1]
    return node.args[:-2]
