"""halves: Recorded → forward graph, backward graph, and backward in two halves."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from galvatron_compile.passes.trace import Recorded

# Views that the operator's schema does not tell.
_ALSO_VIEWS = frozenset({"aten._unsafe_view.default", "aten._reshape_alias.default"})
_IDENTITIES = frozenset(
    {"aten.detach.default", "aten.alias.default", "aten.lift_fresh_copy.default"}
)


@dataclass(frozen=True)
class Half:
    """A graph and where its inputs come from.

    graph: placeholders for ``given`` (places among the piece's arguments: parameters and buffers
        that need not be kept), then one ``kept`` list, then ``tangents`` (places among the outputs
        that have a gradient); returns a tuple.
    """

    graph: fx.Graph
    given: tuple[int, ...] = ()
    tangents: tuple[int, ...] = ()


@dataclass(frozen=True)
class Halves:
    """What a piece runs in training.

    forward: ``(values…, parameters…, buffers…, seed) -> (outputs…, kept…)``.
    backward: to the gradients of values and parameters that exist, in that order.
    backward_input: to the gradients of the values, then what ``backward_weight`` keeps.
    value_gradients, parameter_gradients: whether each of them exists.
    """

    forward: fx.Graph
    backward: Half
    backward_input: Half
    backward_weight: Half
    num_outputs: int
    tracked: tuple[bool, ...]
    value_gradients: tuple[bool, ...]
    parameter_gradients: tuple[bool, ...]


def take(kept: list[Tensor]) -> Tensor:
    """The next of the values that were kept; the list lets go of it."""
    return kept.pop(0)


def halves(recorded: Recorded, num_values: int, num_parameters: int) -> Halves:
    """Cut what was recorded behind forward, and backward behind the gradients of the values."""
    graph = recorded.module.graph
    nodes = list(graph.nodes)
    resolve = _without_identities(_written(nodes))
    gradients = [None if g is None else resolve(g) for g in recorded.gradients]
    outputs = [resolve(output) for output in recorded.outputs]
    fixed = {node: place for place, node in enumerate(recorded.arguments) if place >= num_values}
    tangents = {node: place for place, node in enumerate(recorded.tangents)}
    values, parameters = gradients[:num_values], gradients[num_values:]
    parameters = parameters[:num_parameters]
    found_values = [g for g in values if g is not None]
    found_parameters = [g for g in parameters if g is not None]

    cutter = _Cutter(resolve, nodes, fixed, tangents, recorded.backward)
    backward, kept = cutter.half([*found_values, *found_parameters], inside=recorded.backward)
    first = cutter.closed(cutter.needed(found_values) & recorded.backward)
    second = recorded.backward - first - tangents.keys()
    stash = cutter.stash(found_parameters, second)
    backward_weight, _ = cutter.half(found_parameters, inside=second, kept=stash)
    all_needed = cutter.needed([*found_values, *found_parameters])
    # Both ways read one kept list, in one order.
    backward_input, read = cutter.half(
        [*found_values, *stash],
        inside=recorded.backward,
        kept=kept,
        # Into what the second half reads.
        also=[node for node in first & all_needed if _mutates(node)],
    )
    assert set(read) <= set(kept), "the first half of backward reads no more than all of it"
    return Halves(
        forward=cutter.forward(recorded.arguments, [*outputs, *kept]),
        backward=backward,
        backward_input=backward_input,
        backward_weight=backward_weight,
        num_outputs=len(outputs),
        tracked=recorded.tracked,
        value_gradients=tuple(g is not None for g in values),
        parameter_gradients=tuple(g is not None for g in parameters),
    )


class _Cutter:
    """Copies parts of the recorded graph.

    fixed: placeholders of parameters and buffers, given again to every graph.
    """

    def __init__(
        self,
        resolve: Callable[[fx.Node], fx.Node],
        nodes: list[fx.Node],
        fixed: dict[fx.Node, int],
        tangents: dict[fx.Node, int],
        backward: frozenset[fx.Node],
    ) -> None:
        self.resolve, self.fixed, self.tangents, self.backward = resolve, fixed, tangents, backward
        self.place = {node: place for place, node in enumerate(nodes)}
        self.order = [node for node in nodes if node.op in ("call_function", "get_attr")]
        self.writes = _writes(self.order, resolve)

    def inputs(self, node: fx.Node) -> list[fx.Node]:
        """What a node reads, and the in-place operators that must have run on that before."""
        found = [self.resolve(source) for source in node.all_input_nodes]
        return [*found, *self.writes.get(node, ())]

    def needed(self, nodes: Iterable[fx.Node]) -> set[fx.Node]:
        found: set[fx.Node] = set()
        todo = list(nodes)
        while todo:
            node = todo.pop()
            if node not in found:
                found.add(node)
                todo += self.inputs(node)
        return found

    def closed(self, nodes: set[fx.Node]) -> frozenset[fx.Node]:
        """With everything up to the last in-place operator, whose order must stay, and with the
        elements of tuples, so that the second half keeps these and not the whole tuple."""
        mutating = [n for n in self.order if n in self.backward and _mutates(n)]
        if mutating:
            until = self.order.index(mutating[-1])
            nodes = nodes | {n for n in self.order[: until + 1] if n in self.backward}
        elements = {n for n in self.backward if _is_element(n) and n.args[0] in nodes}
        return frozenset(nodes | elements)

    def stash(self, wanted: Sequence[fx.Node], inside: frozenset[fx.Node]) -> list[fx.Node]:
        """What the part ``inside`` reads from outside of it, parameters and buffers apart."""
        _, kept = self.half(wanted, inside=inside)
        return kept

    def half(
        self,
        wanted: Sequence[fx.Node],
        *,
        inside: frozenset[fx.Node],
        kept: Sequence[fx.Node] | None = None,
        also: Sequence[fx.Node] = (),
    ) -> tuple[Half, list[fx.Node]]:
        """The graph that computes ``wanted`` from what is kept, and what that is.

        inside: nodes that it may compute. Views of what is kept are made again. also: in-place
        operators that it runs besides.
        """
        needed, sources = self._reach([*wanted, *also], inside)
        given = [node for node in self.fixed if node in sources]
        tangents = [node for node in self.tangents if node in sources and node in inside]
        read = [node for node in sources if node not in given and node not in tangents]
        read.sort(key=self.place.__getitem__)
        graph = fx.Graph()
        copies = {node: graph.placeholder(node.name) for node in given}
        box = graph.placeholder("kept")
        copies |= {node: graph.placeholder(node.name) for node in tangents}
        for node in read if kept is None else kept:
            copies[node] = graph.call_function(take, (box,))
        self._copy(graph, [node for node in self.order if node in needed], copies)
        graph.output(tuple(copies[node] for node in wanted))
        places = tuple(self.fixed[node] for node in given)
        return Half(graph, places, tuple(self.tangents[node] for node in tangents)), read

    def _reach(
        self, wanted: Sequence[fx.Node], inside: frozenset[fx.Node]
    ) -> tuple[set[fx.Node], set[fx.Node]]:
        """Nodes to compute, and nodes to be given or kept."""
        needed: set[fx.Node] = set()
        sources: set[fx.Node] = set()
        todo = list(wanted)
        while todo:
            node = todo.pop()
            if node in needed or node in sources:
                continue
            computed = node.op == "get_attr" or (
                node.op == "call_function" and (node in inside or is_view(node))
            )
            (needed if computed else sources).add(node)
            if computed:  # what wrote in place outside has run by then
                ordered = (w for w in self.writes.get(node, ()) if w in inside)
                todo += [*map(self.resolve, node.all_input_nodes), *ordered]
        return needed, sources

    def forward(self, arguments: Sequence[fx.Node], results: Sequence[fx.Node]) -> fx.Graph:
        graph = fx.Graph()
        copies = {node: graph.placeholder(node.name) for node in arguments}
        graph.placeholder("seed")
        needed = self.needed(results)
        nodes = [node for node in self.order if node in needed and node not in self.backward]
        self._copy(graph, nodes, copies)
        graph.output(tuple(copies[node] for node in results))
        return graph

    def _copy(
        self, graph: fx.Graph, nodes: Sequence[fx.Node], copies: dict[fx.Node, fx.Node]
    ) -> None:
        for node in nodes:
            copies[node] = graph.node_copy(node, lambda argument: copies[self.resolve(argument)])


def is_view(node: fx.Node) -> bool:
    """Whether the node only looks at its input's memory."""
    if node.op != "call_function":
        return False
    if str(node.target) in _ALSO_VIEWS:
        return True
    if _is_element(node):
        source = node.args[0]
        return isinstance(source, fx.Node) and is_view(source)
    if not isinstance(node.target, torch._ops.OpOverload):
        return False
    returned = node.target._schema.returns
    alias = returned[0].alias_info if returned else None
    return alias is not None and not alias.is_write


def _is_element(node: fx.Node) -> bool:
    return node.target is operator.getitem


def _mutates(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def _writes(
    order: Sequence[fx.Node], resolve: Callable[[fx.Node], fx.Node]
) -> dict[fx.Node, list[fx.Node]]:
    """For every node the in-place operators on memory that it reads and that ran before it."""
    base: dict[fx.Node, fx.Node] = {}
    written: dict[fx.Node, list[fx.Node]] = {}
    found: dict[fx.Node, list[fx.Node]] = {}
    for node in order:
        sources = [resolve(source) for source in node.all_input_nodes]
        roots = [base.get(source, source) for source in sources]
        found[node] = [w for root in roots for w in written.get(root, ()) if w is not node]
        if (is_view(node) or _mutates(node)) and roots:
            base[node] = roots[0]
        if _mutates(node) and roots:
            written.setdefault(roots[0], []).append(node)
    return found


def _written(nodes: Sequence[fx.Node]) -> set[fx.Node]:
    """Nodes whose own memory is changed in place."""
    base: dict[fx.Node, fx.Node] = {}
    found: set[fx.Node] = set()
    for node in nodes:
        if node.all_input_nodes and (is_view(node) or _mutates(node)):
            first = node.all_input_nodes[0]
            base[node] = base.get(first, first)
            if _mutates(node):
                found.add(base[node])
    return found


def _without_identities(written: set[fx.Node]) -> Callable[[fx.Node], fx.Node]:
    """Nodes that only pass their input on stand for that: there is no autograd any more. Autograd
    also transposes twice. A copy that is ``written`` to stays: the constant must not change."""

    def resolve(node: fx.Node) -> fx.Node:
        while True:
            source: Any = node.args[0] if node.args else None
            if str(node.target) in _IDENTITIES and node not in written:
                node = source
            elif _transposes(node) and _transposes(inner := resolve(source)):
                node = inner.args[0]  # type: ignore[assignment]
            else:
                return node

    return resolve


def _transposes(node: fx.Node) -> bool:
    return str(node.target) == "aten.t.default"
