"""Cutting one stretch of the graph out as a pure function, and recognising equal ones."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch
from torch import fx

from galvatron_compile.graph import KEY, Graph, LayerClass, noted
from galvatron_compile.placement import Placement, R
from galvatron_compile.printer import structural_key
from galvatron_compile.torch_private import size_expression

aten = torch.ops.aten


def is_scalar(node: fx.Node) -> bool:
    """Whether the node is a size or other number, which never crosses a cut."""
    return node.op == "call_function" and not isinstance(
        node.meta["val"], (torch.Tensor, tuple, list)
    )


def crossing(graph: Graph, pieces: Sequence[Sequence[fx.Node]]) -> list[tuple[fx.Node, ...]]:
    """Of each piece, in order, the values that a later piece or the graph's output uses.

    Assumes that pieces hold no scalar nodes (they are computed again where they are used).
    """
    place = {node: at for at, piece in enumerate(pieces) for node in piece}
    (loss,) = graph.module.graph.output_node().all_input_nodes
    return [
        tuple(
            node
            for node in piece
            if node is loss or any(at < place.get(user, at) for user in users_through_scalars(node))
        )
        for at, piece in enumerate(pieces)
    ]


def users_through_scalars(node: fx.Node) -> set[fx.Node]:
    """Users of a tensor, without those that only ask for its sizes.

    A number read from the tensor's *contents* counts as a use by whoever uses the number.
    """
    found: set[fx.Node] = set()
    for user in node.users:
        if not is_scalar(user):
            found.add(user)
        elif user.target is not aten.sym_size.int:
            found |= users_through_scalars(user)
    return found


@dataclass
class _Cutter:
    """Copies one piece into a graph of its own. ``env`` maps old nodes to new ones."""

    graph: Graph
    piece: Sequence[fx.Node]
    new: fx.Graph = field(default_factory=fx.Graph)
    env: dict[fx.Node, fx.Node] = field(default_factory=dict)
    activations: list[fx.Node] = field(default_factory=list)
    parameters: list[fx.Node] = field(default_factory=list)
    buffers: list[fx.Node] = field(default_factory=list)
    sizes: dict[Any, fx.Node] = field(default_factory=dict)

    def find_inputs(self) -> None:
        """Everything from outside that the piece uses, each list in order of first use."""
        inside, seen = set(self.piece), set()
        needs_size = False
        pending = list(reversed(self.piece))
        while pending:
            node = pending.pop()
            if node in seen:
                continue
            seen.add(node)
            if node in inside or is_scalar(node):
                needs_size |= is_scalar(node)
                if node.target is not aten.sym_size.int:
                    pending.extend(reversed(node.all_input_nodes))
            elif node.op == "get_attr":
                known = node.target in self.graph.parameters
                (self.parameters if known else self.buffers).append(node)
            else:
                self.activations.append(node)
        if needs_size and not any(self.carries_batch(node) for node in self.activations):
            places = self.graph.module.graph.find_nodes(op="placeholder")
            self.activations.append(next(node for node in places if self.carries_batch(node)))

    def carries_batch(self, node: fx.Node) -> bool:
        """Whether the rank's share of the batch can be read from its shape."""
        if noted(node, "data") is not None and not _data_placement(node).is_shard:
            return False  # gathered: its size is that of the whole batch
        return any(self._multiple(size) is not None for size in node.meta["val"].shape)

    def _multiple(self, size: Any) -> int | None:
        """k if the size is k times the batch."""
        symbol = self.graph.batch_symbol
        if symbol is None or isinstance(size, int):
            return None
        factor = sympy.simplify(size_expression(size) / symbol)
        return int(factor) if factor.is_Integer else None

    def copy(self, outputs: Sequence[fx.Node], prefix: str) -> fx.GraphModule:
        for node in (*self.activations, *self.parameters, *self.buffers):
            name = node.name
            if node.op == "get_attr":
                name = str(node.target).removeprefix(prefix).replace(".", "_")
            place = self.env[node] = self.new.placeholder(name)
            place.target = place.name
            _copy_meta(node, place)
        for node in self.piece:
            self.env[node] = self.new.node_copy(node, self.value)
            _copy_meta(node, self.env[node])
        results = tuple(self.env[node] for node in outputs)
        self.new.output(results).meta["val"] = tuple(r.meta["val"] for r in results)
        self.new.lint()
        return fx.GraphModule(torch.nn.Module(), self.new)

    def value(self, node: fx.Node) -> fx.Node:
        if node not in self.env:
            assert is_scalar(node), f"{node} is used before it is computed"
            self.env[node] = self.number(node)
        return self.env[node]

    def number(self, node: fx.Node) -> fx.Node:
        """A number computed again: from an activation's size if it is one, else like before."""
        expression = size_expression(node.meta["val"])
        if noted(node, "data_inputs"):  # of a gathered value, whose size only looks the same
            new = self.new.node_copy(node, self.value)
            _copy_meta(node, new)
            return new
        if expression not in self.sizes:
            self.sizes[expression] = self._read_size(node, expression) or self._again(node)
        return self.sizes[expression]

    def _again(self, node: fx.Node) -> fx.Node:
        if node.target is aten.sym_size.int:  # of a value that is not here: a multiple of the batch
            return self._scaled(node)
        new = self.new.node_copy(node, self.value)
        _copy_meta(node, new)
        return new

    def _read_size(self, node: fx.Node, expression: Any) -> fx.Node | None:
        varies = self.graph.batch_symbol in getattr(expression, "free_symbols", ())
        for source in self.activations:
            if varies and not self.carries_batch(source):
                continue
            for dim, size in enumerate(source.meta["val"].shape):
                if size_expression(size) == expression:
                    new = self.new.call_function(aten.sym_size.int, (self.env[source], dim))
                    _copy_meta(node, new)
                    return new
        return None

    def _scaled(self, node: fx.Node) -> fx.Node:
        """k times the batch, read from a dim that is m times the batch."""
        wanted = self._multiple(node.meta["val"])
        for source in self.activations:
            for dim, size in enumerate(source.meta["val"].shape):
                have = self._multiple(size)
                if wanted is not None and have is not None:
                    read = self.new.call_function(aten.sym_size.int, (self.env[source], dim))
                    read.meta["val"] = size
                    times = self.new.call_function(operator.mul, (read, wanted))
                    times.meta["val"] = size * wanted
                    times = self.new.call_function(operator.floordiv, (times, have))
                    _copy_meta(node, times)
                    return times
        raise AssertionError(f"no activation tells the size {node.meta['val']}")


def _copy_meta(source: fx.Node, target: fx.Node) -> None:
    target.meta = {
        key: source.meta[key] for key in ("val", "nn_module_stack", "stack_trace")
        if key in source.meta
    }  # fmt: skip
    if facts := source.meta.get("custom", {}).get(KEY):
        target.meta["custom"] = {KEY: dict(facts)}


@dataclass(frozen=True)
class CutPiece:
    """A layer before classes are known. ``key`` is equal for layers that compute the same."""

    module: fx.GraphModule
    kinds: tuple[str, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    parameters: tuple[str, ...]
    buffers: tuple[str, ...]
    key: str

    def layer_class(self, name: str) -> LayerClass:
        places = self.module.graph.find_nodes(op="placeholder")[: len(self.inputs)]
        (results,) = self.module.graph.output_node().args
        assert isinstance(results, tuple)
        return LayerClass(
            name=name,
            graph=self.module,
            kinds=self.kinds,
            data_inputs=tuple(_data_placement(node) for node in places),
            data_outputs=tuple(_data_placement(node) for node in results),  # type: ignore[arg-type]
        )


def cut(
    graph: Graph, piece: Sequence[fx.Node], outputs: Sequence[fx.Node], prefix: str
) -> CutPiece:
    """``piece`` as a pure function that returns ``outputs``.

    prefix: the module path of the layer, left out of the placeholders' names.
    """
    cutter = _Cutter(graph, piece)
    cutter.find_inputs()
    module = cutter.copy(outputs, prefix)
    kinds = (
        *("activation" for _ in cutter.activations),
        *("parameter" for _ in cutter.parameters),
        *("buffer" for _ in cutter.buffers),
    )
    trained = [graph.parameters[str(p.target)].requires_grad for p in cutter.parameters]
    return CutPiece(
        module=module,
        kinds=kinds,
        inputs=tuple(node.name for node in cutter.activations),
        outputs=tuple(node.name for node in outputs),
        parameters=tuple(str(node.target) for node in cutter.parameters),
        buffers=tuple(str(node.target) for node in cutter.buffers),
        key=f"{structural_key(module.graph, kinds, graph.batch_symbol)} {trained}",
    )


def _data_placement(node: fx.Node) -> Placement:
    text = noted(node, "data")
    return R if text is None else Placement.parse(str(text))
