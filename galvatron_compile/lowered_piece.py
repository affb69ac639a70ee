"""A layer as explicit forward and backward graphs, run without autograd."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from galvatron_compile.pieces import Gradients, PieceGraph, apart


@dataclass(frozen=True)
class BackwardGraph:
    """module: ``(given…, kept: list, tangents…) -> gradients``; it empties ``kept`` as it goes.

    given: places among the piece's arguments, of parameters and buffers that it reads.
    tangents: places among the outputs that have a gradient.
    """

    module: fx.GraphModule
    given: tuple[int, ...]
    tangents: tuple[int, ...]


@dataclass(frozen=True)
class LayerGraphs:
    """All graphs of a layer's training; layers of one class and strategy share them.

    forward: ``(values…, parameters…, buffers…, seed) -> (outputs…, kept…)``.
    backward: gives the gradients of the values, then of the parameters; ``backward_input`` those
        of the values and what ``backward_weight`` keeps for those of the parameters.
    outputs: shapes, dtypes and devices of the outputs, as fake tensors.
    value_gradients, parameter_gradients: which of the gradients exist.
    """

    forward: fx.GraphModule
    backward: BackwardGraph
    backward_input: BackwardGraph
    backward_weight: BackwardGraph
    outputs: tuple[Tensor, ...]
    value_gradients: tuple[bool, ...]
    parameter_gradients: tuple[bool, ...]


class LoweredPiece:
    """See the protocol :class:`~galvatron_compile.pieces.Piece`; ``kept`` is a list of tensors."""

    def __init__(self, graph: PieceGraph, graphs: LayerGraphs) -> None:
        self.graph, self.graphs = graph, graphs
        self.num_outputs = len(graph.outputs)
        first = len(graph.values) + len(graph.parameters)
        self._fixed = {first + place: buffer for place, buffer in enumerate(graph.buffers)}
        given = graphs.backward_weight.given
        self.weights_for_weights = any(place not in self._fixed for place in given)

    def forward(
        self, values: Sequence[Tensor], parameters: Sequence[Tensor], seed: int
    ) -> tuple[Sequence[Tensor], Any]:
        results = self._forward(values, parameters, seed)
        outputs = apart(results[: self.num_outputs], parameters)
        if self.graph.recompute:
            return outputs, list(values)
        return outputs, list(results[self.num_outputs :])

    @torch.no_grad()
    def _forward(
        self, values: Sequence[Tensor], parameters: Sequence[Tensor], seed: int
    ) -> tuple[Tensor, ...]:
        found = self.graphs.forward(*values, *parameters, *self.graph.buffers, seed)
        assert isinstance(found, tuple)
        return found

    def recompute(self, kept: Any, parameters: Sequence[Tensor], seed: int) -> Any:
        return list(self._forward(kept, parameters, seed)[self.num_outputs :])

    def backward(
        self, kept: Any, parameters: Sequence[Tensor], gradients: Sequence[Tensor | None]
    ) -> Gradients:
        found = iter(self._backward(self.graphs.backward, kept, parameters, gradients))
        values = [next(found) if there else None for there in self.graphs.value_gradients]
        return values, self._weights(list(found))

    def backward_input(
        self, kept: Any, parameters: Sequence[Tensor], gradients: Sequence[Tensor | None]
    ) -> tuple[list[Tensor | None], Any]:
        found = self._backward(self.graphs.backward_input, kept, parameters, gradients)
        there = self.graphs.value_gradients
        stash, results = list(found[sum(there) :]), iter(found)
        return [next(results) if exists else None for exists in there], stash

    def backward_weight(self, kept: Any, parameters: Sequence[Tensor]) -> list[Tensor | None]:
        found = self._backward(self.graphs.backward_weight, kept, parameters, ())
        return self._weights(list(found))

    def _weights(self, found: list[Tensor]) -> list[Tensor | None]:
        results = iter(found)
        return [next(results) if there else None for there in self.graphs.parameter_gradients]

    @torch.no_grad()
    def _backward(
        self,
        graph: BackwardGraph,
        kept: list[Tensor],
        parameters: Sequence[Tensor],
        gradients: Sequence[Tensor | None],
    ) -> tuple[Tensor, ...]:
        first = len(self.graph.values)
        given = [
            self._fixed[place] if place in self._fixed else parameters[place - first]
            for place in graph.given
        ]
        tangents = [self._tangent(place, gradients[place]) for place in graph.tangents]
        found = graph.module(*given, kept, *tangents)
        assert isinstance(found, tuple)
        return found

    def _tangent(self, place: int, gradient: Tensor | None) -> Tensor:
        """Contiguous, as it was traced; zeros where nothing that follows gave one."""
        if gradient is not None:
            return gradient.contiguous()
        like = self.graphs.outputs[place]
        return torch.zeros(like.shape, dtype=like.dtype, device=like.device)
