"""localise: ShardedLayer → the graph that one rank of the tensor axis runs."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import fx

from galvatron_compile import operators
from galvatron_compile.collectives import conversion
from galvatron_compile.errors import UnsupportedError
from galvatron_compile.graph import note, noted
from galvatron_compile.mesh import Axis
from galvatron_compile.passes.sharding.grouped_queries import share_heads
from galvatron_compile.passes.sharding.problem import is_element, value_of
from galvatron_compile.passes.sharding.propagate import local_value, propagate, whole_value
from galvatron_compile.passes.sharding.rules import Emitter, tensor_inputs
from galvatron_compile.passes.sharding.rules_base import is_differentiable
from galvatron_compile.passes.sharding.sharded_layer import ShardedLayer
from galvatron_compile.placement import Placement, R


def localise(sharded: ShardedLayer, axis: Axis) -> fx.GraphModule:
    """The layer's graph for one rank of ``axis``, with its collectives as nodes.

    Placeholders are the class's, with local shapes, then ``seed`` (an int in which the caller has
    mixed the layer, the step, the micro-batch and the data coordinate). The axis is the attribute
    ``axis_<name>``. Every node has ``meta["val"]`` in local shapes and its placement as a note.
    """
    if axis.size != sharded.tp:
        raise ValueError(f"the layer is sharded over {sharded.tp} ranks, {axis} has {axis.size}")
    return _Localiser(sharded, axis).run()


class Converter:
    """Inserts conversions along one axis into a graph, each once per (value, target)."""

    def __init__(self, graph: fx.Graph, axis: fx.Node) -> None:
        self.graph, self.axis = graph, axis
        self.done: dict[tuple[fx.Node, Placement], fx.Node] = {}

    def __call__(
        self, node: fx.Node, source: Placement, target: Placement, differentiable: bool
    ) -> fx.Node:
        """``node`` with placement ``target``; a new node right where the graph is being written."""
        if source == target:
            return node
        if (node, target) not in self.done:
            self.done[node, target] = self._insert(node, source, target, differentiable)
        return self.done[node, target]

    def _insert(
        self, node: fx.Node, source: Placement, target: Placement, differentiable: bool
    ) -> fx.Node:
        step = conversion(source, target)
        if step is None:
            raise UnsupportedError(
                f"cannot convert {node.name} from {source} to {target} along {self.axis.name}"
            )
        if step.forward == "none" and not differentiable:
            return node  # only the gradient's type changes, and there is no gradient
        args: tuple[Any, ...] = (node, *step.arguments, self.axis)
        made = self.graph.call_function(step.function, args)
        copy_notes(made, node)
        note(made, data_inputs=None)  # the node's own demand, not that of its conversion
        note(made, tensor=str(target), conversion=f"{source}→{target}")
        return made


def copy_notes(made: fx.Node, of: fx.Node) -> None:
    """Metadata of ``of``, but not its value, whose local shape is not known yet."""
    for key, entry in of.meta.items():
        if key != "val":
            made.meta[key] = copy.deepcopy(entry) if key == "custom" else entry


class _Localiser:
    def __init__(self, sharded: ShardedLayer, axis: Axis) -> None:
        self.sharded, self.axis = sharded, axis
        self.source = sharded.layer_class.graph
        self.graph = fx.Graph()
        self.local: dict[fx.Node, fx.Node] = {}
        self.num_random = 0

    def run(self) -> fx.GraphModule:
        placeholders = self.source.graph.find_nodes(op="placeholder")
        for node in placeholders:
            self._placeholder(node)
        self.seed = self.graph.placeholder("seed")
        self.seed.meta["val"] = 0
        self.axis_node = self.graph.get_attr(f"axis_{self.axis.name}")
        self.convert = Converter(self.graph, self.axis_node)
        for node in self.source.graph.nodes:
            if node.op == "output":
                self._output(node)
            elif node.op != "placeholder":
                self.local[node] = self._call(node)
        if not self.axis_node.users:
            self.graph.erase_node(self.axis_node)
        attributes: dict[str, Any] = {
            node.target: _attribute(self.source, node.target)
            for node in self.source.graph.find_nodes(op="get_attr")
        }
        attributes[f"axis_{self.axis.name}"] = self.axis
        module = fx.GraphModule(attributes, self.graph, class_name="LocalLayer")
        propagate(module)
        share_heads(module)
        module.graph.lint()
        return module

    def _placeholder(self, node: fx.Node) -> None:
        made = self.graph.placeholder(node.name)
        copy_notes(made, node)
        placement = self.sharded.placements.get(node.name, (R,))[0]
        made.meta["val"] = local_value(node.meta.get("val"), placement, self.axis.size)
        note(made, tensor=str(placement))
        self.local[node] = made

    def _call(self, node: fx.Node) -> fx.Node:
        rule = self.sharded.rules.get(node.name)
        last = next(iter(reversed(self.graph.nodes)))
        if rule is None:  # a constant, an element of a list, arithmetic on sizes
            made = self.graph.node_copy(node, lambda argument: self.local[argument])
            made.meta.pop("val", None)
        else:
            args, kwargs = self._arguments(node, rule.inputs)
            if rule.emit is None:
                made = self.graph.create_node(node.op, node.target, args, kwargs, node.name)
            else:
                emitter = Emitter(
                    self.graph, node, args, kwargs, self.axis_node, self.axis.size
                )
                made = rule.emit(emitter)
        sharded = rule is not None and any(
            placement.is_shard for placement in (*rule.inputs, *rule.outputs)
        )
        several = rule is not None and len(_own(last)) > 1
        if several and noted(node, "data_inputs"):
            raise UnsupportedError(
                f"{node.name} mixes samples and its tensor-parallel form is several operators; "
                "use tp1 for its layer"
            )
        for fresh in _after(last):
            if noted(fresh, "conversion") is None:
                copy_notes(fresh, node)
            if fresh.op == "call_function" and operators.is_random(fresh):
                self._seed(fresh, sharded)
        if is_element(node):
            source, index = value_of(node)
            note(made, tensor=str(self.sharded.placements[source.name][index]))
        elif node.name in self.sharded.placements:
            note(made, tensor=", ".join(map(str, self.sharded.placements[node.name])))
        return made

    def _arguments(
        self, node: fx.Node, targets: tuple[Placement, ...]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        tensors = tensor_inputs(node)
        wanted: Iterator[Placement] = iter(targets)

        def visit(argument: fx.Node) -> fx.Node:
            if argument in tensors:
                return self._converted(argument, next(wanted))
            return self.local[argument]

        args = fx.map_arg(node.args, visit)
        return args, fx.map_arg(node.kwargs, visit)

    def _converted(self, value: fx.Node, target: Placement) -> fx.Node:
        node, index = value_of(value)
        source = self.sharded.placements[node.name][index]
        return self.convert(self.local[value], source, target, is_differentiable(value))

    def _seed(self, node: fx.Node, sharded: bool) -> None:
        """Draw from a stream of its own: different along the axis only where the value is cut."""
        coordinate = self.axis_node if sharded and self.axis.size > 1 else 0
        stream: tuple[Any, ...] = (node.target, self.seed, self.num_random, coordinate)
        node.args = (*stream, *node.args)
        node.target = operators.seeded
        self.num_random += 1

    def _output(self, node: fx.Node) -> None:
        values = list(node.args[0])  # type: ignore[arg-type]
        results = [
            self._converted(value, target) if isinstance(value, fx.Node) else value
            for value, target in zip(values, self.sharded.outputs, strict=True)
        ]
        copy_notes(self.graph.output(tuple(results)), node)


def _after(last: fx.Node) -> list[fx.Node]:
    found = []
    node = last.next
    while node.op != "root":
        found.append(node)
        node = node.next
    return found


def _own(last: fx.Node) -> list[fx.Node]:
    """The operators written after ``last``, without the conversions of their inputs."""
    return [node for node in _after(last) if noted(node, "conversion") is None]


def _attribute(module: torch.nn.Module, path: str) -> Any:
    value: Any = module
    for name in path.split("."):
        value = getattr(value, name)
    return value


def gather_batch(module: fx.GraphModule, axis: Axis) -> fx.GraphModule:
    """The graph with operators that mix samples run on the whole batch of the data axis.

    The batch pass notes ``data_inputs`` on such nodes: the placements on the data axis that their
    tensor inputs must have. Returns ``module`` itself where there is nothing to convert.
    """
    wanted = {node: noted(node, "data_inputs") for node in module.graph.nodes}
    if axis.size == 1 or not any(wanted.values()):
        return module
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    attribute = f"axis_{axis.name}"
    converters: list[Converter] = []
    for node in module.graph.nodes:
        if node.op != "placeholder" and not converters:
            converters.append(Converter(graph, graph.get_attr(attribute)))
        if wanted[node] and node.op != "placeholder":
            args, kwargs = _batch_arguments(node, wanted[node], copies, converters[0])
            made = graph.create_node(node.op, node.target, args, kwargs, node.name)
            copy_notes(made, node)
        else:
            made = graph.node_copy(node, lambda argument: copies[argument])
        if node.op == "placeholder" and (placed := noted(node, "data")):
            made.meta["val"] = whole_value(node.meta.get("val"), _placement(placed), axis.size)
        copies[node] = made
    attributes: Mapping[str, Any] = {
        node.target: _attribute(module, node.target)
        for node in module.graph.find_nodes(op="get_attr")
    } | {attribute: axis}
    made_module = fx.GraphModule(dict(attributes), graph, class_name="LocalLayer")
    propagate(made_module)
    made_module.graph.lint()
    return made_module


def _batch_arguments(
    node: fx.Node,
    targets: Any,
    copies: Mapping[fx.Node, fx.Node],
    convert: Callable[[fx.Node, Placement, Placement, bool], fx.Node],
) -> tuple[Any, Any]:
    tensors = tensor_inputs(node)
    wanted = iter(targets)

    def visit(argument: fx.Node) -> fx.Node:
        if argument not in tensors:
            return copies[argument]
        source, target = noted(argument, "data"), next(wanted)
        if source is None:
            raise UnsupportedError(f"{argument.name} has no placement on the data axis")
        ends = _placement(source), _placement(target)
        return convert(copies[argument], *ends, is_differentiable(argument))

    return fx.map_arg(node.args, visit), fx.map_arg(node.kwargs, visit)


def _placement(noted_as: Placement | str) -> Placement:
    return noted_as if isinstance(noted_as, Placement) else Placement.parse(noted_as)
