"""Layers to be traced: written by hand or drawn at random, and what must hold of their graphs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx

from galvatron_compile.lowered_piece import LayerGraphs, LoweredPiece
from galvatron_compile.passes.lower import bound, cut_in_two
from galvatron_compile.pieces import EagerPiece, Piece, PieceGraph
from galvatron_compile.random_operators import seeded
from galvatron_compile.torch_private import as_fake

Found = tuple[list[Tensor], list[Tensor | None]]  # outputs; gradients of values, then parameters
SEED = 12345


@dataclass(frozen=True)
class Layer:
    """A layer with its arguments; those that require a gradient get one."""

    graph: PieceGraph
    values: tuple[Tensor, ...]
    parameters: tuple[Tensor, ...]

    @property
    def arguments(self) -> tuple[Tensor, ...]:
        return (*self.values, *self.parameters, *self.graph.buffers)

    @property
    def wanted(self) -> list[bool]:
        return [argument.requires_grad for argument in self.arguments]

    def lowered(self) -> LoweredPiece:
        return LoweredPiece(self.graph, self.traced())

    def traced(self) -> LayerGraphs:
        recorded, cut = cut_in_two(self.graph, as_fake(self.arguments), self.wanted)
        return bound(recorded, cut, {})


def layer(
    module: fx.GraphModule,
    values: Sequence[Tensor],
    parameters: Sequence[Tensor] = (),
    buffers: Sequence[Tensor] = (),
) -> Layer:
    """``module(*values, *parameters, *buffers, seed) -> tuple`` as a piece of its own."""
    with torch.enable_grad():
        outputs = module(*values, *parameters, *buffers, SEED)
    graph = PieceGraph(
        layer=0,
        name="layer",
        module=module,
        evaluation=module,
        values=tuple(f"value_{place}" for place in range(len(values))),
        differentiable=tuple(value.requires_grad for value in values),
        parameters=tuple((0, place) for place in range(len(parameters))),
        buffers=tuple(buffers),
        outputs=tuple(f"output_{place}" for place in range(len(outputs))),
        returns=tuple(output.requires_grad for output in outputs),
        drops=(),
        seed=(0, 0),
        recompute=False,
        has_trained=any(parameter.requires_grad for parameter in parameters),
    )
    return Layer(graph, tuple(values), tuple(parameters))


def constant(x: Tensor, *numbers: float) -> Tensor:
    """A tensor that a layer makes by itself when it runs (``x`` is not read)."""
    return torch.tensor(numbers, dtype=torch.float64)


def written(function: Callable[..., Any], *arguments: Any) -> Layer:
    """A layer from a Python function of (values…, parameters…, seed).

    arguments: the values as a list, then the parameters as a list.
    """
    tracer = fx.Tracer(autowrap_functions=(seeded, constant))
    graph = tracer.trace(function)
    return layer(fx.GraphModule(tracer.root, graph), *arguments)


# What autograd says, and what must hold.


def tangents(outputs: Sequence[Tensor]) -> list[Tensor | None]:
    generator = torch.Generator().manual_seed(7)
    return [
        torch.randn(output.shape, generator=generator, dtype=torch.float64).to(output.dtype)
        if output.requires_grad
        else None
        for output in outputs
    ]


def by_autograd(case: Layer) -> tuple[Found, list[Tensor | None]]:
    """Outputs and gradients of autograd itself, and the tangents that they are for."""
    leaves = [a.detach().clone().requires_grad_(a.requires_grad) for a in case.arguments]
    outputs = case.graph.module(*leaves, SEED)
    given = tangents(outputs)
    ends = [(o, t) for o, t in zip(outputs, given, strict=True) if t is not None]
    wanted = [leaf for leaf in leaves if leaf.requires_grad]
    found = iter(
        torch.autograd.grad(
            [o for o, _ in ends], wanted, [t for _, t in ends], allow_unused=True
        )
        if ends and wanted
        else [None] * len(wanted)
    )
    gradients = [next(found) if leaf.requires_grad else None for leaf in leaves]
    count = len(case.values) + len(case.parameters)
    return ([output.detach() for output in outputs], gradients[:count]), given


def whole(piece: Piece, case: Layer, given: Sequence[Tensor | None]) -> Found:
    outputs, kept, parameters = _forward(piece, case)
    values, weights = piece.backward(kept, parameters, given)
    _emptied(piece, kept)
    return list(outputs), [*values, *weights]


def in_halves(piece: Piece, case: Layer, given: Sequence[Tensor | None]) -> Found:
    outputs, kept, parameters = _forward(piece, case)
    values, rest = piece.backward_input(kept, parameters, given)
    _emptied(piece, kept)
    if isinstance(piece, LoweredPiece) and not piece.weights_for_weights:
        parameters = []  # they may be freed by then
    weights = piece.backward_weight(rest, parameters)
    _emptied(piece, rest)
    return list(outputs), [*values, *weights]


def recomputed(piece: Piece, case: Layer, given: Sequence[Tensor | None]) -> Found:
    piece.graph = replace(piece.graph, recompute=True)
    outputs, kept, parameters = _forward(piece, case)
    if isinstance(piece, LoweredPiece):
        assert [id(value) for value in kept] == [id(value) for value in case.values]
    kept = piece.recompute(kept, parameters, SEED)
    values, weights = piece.backward(kept, parameters, given)
    return list(outputs), [*values, *weights]


def _forward(piece: Piece, case: Layer) -> tuple[Sequence[Tensor], Any, list[Tensor]]:
    """Forward, after which the parameters are gone: backward is given copies of them."""
    if isinstance(piece, EagerPiece):
        outputs, kept = piece.forward(case.values, case.parameters, SEED)
        return outputs, kept, list(case.parameters)
    first = [parameter.detach().clone() for parameter in case.parameters]
    outputs, kept = piece.forward(case.values, first, SEED)
    outputs = [output.clone() for output in outputs]
    check_kept(kept, [*first, *case.graph.buffers])
    for parameter in first:
        parameter.zero_()
    return outputs, kept, [parameter.detach().clone() for parameter in case.parameters]


def check_kept(kept: Sequence[Tensor], parameters: Sequence[Tensor]) -> None:
    """No memory of a parameter or buffer, no memory twice."""
    storages = [tensor.untyped_storage().data_ptr() for tensor in kept]
    owned = {tensor.untyped_storage().data_ptr() for tensor in parameters}
    assert not owned & set(storages), "a parameter's memory is kept"
    assert len(storages) == len(set(storages)), "a view is kept beside what it looks at"


def _emptied(piece: Piece, kept: Any) -> None:
    assert not isinstance(piece, LoweredPiece) or kept == []


def close(found: Found, wanted: Found, tolerance: float = 1e-12) -> None:
    """What autograd leaves without gradient has none, or zeros."""
    for got, want in zip(found[0], wanted[0], strict=True):
        torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)
    for place, (got, want) in enumerate(zip(found[1], wanted[1], strict=True)):
        if want is None:
            assert got is None or not got.any(), place
        else:
            assert got is not None, f"no gradient of argument {place}"
            torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)


def check(case: Layer, tolerance: float = 1e-12) -> LoweredPiece:
    """The traced graphs give what autograd gives, whole, in halves and recomputed."""
    before = [argument.detach().clone() for argument in case.arguments]
    wanted, given = by_autograd(case)
    lowered = case.lowered()
    for piece in (EagerPiece(case.graph), lowered):
        for way in (whole, in_halves):
            close(way(piece, case, given), wanted, tolerance)
    close(recomputed(EagerPiece(case.graph), case, given), wanted, tolerance)
    close(recomputed(LoweredPiece(case.graph, lowered.graphs), case, given), wanted, tolerance)
    for argument, copy in zip(case.arguments, before, strict=True):
        assert torch.equal(argument, copy), "an argument was changed"
    return lowered
