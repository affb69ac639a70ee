"""The graph of a stage, one piece a layer, each of which runs forward and backward by itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, fx

Gradients = tuple[list[Tensor | None], list[Tensor | None]]  # of the values, of the parameters


@dataclass(frozen=True)
class PieceGraph:
    """A layer with the conversions in front of it: ``module(*arguments) -> outputs``.

    The arguments are ``values`` (names in the stage's graph), then ``parameters`` (unit number,
    place in the unit), then ``buffers``, then the layer's seed.

    differentiable: whether each of ``values`` gets a gradient. returns: whether each of ``outputs``
        may have one.
    drops: values that no later piece uses. seed: the layer's number and the data coordinate.
    """

    layer: int
    name: str
    module: fx.GraphModule
    evaluation: fx.GraphModule
    values: tuple[str, ...]
    differentiable: tuple[bool, ...]
    parameters: tuple[tuple[int, int], ...]
    buffers: tuple[Tensor, ...]
    outputs: tuple[str, ...]
    returns: tuple[bool, ...]
    drops: tuple[str, ...]
    seed: tuple[int, int]
    recompute: bool
    has_trained: bool  # a parameter that gets a gradient

    @property
    def trains(self) -> bool:
        """Whether there is a backward at all."""
        return any(self.returns) and (any(self.differentiable) or self.has_trained)

    @property
    def units(self) -> tuple[int, ...]:
        return tuple(dict.fromkeys(unit for unit, _ in self.parameters))


class Piece(Protocol):
    """How a piece runs. ``kept`` is what its forward keeps for its backward, of any kind."""

    graph: PieceGraph
    weights_for_weights: bool  # backward_weight reads parameters

    def forward(
        self, values: Sequence[Tensor], parameters: Sequence[Tensor], seed: int
    ) -> tuple[Sequence[Tensor], Any]:
        """Outputs without autograd history, and what backward needs."""
        ...

    def recompute(self, kept: Any, parameters: Sequence[Tensor], seed: int) -> Any:
        """What backward needs, from the little that forward kept."""
        ...

    def backward(
        self, kept: Any, parameters: Sequence[Tensor], gradients: Sequence[Tensor | None]
    ) -> Gradients:
        """Gradients of values and parameters from those of the outputs; None: there is none."""
        ...

    def backward_input(
        self, kept: Any, parameters: Sequence[Tensor], gradients: Sequence[Tensor | None]
    ) -> tuple[list[Tensor | None], Any]:
        """Gradients of the values only, and what :meth:`backward_weight` needs."""
        ...

    def backward_weight(self, kept: Any, parameters: Sequence[Tensor]) -> list[Tensor | None]:
        """Gradients of the parameters."""
        ...


def apart(outputs: Sequence[Tensor], parameters: Sequence[Tensor]) -> list[Tensor]:
    """Outputs that look at a parameter's memory (positions, say), copied: ZeRO-3 frees that memory
    before they are used."""
    held = {parameter.untyped_storage().data_ptr() for parameter in parameters}
    return [o.clone() if o.untyped_storage().data_ptr() in held else o for o in outputs]


@dataclass
class _Tape:
    """What eager autograd holds of one forward."""

    inputs: list[Tensor]
    outputs: Sequence[Tensor]


class EagerPiece:
    """The rewritten graph under eager autograd: a piece's meaning, and the oracle of others."""

    weights_for_weights = True  # autograd goes through the whole layer again

    def __init__(self, graph: PieceGraph) -> None:
        self.graph = graph

    def forward(
        self, values: Sequence[Tensor], parameters: Sequence[Tensor], seed: int
    ) -> tuple[Sequence[Tensor], Any]:
        inputs = [
            value.detach().requires_grad_(flag)
            for value, flag in zip(values, self.graph.differentiable, strict=True)
        ]
        if self.graph.recompute:
            with torch.no_grad():
                outputs = self.graph.module(*inputs, *parameters, *self.graph.buffers, seed)
            return apart(outputs, parameters), _Tape(inputs, ())
        tape = self._record(inputs, parameters, seed)
        return apart([output.detach() for output in tape.outputs], parameters), tape

    def _record(self, inputs: list[Tensor], parameters: Sequence[Tensor], seed: int) -> _Tape:
        with torch.enable_grad():
            outputs = self.graph.module(*inputs, *parameters, *self.graph.buffers, seed)
        return _Tape(inputs, outputs)

    def recompute(self, kept: Any, parameters: Sequence[Tensor], seed: int) -> Any:
        return self._record(kept.inputs, parameters, seed)

    def backward(
        self, kept: Any, parameters: Sequence[Tensor], gradients: Sequence[Tensor | None]
    ) -> Gradients:
        inputs, both = kept.inputs, [*kept.inputs, *parameters]
        found = _gradients(kept.outputs, gradients, both, keep=False)
        return found[: len(inputs)], found[len(inputs) :]

    def backward_input(
        self, kept: Any, parameters: Sequence[Tensor], gradients: Sequence[Tensor | None]
    ) -> tuple[list[Tensor | None], Any]:
        return _gradients(kept.outputs, gradients, kept.inputs, keep=True), (kept, gradients)

    def backward_weight(self, kept: Any, parameters: Sequence[Tensor]) -> list[Tensor | None]:
        tape, gradients = kept
        return _gradients(tape.outputs, gradients, parameters, keep=False)


def _gradients(
    outputs: Sequence[Tensor],
    gradients: Sequence[Tensor | None],
    wanted: Sequence[Tensor],
    *,
    keep: bool,
) -> list[Tensor | None]:
    """As torch.autograd.grad, of what has a gradient to what wants one."""
    ends = [
        (output, gradient)
        for output, gradient in zip(outputs, gradients, strict=True)
        if gradient is not None and output.requires_grad
    ]
    found: list[Tensor | None] = [None] * len(wanted)
    places = [place for place, tensor in enumerate(wanted) if tensor.requires_grad]
    if ends and places:
        computed = torch.autograd.grad(
            [output for output, _ in ends],
            [wanted[place] for place in places],
            [gradient for _, gradient in ends],
            retain_graph=keep,
            allow_unused=True,
        )
        for place, gradient in zip(places, computed, strict=True):
            found[place] = gradient
    return found
