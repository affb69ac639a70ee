"""How a traced layer runs: what it is given, what it keeps, what comes back."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from galvatron_compile.lowered_piece import LoweredPiece
from galvatron_compile.pieces import EagerPiece

sys.path.insert(0, str(Path(__file__).parents[1] / "passes"))
import piece_cases as cases


def number(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64).requires_grad_()


def block(x, w, v, seed):
    return (torch.tanh(x @ w) @ v, (x @ w).exp(), (x.detach() > 0))


@pytest.fixture
def case() -> cases.Layer:
    torch.manual_seed(0)
    return cases.written(block, [number(3, 4)], [number(4, 4), number(4, 2)])


def test_outputs_and_kept_have_no_history(case: cases.Layer) -> None:
    piece = case.lowered()
    outputs, kept = piece.forward(case.values, case.parameters, 0)
    made = [tensor for tensor in (*outputs, *kept) if tensor is not case.values[0]]
    assert len(made) > len(outputs)
    assert not any(tensor.requires_grad for tensor in made)
    grads = piece.backward(kept, case.parameters, cases.by_autograd(case)[1])
    assert not any(g.requires_grad for some in grads for g in some if g is not None)


def test_a_gradient_that_nothing_gave_counts_as_zeros(case: cases.Layer) -> None:
    """As under autograd, where that output is not used."""
    _, given = cases.by_autograd(case)
    for missing in (0, 1):
        some = [None if at == missing else tangent for at, tangent in enumerate(given)]
        lowered, eager = case.lowered(), EagerPiece(case.graph)
        cases.close(cases.whole(lowered, case, some), cases.whole(eager, case, some))
        cases.close(cases.in_halves(lowered, case, some), cases.whole(eager, case, some))


def test_gradients_may_come_in_any_memory_layout(case: cases.Layer) -> None:
    (outputs, wanted), given = cases.by_autograd(case)
    strided = [
        None if g is None else torch.stack([g, g], -1)[..., 0].t().contiguous().t() for g in given
    ]
    assert strided[0] is not None and not strided[0].is_contiguous()
    cases.close(cases.whole(case.lowered(), case, strided), (outputs, wanted))


def test_a_layer_that_is_recomputed_keeps_its_inputs_alone(case: cases.Layer) -> None:
    piece = case.lowered()
    piece.graph = replace(piece.graph, recompute=True)
    _, kept = piece.forward(case.values, case.parameters, 0)
    assert [id(tensor) for tensor in kept] == [id(value) for value in case.values]
    again = piece.recompute(kept, case.parameters, 0)
    assert len(again) > len(kept)


def test_the_second_half_says_whether_it_reads_parameters(case: cases.Layer) -> None:
    assert not case.lowered().weights_for_weights  # a product's needs its inputs alone

    def gated(x, gate, seed):
        return (x * torch.sigmoid(gate),)

    reads = cases.written(gated, [number(3, 4)], [number(4)])
    kept = reads.lowered()
    given = kept.graphs.backward_weight.given
    assert kept.weights_for_weights == bool(given)
    assert EagerPiece(case.graph).weights_for_weights


def test_outputs_that_look_at_a_parameter_are_copied() -> None:
    """ZeRO-3 gives the parameter's memory back behind the layer."""

    def layer(x, where, seed):
        return (x + where, where.unsqueeze(0), x.view(-1))

    case = cases.written(layer, [number(3, 4)], [number(3, 4)])
    for piece in (case.lowered(), EagerPiece(case.graph)):
        outputs, _ = piece.forward(case.values, case.parameters, 0)
        memory = [tensor.untyped_storage().data_ptr() for tensor in outputs]
        assert case.parameters[0].untyped_storage().data_ptr() not in memory
        assert memory[2] == case.values[0].untyped_storage().data_ptr(), "a value is not copied"
        torch.testing.assert_close(outputs[1][0], case.parameters[0].detach())


def test_buffers_are_given_again_and_never_kept() -> None:
    def layer(x, w, table, seed):
        return ((x @ w) * table.cos(),)

    values, parameters = [number(3, 4)], [number(4, 4)]
    case = cases.written(layer, values, parameters, [torch.ones(4, dtype=torch.float64)])
    piece = cases.check(case)
    assert isinstance(piece, LoweredPiece)
