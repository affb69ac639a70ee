"""The choice that the assignment has to make: every node's rules, and what is fixed."""

from __future__ import annotations

import operator
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Any

from torch import fx

from galvatron_compile.collectives import Conversion, conversion
from galvatron_compile.errors import ShapeError, UnsupportedError
from galvatron_compile.graph import LayerClass
from galvatron_compile.passes.sharding.prices import Prices, output_values
from galvatron_compile.passes.sharding.rules import (
    Rule,
    candidates,
    outers_of,
    tensor_inputs,
)
from galvatron_compile.passes.sharding.rules_base import is_differentiable
from galvatron_compile.placement import Placement, R, S, V

Value = tuple[fx.Node, int]  # a node and which of its outputs


@dataclass(frozen=True)
class Problem:
    """nodes: every node that makes or takes tensors with its candidate rules; placeholders and the
    output have rules of their own. uses: for every node, the values it takes, as its rules' inputs.
    """

    layer_class: LayerClass
    size: int
    sequence_parallel: bool
    rules: Mapping[fx.Node, tuple[Rule, ...]]
    uses: Mapping[fx.Node, tuple[Value, ...]]
    prices: Prices = field(repr=False)

    def price(self, node: fx.Node, index: int) -> float:
        rule = self.rules[node][index]
        if node.op == "placeholder":
            return self.prices.parameter(node, rule.outputs[0])
        if node.op == "call_function" and output_values(node):
            return self.prices.rule(node, rule, index)
        return 0.0

    def conversion_price(self, value: Value, source: Placement, target: Placement) -> float | None:
        """None where the value may not be converted so."""
        node, index = value
        if node in self.parameters and source.is_shard:
            return None  # a weight that is split stays split: gathering it is ZeRO's business
        found = legal_conversion(source, target)
        if found is None:
            return None
        return self.prices.conversion(output_values(node)[index], found, is_differentiable(node))

    @cached_property
    def parameters(self) -> list[fx.Node]:
        return placeholders_of(self.layer_class, "parameter")

    @cached_property
    def results(self) -> list[fx.Node]:
        """The tensors that the class returns."""
        return results_of(self.layer_class)


@lru_cache(maxsize=4096)
def legal_conversion(source: Placement, target: Placement) -> Conversion | None:
    """The conversion, if there is one and its outers are numbers."""
    if not (isinstance(source.outer, int) and isinstance(target.outer, int)):
        return None
    return conversion(source, target)


def placeholders_of(layer_class: LayerClass, kind: str) -> list[fx.Node]:
    placeholders = layer_class.graph.graph.find_nodes(op="placeholder")
    return [node for node, of in zip(placeholders, layer_class.kinds, strict=True) if of == kind]


def results_of(layer_class: LayerClass) -> list[fx.Node]:
    entries: Sequence[object] = layer_class.graph.graph.output_node().args[0]  # type: ignore[assignment]
    return [node for node in entries if isinstance(node, fx.Node) and output_values(node)]


def is_element(node: fx.Node) -> bool:
    """Whether the node takes one element of a list-valued node."""
    if node.target is not operator.getitem or not isinstance(node.args[0], fx.Node):
        return False
    return isinstance(node.args[0].meta.get("val"), list | tuple)


def value_of(node: fx.Node) -> Value:
    """The value a tensor-valued node stands for: elements are outputs of the list's node."""
    if is_element(node):
        source, index = node.args
        assert isinstance(source, fx.Node) and isinstance(index, int)
        return source, index
    return node, 0


def build_problem(
    layer_class: LayerClass,
    tp: int,
    sequence_parallel: bool,
    fixed: Mapping[int, Placement],
    tied: Collection[int] = (),
) -> Problem:
    """fixed: placements of some parameters by their index. tied: indices of parameters that another
    class places too, perhaps as V, which then must be possible here.
    """
    if tp == 1 and sequence_parallel:
        raise UnsupportedError("sequence parallel needs tp of at least 2; drop sp or raise tp")
    graph = layer_class.graph.graph
    outers = outers_of(graph, tp)
    boundary = _boundary(layer_class, tp, sequence_parallel)
    rules: dict[fx.Node, tuple[Rule, ...]] = {}
    uses: dict[fx.Node, tuple[Value, ...]] = {}
    inputs: dict[fx.Node, tuple[fx.Node, ...]] = {}
    for node in graph.nodes:
        inputs[node] = tuple(tensor_inputs(node))
        if node.op == "call_function" and not is_element(node) and (
            output_values(node) or inputs[node]
        ):
            rules[node] = _node_rules(node, tp, outers)
            uses[node] = tuple(map(value_of, inputs[node]))
        elif node.op == "get_attr" and output_values(node):
            rules[node], uses[node] = (Rule("constant", (), (R,)),), ()
    output, results = graph.output_node(), results_of(layer_class)
    rules[output] = (Rule("boundary", tuple(boundary[node] for node in results), ()),)
    uses[output] = tuple(map(value_of, results))
    _add_placeholders(layer_class, boundary, fixed, tied if tp > 1 else (), rules, uses)
    prices = Prices(layer_class, tp, sequence_parallel, inputs)
    return Problem(layer_class, tp, sequence_parallel, rules, uses, prices)


def _node_rules(node: fx.Node, tp: int, outers: tuple[Any, ...]) -> tuple[Rule, ...]:
    found = candidates(node, tp, outers=outers)
    if tp == 1:  # the same path with everything whole, so no conversion and the same numbers
        found = [rule for rule in found if all(p == R for p in (*rule.inputs, *rule.outputs))]
    if not found:
        raise UnsupportedError(f"operator {node.target} ({node.name}) has no sharding rule")
    return tuple(dict.fromkeys(found))


def _add_placeholders(
    layer_class: LayerClass,
    boundary: Mapping[fx.Node, Placement],
    fixed: Mapping[int, Placement],
    tied: Collection[int],
    rules: dict[fx.Node, tuple[Rule, ...]],
    uses: dict[fx.Node, tuple[Value, ...]],
) -> None:
    wanted: dict[Value, dict[Placement, None]] = {}
    for node, values in uses.items():
        for place, value in enumerate(values):
            wanted.setdefault(value, {}).update({rule.inputs[place]: None for rule in rules[node]})
    parameters = {node: i for i, node in enumerate(placeholders_of(layer_class, "parameter"))}
    for node in layer_class.graph.graph.find_nodes(op="placeholder"):
        if not output_values(node):
            continue
        uses[node] = ()
        if node in parameters:
            asked = [p for p in wanted.get((node, 0), {}) if p.is_shard or p == V]
            shared = [V] if parameters[node] in tied and is_differentiable(node) else []
            choices = list(dict.fromkeys([R, *asked, *shared]))
            if parameters[node] in fixed:
                choices = [fixed[parameters[node]]]
        else:
            choices = [boundary.get(node, R)]
        rules[node] = tuple(Rule("placeholder", (), (choice,)) for choice in choices)


def _boundary(
    layer_class: LayerClass, tp: int, sequence_parallel: bool
) -> dict[fx.Node, Placement]:
    """Tensor-axis placement of every activation input and every output."""
    activations = placeholders_of(layer_class, "activation")
    returned: Sequence[Any] = layer_class.graph.graph.output_node().args[0]  # type: ignore[assignment]
    ends = [*zip(activations, layer_class.data_inputs, strict=True)]
    ends += [*zip(returned, layer_class.data_outputs, strict=True)]
    ends = [(n, data) for n, data in ends if isinstance(n, fx.Node) and output_values(n)]
    found: dict[fx.Node, Placement] = dict.fromkeys((node for node, _ in ends), R)
    if not sequence_parallel:
        return found
    for node, data in ends:
        if _is_hidden(node, data):
            found[node] = S(1)
            length = output_values(node)[0].shape[1]
            if not isinstance(length, int) or length % tp:
                raise ShapeError(
                    f"sequence parallel over tp{tp} needs a sequence length divisible by {tp}, but "
                    f"{node.name} of layer class {layer_class.name} has {length}; drop sp or pad"
                )
    if S(1) not in found.values():
        raise UnsupportedError(
            f"layer class {layer_class.name} passes on no hidden states with a sequence dimension "
            "(floating point, at least 3 dims, batch first); drop sp"
        )
    return found


def _is_hidden(node: fx.Node, data: Placement) -> bool:
    value = output_values(node)[0]
    floating = value.dtype.is_floating_point and is_differentiable(node)
    return bool(floating and value.dim() >= 3 and data == S(0))
