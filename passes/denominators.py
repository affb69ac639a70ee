"""Weights of the batch that are summed over all parts before a step, and read in the graph."""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import fx

from galvatron_compile.errors import UnsupportedError
from galvatron_compile.graph import note, noted
from galvatron_compile.passes.sharding.views import shape_of, size_of
from galvatron_compile.torch_private import nodes_of_expression

aten = torch.ops.aten


class Denominators:
    """The weights whose sums over all parts come back into the graph as placeholders.

    The nodes that compute them live in the graph itself until :meth:`module` copies them out.
    A weight is made of the batch and of buffers, never of a parameter: every rank computes it by
    itself in front of a step, where no parameter is gathered.

    symbol: the batch size. parameters: targets of the ``get_attr`` nodes that are parameters.
    """

    def __init__(self, graph: fx.Graph, symbol: Any, parameters: Collection[str]) -> None:
        self.graph = graph
        self.symbol, self.parameters = symbol, parameters
        self.weights: list[fx.Node] = []
        self.placeholders: list[fx.Node] = []
        self.known: dict[tuple[object, ...], fx.Node] = {}
        nodes = list(graph.nodes)
        self.last_input = [node for node in nodes if node.op == "placeholder"][-1]
        self.first_call = next(node for node in nodes if node.op in ("call_function", "output"))

    def new(self, target: Callable[..., Any], *args: Any, **kwargs: Any) -> fx.Node:
        """A call with its ``meta["val"]``, at the graph's insertion point."""
        node = self.graph.call_function(target, args, kwargs)
        values = fx.map_arg((args, kwargs), lambda n: n.meta["val"])
        with _fake_mode(self.graph):
            node.meta["val"] = target(*values[0], **values[1])
        note(node, differentiable=False, data="R")
        return node

    def size(self, value: fx.Node, dim: int) -> fx.Node:
        return self.new(aten.sym_size.int, value, dim)

    def sum_of(self, weight: fx.Node, key: tuple[object, ...]) -> fx.Node:
        """The placeholder of the sum over all parts of a 0-dim ``weight``."""
        if key in self.known:
            return self.known[key]
        last = self.placeholders[-1] if self.placeholders else self.last_input
        with self.graph.inserting_after(last):
            node = self.graph.placeholder(f"denominator_{len(self.placeholders)}")
        with _fake_mode(self.graph):
            node.meta["val"] = torch.empty((), dtype=torch.float64, device=_device(self.graph))
        note(node, data="R", differentiable=False)
        self.weights.append(weight)
        self.placeholders.append(node)
        self.known[key] = node
        return node

    def parts(self) -> fx.Node:
        """The number of parts: every part weighs 1."""
        if ("parts",) in self.known:
            return self.known[("parts",)]
        with self.graph.inserting_before(self.first_call):
            one = self.full(1)
        parts = self.sum_of(one, ("parts",))
        note(parts, counts_parts=True)  # a layer with another data degree has more or fewer
        return parts

    def count(self, value: fx.Node, dim: int, factor: int, before: fx.Node) -> fx.Node:
        """``factor`` times the size of a batch dim, over all parts."""
        with self.graph.inserting_before(before):
            size = self.size(value, dim)
            weight = self.full(size if factor == 1 else self.times(size, factor))
        return self.sum_of(weight, ("count", size_of(size.meta["val"] * factor)))

    def times(self, size: fx.Node, factor: int) -> fx.Node:
        node = self.graph.call_function(operator.mul, (size, factor))
        node.meta["val"] = size.meta["val"] * factor
        note(node, differentiable=False, data="R")
        return node

    def full(self, value: Any) -> fx.Node:
        device = _device(self.graph)
        return self.new(aten.full.default, [], value, dtype=torch.float64, device=device)

    def divide(self, value: fx.Node, denominator: fx.Node, before: fx.Node) -> fx.Node:
        """``value / denominator`` in the dtype of ``value``."""
        with self.graph.inserting_before(before):
            dtype = value.meta["val"].dtype
            cast = denominator
            if denominator.meta["val"].dtype != dtype:
                cast = self.new(aten.to.dtype, denominator, dtype)
            return self.new(aten.div.Tensor, value, cast)

    def can_sum(self, value: fx.Node) -> bool:
        """One number, made of the rank's own samples alone.

        No parameter (not a frozen one either), no other denominator, nothing that was gathered.
        """
        tensor = value.meta["val"]
        if not isinstance(tensor, torch.Tensor) or tensor.dim():
            return False
        return not any(
            node in self.placeholders
            or node.target in self.parameters
            or noted(node, "differentiable")
            or noted(node, "data_inputs")
            for node in self._sources([value])
        )

    def total(self, value: fx.Node) -> fx.Node:
        """A partial sum that nothing differentiates, replaced by its sum over all parts."""
        summed = self.sum_of(value, ("total", value))
        if value.meta["val"].dtype == torch.float64:
            return summed
        with self.graph.inserting_after(value):
            return self.new(aten.to.dtype, summed, value.meta["val"].dtype)

    def _as_float64(self, graph: fx.Graph, weight: fx.Node) -> fx.Node:
        if weight.meta["val"].dtype == torch.float64:
            return weight
        cast = graph.call_function(aten.to.dtype, (weight, torch.float64))
        cast.meta["val"] = weight.meta["val"].to(torch.float64)
        return cast

    def module(self, root: fx.GraphModule) -> fx.GraphModule | None:
        """The graph from the batch's tensors to the weights; None if there are none.

        Sizes are those of a batch tensor, whatever value the model took them from.

        Raises:
            UnsupportedError: a weight needs a parameter.
        """
        if not self.weights:
            return None
        needed = self._sources(self.weights)
        graph = fx.Graph()
        mapping: dict[fx.Node, fx.Node] = {}
        for node in self.graph.nodes:
            if node.op == "placeholder" and node not in self.placeholders:
                mapping[node] = graph.node_copy(node, lambda n: mapping[n])
        sizes: dict[Any, fx.Node] = {}
        for node in self.graph.nodes:
            if node not in needed or node in mapping:
                continue
            if node.target in self.parameters:
                raise UnsupportedError(
                    f"the loss is divided by a number that is computed from the parameter "
                    f"{node.target}; compute that number from the batch alone"
                )
            if self._is_size(node):
                mapping[node] = self._size_of_batch(graph, mapping, sizes, node)
            else:
                mapping[node] = graph.node_copy(node, lambda n: mapping[n])
        results = [self._as_float64(graph, mapping[weight]) for weight in self.weights]
        output = graph.output(tuple(results))
        output.meta["val"] = tuple(result.meta["val"] for result in results)
        graph.lint()
        return fx.GraphModule(root, graph)

    def _is_size(self, node: fx.Node) -> bool:
        """A size that the batch size alone decides."""
        free: set[Any] = getattr(size_of(node.meta.get("val")), "free_symbols", set())
        return node.target is aten.sym_size.int and free == {self.symbol}

    def _size_of_batch(
        self,
        graph: fx.Graph,
        mapping: dict[fx.Node, fx.Node],
        sizes: dict[Any, fx.Node],
        node: fx.Node,
    ) -> fx.Node:
        """``node``'s number in ``graph``, from the size of a batch tensor; ``sizes`` are reused."""
        if self.symbol not in sizes:
            place, dim = self._batch_dim()
            base = graph.call_function(aten.sym_size.int, (mapping[place], dim))
            base.meta["val"] = place.meta["val"].shape[dim]
            sizes[self.symbol] = base
        expression = size_of(node.meta["val"])
        if expression not in sizes:
            base = sizes[self.symbol]
            sizes[expression] = nodes_of_expression(expression, {self.symbol: base})
        return sizes[expression]

    def _batch_dim(self) -> tuple[fx.Node, int]:
        """A placeholder with a dim of the batch's size, and that dim."""
        for node in self.graph.find_nodes(op="placeholder"):
            sizes = shape_of(node.meta["val"])
            if self.symbol in sizes:
                return node, sizes.index(self.symbol)
        raise AssertionError("the batch symbol is a size of some batch tensor")

    def _sources(self, nodes: Sequence[fx.Node]) -> set[fx.Node]:
        """``nodes`` and all that they are computed from; a size of the batch comes from nowhere."""
        seen: set[fx.Node] = set(nodes)
        queue = list(nodes)
        while queue:
            node = queue.pop()
            for before in () if self._is_size(node) else node.all_input_nodes:
                if before not in seen:
                    seen.add(before)
                    queue.append(before)
        return seen


def _fake_mode(graph: fx.Graph) -> Any:
    return next(
        value.fake_mode
        for node in graph.nodes
        if hasattr(value := node.meta.get("val"), "fake_mode")
    )


def _device(graph: fx.Graph) -> torch.device:
    values = (node.meta.get("val") for node in graph.nodes)
    return next(value.device for value in values if isinstance(value, torch.Tensor))
