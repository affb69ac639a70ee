"""Tokens to experts and back, against the references, in PyTorch and as kernels."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
from kernel_checks import close, launched, watched

from galvatron_compile.kernels import base
from galvatron_compile.kernels import experts as tested
from galvatron_compile.kernels.ahead import compile_ahead

KERNELS = ("spread_kernel", "collect_kernel", "spread_weighted_kernel")
SIZES = [(1, 1, 1, 1), (7, 2, 33, 4), (16, 4, 1200, 5), (0, 2, 8, 3)]


def check(seed: int, sizes: tuple[int, ...], dtype: torch.dtype, kernels: bool) -> None:
    assert base.INTERPRETED is kernels
    torch.manual_seed(seed)
    t, k, h, num_experts = sizes
    x = torch.randn(h, t, dtype=torch.float64).to(dtype).t().requires_grad_()  # not contiguous
    chosen = torch.randint(0, num_experts, (t, k))
    gates = torch.rand(t, k, dtype=torch.float64).to(dtype).requires_grad_()
    dout = torch.randn(t, h, dtype=torch.float64).to(dtype)
    with watched(tested, *KERNELS) as counts:
        rows, source, num_tokens = tested.permute(x, chosen, num_experts)
        out = tested.unpermute(rows, source, gates)
        dx, dgates = torch.autograd.grad(out, (x, gates), dout)
    assert launched(counts) == (set(KERNELS) if kernels and t else set())
    order = chosen.flatten().argsort(stable=True)
    assert torch.equal(rows, x.detach()[order // k]) and torch.equal(source, order)
    assert num_tokens.tolist() == [int((chosen == e).sum()) for e in range(num_experts)]

    wide_x, wide_gates = (v.detach().double().requires_grad_() for v in (x, gates))
    wanted = (wide_x[:, None] * wide_gates[..., None]).sum(1)
    wanted_dx, wanted_dgates = torch.autograd.grad(wanted, (wide_x, wide_gates), dout.double())
    close(out.detach(), wanted.detach(), terms=k, what="out")
    # Gradients of rows are rounded before those of one token are added.
    loose = 4 * k * torch.finfo(dtype).eps
    torch.testing.assert_close(dx.double(), wanted_dx, rtol=loose, atol=4 * loose)
    close(dgates, wanted_dgates, terms=4 * h, what="gates")


def spread(x: torch.Tensor) -> torch.Tensor:
    """The same rows with gaps of NaN between them."""
    wide = torch.full((x.shape[0], x.shape[1] + 3), float("nan"), dtype=x.dtype)
    wide[:, :-3] = x
    return wide[:, :-3].detach()


def check_blocks(seed: int, kernels: bool) -> None:
    """Rows with gaps between them, each of several blocks; more experts than a byte counts."""
    assert base.INTERPRETED is kernels
    torch.manual_seed(seed)
    t, k, h, num_experts = 5, 2, 50, 300
    x, dout, drows = (spread(torch.randn(n, h)) for n in (t, t, t * k))
    chosen, gates = torch.randint(0, num_experts, (t, k)), torch.rand(t, k).requires_grad_()
    x.requires_grad_()
    with mock.patch.object(tested, "MAX_BLOCK", 16), watched(tested, *KERNELS) as counts:
        rows, source, num_tokens = tested.permute(x, chosen, num_experts)
        (dx,) = torch.autograd.grad(rows, x, drows)
        rows = spread(rows).requires_grad_()
        out = tested.unpermute(rows, source, gates)
        grads = torch.autograd.grad(out, (rows, gates), dout)
    assert launched(counts) == (set(KERNELS) if kernels else set())
    wanted = tested.permute_reference(x.detach(), chosen, num_experts)
    assert torch.equal(rows.detach().double(), wanted[0]) and torch.equal(source, wanted[1])
    assert torch.equal(num_tokens, wanted[2])
    wanted_dx = torch.zeros(t, h, dtype=torch.float64).index_add(0, source // k, drows.double())
    close(dx, wanted_dx, terms=k, what="dx")
    leaves = [v.detach().double().requires_grad_() for v in (rows, gates)]
    wanted_out = tested.unpermute_reference(leaves[0], source, leaves[1])
    close(out.detach(), wanted_out.detach(), terms=k, what="out")
    wanted_grads = torch.autograd.grad(wanted_out, leaves, dout.double())
    for got, expected in zip(grads, wanted_grads, strict=True):
        close(got, expected, terms=h, what="gradient of unpermute")


def test_blocks(interpreted: Any, seed: int) -> None:
    check_blocks(seed, False)
    interpreted(1).run(check_blocks, seed, True)


def test_one_undoes_the_other(seed: int) -> None:
    """Gates that add up to 1 give the tokens back."""
    torch.manual_seed(seed)
    x, chosen = torch.randn(9, 5, dtype=torch.float64), torch.randint(0, 3, (9, 4))
    rows, source, _ = tested.permute(x, chosen, 3)
    gates = torch.randn(9, 4, dtype=torch.float64).softmax(1)
    torch.testing.assert_close(tested.unpermute(rows, source, gates), x, rtol=1e-12, atol=1e-12)


def test_opcheck() -> None:
    x, gates = (torch.randn(4, n, requires_grad=True) for n in (5, 2))
    chosen = torch.tensor([[0, 1], [2, 1], [1, 0], [2, 0]])
    torch.library.opcheck(torch.ops.galvatron.permute, (x, chosen, 3))
    rows, source, _ = tested.permute(x.detach(), chosen, 3)
    torch.library.opcheck(torch.ops.galvatron.permute_backward, (rows, source, 2))
    args = rows, source, gates.detach()
    torch.library.opcheck(torch.ops.galvatron.unpermute_backward, (x.detach(), *args))
    torch.library.opcheck(torch.ops.galvatron.unpermute, (rows.requires_grad_(), source, gates))


def test_traced_with_a_symbolic_batch() -> None:
    from torch.fx.experimental.proxy_tensor import make_fx

    def step(x: torch.Tensor, gates: torch.Tensor, chosen: torch.Tensor) -> Any:
        rows, source, _ = tested.permute(x, chosen, 3)
        out = tested.unpermute(rows * rows, source, gates)
        return torch.autograd.grad(out.sum(), (x, gates))

    def inputs(t: int) -> list[torch.Tensor]:
        x, gates = (torch.randn(t, n, requires_grad=True) for n in (5, 2))
        return [x, gates, torch.randint(0, 3, (t, 2))]

    graph = make_fx(step, tracing_mode="symbolic")(*inputs(4))
    names = {str(node.target) for node in graph.graph.nodes}
    assert {f"galvatron.{n}permute_backward.default" for n in ("", "un")} <= names
    other = inputs(6)
    for actual, expected in zip(graph(*other), step(*other), strict=True):
        torch.testing.assert_close(actual, expected)


def test_moved_bytes() -> None:
    """As counted by hand for 3 tokens of 10 bfloat16 elements and 2 experts each."""
    assert tested.moved_bytes(3, 2, 10, 2) == 3 * 20 + 6 * 20
    assert tested.moved_bytes(3, 2, 10, 2, weights_gradient=True) == 3 * 20 + 6 * 20 + 6 * 20


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_kernels_equal_the_reference(
    interpreted: Any, seed: int, sizes: tuple[int, ...], dtype: torch.dtype
) -> None:
    interpreted(1).run(check, seed, sizes, dtype, True)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_without_kernels_they_do_the_same(
    seed: int, sizes: tuple[int, ...], dtype: torch.dtype
) -> None:
    check(seed, sizes, dtype, False)


def test_references_agree_with_the_operators(seed: int) -> None:
    torch.manual_seed(seed)
    x, chosen = torch.randn(9, 5, dtype=torch.float64), torch.randint(0, 3, (9, 2))
    for got, wanted in zip(
        tested.permute(x, chosen, 3), tested.permute_reference(x, chosen, 3), strict=True
    ):
        assert torch.equal(got, wanted)


def test_gradients_by_finite_differences(seed: int) -> None:
    torch.manual_seed(seed)
    chosen = torch.randint(0, 3, (4, 2))
    x, gates = (torch.randn(4, n, dtype=torch.float64, requires_grad=True) for n in (5, 2))

    def there_and_back(x: torch.Tensor, gates: torch.Tensor) -> torch.Tensor:
        rows, source, _ = tested.permute(x, chosen, 3)
        return tested.unpermute(rows * rows, source, gates)

    assert torch.autograd.gradcheck(there_and_back, (x, gates))


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("place", range(len(tested.ahead())))
def test_machine_code(place: int, capability: int) -> None:
    kernel, arguments, num_warps = tested.ahead()[place]
    made = compile_ahead(kernel, arguments, capability=capability, num_warps=num_warps)
    assert made.spilled_bytes == 0 and made.num_wide_loads > 0 and made.num_wide_stores > 0


def test_what_does_not_agree_is_refused() -> None:
    rows, source = torch.zeros(4, 3), torch.arange(4)
    with pytest.raises(ValueError, match="each must have t"):
        tested.unpermute(rows, source, torch.ones(4))
    with pytest.raises(ValueError, match="each must have t"):
        tested.unpermute(rows, source, torch.ones(3, 2))
    with pytest.raises(ValueError, match=r"experts must be \[4, k\]"):
        tested.permute(rows, torch.zeros(3, 2, dtype=torch.int64), 2)
