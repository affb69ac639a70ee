"""Operators that communicate equal the collective and the operators apart, on two real ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from galvatron_compile import collectives, fused, operators
from galvatron_compile.mesh import Axis, Mesh

Case = tuple[Callable[..., Any], Callable[..., Any], list[Tensor]]


def r(*shape: int, ranks_differ: bool = True) -> Tensor:
    """float64 random numbers, a leaf; the same on every rank unless they differ."""
    seed = torch.distributed.get_rank() if ranks_differ else 7
    make = torch.Generator().manual_seed(int(torch.randint(2**31, ()).item()) + seed)
    return torch.randn(shape, generator=make, dtype=torch.float64).requires_grad_()


def gathers(axis: Axis) -> Case:
    """Two linear layers, one with a bias."""
    given = [r(2, 3, 4), r(5, 4), r(6, 4), r(6)]

    def apart(x: Tensor, one: Tensor, other: Tensor, bias: Tensor) -> Any:
        whole = collectives.all_gather(x, 1, 1, axis)
        return F.linear(whole, one), F.linear(whole, other, bias)

    def together(x: Tensor, one: Tensor, other: Tensor, bias: Tensor) -> Any:
        return fused.gather_linear(x, [one, other], [None, bias], 1, 1, axis)

    return apart, together, given


def gathers_interleaved(axis: Axis) -> Case:
    """Along the first dim, in two outer pieces, for one layer."""
    given = [r(4, 4), r(5, 4)]

    def apart(x: Tensor, weight: Tensor) -> Any:
        return [F.linear(collectives.all_gather(x, 0, 2, axis), weight)]

    def together(x: Tensor, weight: Tensor) -> Any:
        return fused.gather_linear(x, [weight], [None], 0, 2, axis)

    return apart, together, given


def scatters(axis: Axis) -> Case:
    given = [r(2, 6, 4), r(5, 4), r(5, ranks_differ=False)]

    def apart(x: Tensor, weight: Tensor, bias: Tensor) -> Any:
        product = F.linear(x, weight, collectives.split_sum(bias, axis))
        return [collectives.reduce_scatter(product, 1, 1, axis)]

    def together(x: Tensor, weight: Tensor, bias: Tensor) -> Any:
        return [fused.linear_reduce_scatter(x, weight, bias, 1, 1, axis)]

    return apart, together, given


def sums(axis: Axis) -> Case:
    """Both results are read; tangents of what is replicated are the same on every rank."""
    given = [r(3, 8), r(3, 8, ranks_differ=False), r(8, ranks_differ=False)]

    def apart(x: Tensor, residual: Tensor, weight: Tensor) -> Any:
        total = collectives.all_reduce(x, axis) + residual
        return F.rms_norm(total, (8,), weight, 0.1), total

    def together(x: Tensor, residual: Tensor, weight: Tensor) -> Any:
        return fused.all_reduce_add_rms_norm(x, residual, weight, 0.1, axis)

    return apart, together, given


def losses(axis: Axis) -> Case:
    return _losses(axis, fused.cross_entropy)


def losses_over(axis: Axis) -> Case:
    return _losses(axis, fused.cross_entropy_over)


def _losses(axis: Axis, function: Callable[..., Tensor]) -> Case:
    target = torch.tensor([0, 9, -100, 5, 4])

    def apart(logits: Tensor) -> Any:
        return [operators.cross_entropy_sum_shard(30 * logits, target, None, -100, 0.0, axis)]

    def together(logits: Tensor) -> Any:
        return [function(30 * logits, target, -100, axis)]

    return apart, together, [r(5, 5)]


def compare(make: Callable[[Axis], Case], results: list[int]) -> None:
    """Values, and gradients of a sum of some of the results."""
    axis = Mesh.create(2, torch.distributed.get_rank(), [2]).tensor(2)
    torch.manual_seed(3)
    apart, together, given = make(axis)
    found = []
    for function in (apart, together):
        outputs = list(function(*given))
        weights = [torch.linspace(1, 2, y.numel(), dtype=y.dtype).view(y.shape) for y in outputs]
        read = sum((outputs[i] * weights[i]).sum() for i in results if i < len(outputs))
        grads = torch.autograd.grad(read, given, allow_unused=True)  # type: ignore[arg-type]
        zeros = [torch.zeros_like(x) for x in given]
        grads = [zero if g is None else g for g, zero in zip(grads, zeros, strict=True)]  # type: ignore[assignment]
        found.append([*(y.detach() for y in outputs), *grads])
    torch.testing.assert_close(found[1], found[0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("results", [[0], [1], [0, 1]])
@pytest.mark.parametrize("make", [gathers, sums])
def test_of_several_results(ranks: Any, make: Any, results: list[int]) -> None:
    ranks(2).run(compare, make, results)


@pytest.mark.parametrize("make", [gathers_interleaved, scatters, losses, losses_over])
def test_of_one_result(ranks: Any, make: Any) -> None:
    ranks(2).run(compare, make, [0])


def needs_fewer() -> None:
    """Where x needs no gradient nothing is scattered or multiplied for it."""
    axis = Mesh.create(2, torch.distributed.get_rank(), [2]).tensor(2)
    x, weight = torch.ones(2, 4), torch.ones(3, 4, requires_grad=True)
    [y] = fused.gather_linear(x, [weight], [None], 0, 1, axis)
    y.sum().backward()
    assert weight.grad is not None and torch.equal(weight.grad, torch.full((3, 4), 4.0))
    weight.grad = None
    fused.linear_reduce_scatter(x, weight, None, 0, 1, axis).sum().backward()
    assert torch.equal(weight.grad, torch.full((3, 4), 2.0))
    x.requires_grad_()
    frozen = weight.detach()
    [y] = fused.gather_linear(x, [frozen], [None], 0, 1, axis)
    y.sum().backward()
    assert x.grad is not None and torch.equal(x.grad, torch.full((2, 4), 6.0))


def test_gradients_that_nothing_needs(ranks: Any) -> None:
    ranks(2).run(needs_fewer)


def refused() -> list[str]:
    axis = Mesh.create(2, torch.distributed.get_rank(), [2]).tensor(2)
    said = []
    for wrong in (10, -1):
        with pytest.raises(IndexError) as caught:
            fused.cross_entropy(torch.ones(2, 5), torch.tensor([9, wrong]), -100, axis)
        said.append(str(caught.value))
    fused.cross_entropy(torch.ones(2, 5), torch.tensor([9, 0]), -100, axis)
    return said


def test_a_target_outside_of_the_vocabulary_is_refused_on_every_rank(ranks: Any) -> None:
    for said in ranks(2).run(refused):
        assert [text.split(", 0 to")[0] for text in said] == [
            f"target {wrong} of row 1 is no class: the vocabulary has 10" for wrong in (10, -1)
        ]


# The operators on one rank.


def test_cross_entropy_equals_that_of_torch() -> None:
    logits = torch.randn(7, 11, dtype=torch.float64, requires_grad=True)
    target = torch.tensor([0, 10, -100, 3, 3, -100, 5])
    expected = F.cross_entropy(logits, target, reduction="sum")
    wanted = torch.autograd.grad(3 * expected, logits)[0]
    loss = fused.cross_entropy(logits, target, -100, None)
    torch.testing.assert_close(loss, expected, rtol=1e-13, atol=0)
    torch.testing.assert_close(torch.autograd.grad(3 * loss, logits)[0], wanted)


def test_cross_entropy_of_16_bit_logits_is_summed_in_float32() -> None:
    logits = torch.randn(5, 9).bfloat16().requires_grad_()
    target = torch.randint(0, 9, (5,))
    loss = fused.cross_entropy(logits, target, -100, None)
    assert loss.dtype == torch.float32
    (gradient,) = torch.autograd.grad(loss, logits)
    assert gradient.dtype == torch.bfloat16
    expected = F.cross_entropy(logits.float(), target, reduction="sum")
    torch.testing.assert_close(loss, expected)


def test_shapes_on_a_dry_axis() -> None:
    axis = Axis.dry_run("tp2", 2)
    x, weight = torch.randn(3, 4, 6), torch.randn(5, 6)
    gathered = fused.gather_linear(x, [weight, weight[:2]], [None, torch.ones(2)], 1, 1, axis)
    assert [tuple(y.shape) for y in gathered] == [(3, 8, 5), (3, 8, 2)]
    assert fused.linear_reduce_scatter(x, weight, None, 1, 1, axis).shape == (3, 2, 5)
