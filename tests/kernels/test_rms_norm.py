"""RMS norm: operators against float64, kernels under the interpreter, machine code."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from kernel_checks import close, launched, new_seed, watched
from torch import Tensor

from galvatron_compile.kernels import rms_norm as op
from galvatron_compile.kernels import row_norms
from galvatron_compile.kernels.rms_norm import add_rms_norm, rms_norm, rms_norm_reference

EPS = 1e-3  # large enough to tell where it is added
KERNELS = ("norm_forward", "norm_forward_long", "norm_backward", "norm_backward_long")


def _inputs(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> tuple[Tensor, ...]:
    """x (small first row, where eps matters), residual, weight, dy, dtotal."""
    make = torch.Generator().manual_seed(seed)
    x, residual, dy, dtotal = (torch.randn(shape, generator=make).to(dtype) for _ in range(4))
    if x.numel():
        x.view(-1, shape[-1])[0] *= 0.01
    weight = (1 + torch.randn(shape[-1], generator=make)).to(dtype)
    return x, residual, weight, dy, dtotal


def _expected(x: Tensor, weight: Tensor, dy: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(y, dx, dweight) in float64, by autograd through the reference."""
    x = x.detach().double().requires_grad_()
    weight = weight.detach().double().requires_grad_()
    y = rms_norm_reference(x, weight, EPS)
    dx, dweight = torch.autograd.grad(y, (x, weight), dy.double())
    return y.detach(), dx, dweight


def _check(shape: tuple[int, ...], dtype: torch.dtype, seed: int, strided: bool = False) -> None:
    x, _, weight, dy, _ = _inputs(shape, dtype, seed)
    if strided:
        x, dy = _spread(x), _spread(dy)
    y, dx, dweight = _expected(x, weight, dy)
    x.requires_grad_(), weight.requires_grad_()
    actual = rms_norm(x, weight, EPS)
    assert actual.dtype == dtype and actual.is_contiguous()
    actual.backward(dy)
    n = shape[-1]
    close(actual.detach(), y, terms=n, what="y")
    close(x.grad, dx, terms=n, what="dx")
    close(weight.grad, dweight, terms=x.numel(), what="dweight")


def _check_add(shape: tuple[int, ...], dtype: torch.dtype, seed: int, reads: str) -> None:
    """reads: which of the outputs ``y`` and ``total`` the loss depends on."""
    x, residual, weight, dy, dtotal = _inputs(shape, dtype, seed)
    leaves = x.requires_grad_(), residual.requires_grad_(), weight.requires_grad_()
    y, total = add_rms_norm(x, residual, weight, EPS)
    close(total.detach(), x.detach().double() + residual.detach().double(), what="total")
    expected, dx, dweight = _expected(total, weight, dy)
    close(y.detach(), expected, terms=shape[-1], what="y")
    dx = dx * ("y" in reads) + dtotal.double() * ("t" in reads)
    used = {"yt": ((y, total), (dy, dtotal)), "y": ((y,), (dy,)), "t": ((total,), (dtotal,))}
    grads = torch.autograd.grad(used[reads][0], leaves, used[reads][1], allow_unused=True)
    close(grads[0], dx, terms=shape[-1], what="dx")
    close(grads[1], dx, terms=shape[-1], what="dresidual")
    if "y" in reads:
        close(grads[2], dweight, terms=x.numel(), what="dweight")
    else:
        assert grads[2] is None


def _spread(x: Tensor) -> Tensor:
    """The same values in a wider matrix: rows with gaps between them."""
    wide = torch.full((*x.shape[:-1], x.shape[-1] + 3), float("nan"), dtype=x.dtype)
    wide[..., :-3] = x
    return wide[..., :-3].detach()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(3, 5, 8), (1, 7), (4, 33), (5,)])
def test_plain(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    seed = new_seed()
    _check(shape, dtype, seed)
    _check(shape, dtype, seed, strided=True)
    for reads in ("yt", "y", "t"):
        _check_add(shape, dtype, seed, reads)


def test_gradcheck() -> None:
    x, residual, weight, *_ = _inputs((2, 3, 5), torch.float64, new_seed())
    leaves = x.requires_grad_(), residual.requires_grad_(), weight.requires_grad_()
    assert torch.autograd.gradcheck(lambda x, _, w: rms_norm(x, w, EPS), leaves)
    assert torch.autograd.gradcheck(lambda x, r, w: add_rms_norm(x, r, w, EPS), leaves)


def test_opcheck() -> None:
    x, residual, weight, *_ = _inputs((2, 3, 8), torch.float32, 0)
    leaves = x.requires_grad_(), residual.requires_grad_(), weight.requires_grad_()
    torch.library.opcheck(torch.ops.galvatron.rms_norm, (x, weight, EPS))
    torch.library.opcheck(torch.ops.galvatron.add_rms_norm, (*leaves, EPS))


@pytest.mark.parametrize("shape", [(0, 8), (2, 0, 8)])
def test_no_rows(shape: tuple[int, ...]) -> None:
    x, residual, weight, dy, _ = _inputs(shape, torch.float32, 0)
    weight.requires_grad_()
    y, total = add_rms_norm(x, residual, weight, EPS)
    assert y.shape == total.shape == shape
    y.backward(dy)
    assert torch.equal(weight.grad, torch.zeros(8))


def test_mixed_dtypes() -> None:
    x, _, weight, *_ = _inputs((2, 8), torch.bfloat16, 0)
    x, weight = x.requires_grad_(), weight.float().requires_grad_()
    y = rms_norm(x, weight, EPS)
    assert y.dtype == torch.float32
    y.sum().backward()
    assert x.grad.dtype == torch.bfloat16 and weight.grad.dtype == torch.float32


def test_shapes_are_refused() -> None:
    x = torch.ones(2, 8)
    with pytest.raises(ValueError, match=r"must be \[8\] as the last dim"):
        rms_norm(x, torch.ones(7), EPS)
    with pytest.raises(ValueError, match=r"residual must be \[2, 8\]"):
        add_rms_norm(x, torch.ones(1, 8), torch.ones(8), EPS)


def test_traced_with_a_symbolic_batch() -> None:
    """Forward and backward operators stand in the graph; no size of the batch is baked in."""
    from torch.fx.experimental.proxy_tensor import make_fx

    def step(x: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        y, total = add_rms_norm(x, x, weight, EPS)
        return torch.autograd.grad((y.sum() + total.sum()), (x, weight))

    x, _, weight, *_ = _inputs((4, 8), torch.float32, 0)
    leaves = x.requires_grad_(), weight.requires_grad_()
    graph = make_fx(step, tracing_mode="symbolic")(*leaves)
    names = [str(node.target) for node in graph.graph.nodes]
    assert "galvatron.add_rms_norm.default" in names
    assert "galvatron.rms_norm_backward.default" in names
    other = torch.randn(6, 8, requires_grad=True)
    for actual, expected in zip(graph(other, weight), step(other, weight), strict=True):
        torch.testing.assert_close(actual, expected)


# Under the interpreter: (shape, strided); long rows are made by lowering the limits.
SHAPES = [((3, 5, 257), False), ((4, 64), True), ((1, 1000), False)]


def _in_interpreter(dtype: torch.dtype, seed: int) -> None:
    with watched(row_norms, *KERNELS) as counts:
        for shape, strided in SHAPES:
            _check(shape, dtype, seed, strided)
        _check_add((3, 100), dtype, seed, "yt")
        _check_add((3, 100), dtype, seed, "t")
    assert launched(counts) == {"norm_forward", "norm_backward"}


def _several_tiles(seed: int, changes: dict[str, Any]) -> set[str]:
    """More tiles than programs, the last one not full."""
    with watched(row_norms, *KERNELS, **changes) as counts:
        _check((11, 40), torch.float32, seed)
        _check_add((11, 40), torch.float32, seed, "yt")
    return launched(counts)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_kernels(interpreted: Any, dtype: torch.dtype) -> None:
    interpreted(1).run(_in_interpreter, dtype, new_seed())


def test_several_tiles(interpreted: Any) -> None:
    [names] = interpreted(1).run(_several_tiles, new_seed(), {"TILE": 128})
    assert names == {"norm_forward", "norm_backward"}


def test_long_rows(interpreted: Any) -> None:
    limits = {"MAX_FORWARD": 39, "MAX_BACKWARD": 39, "LONG_BLOCK": 16, "LONG_ROWS": 2}
    [names] = interpreted(1).run(_several_tiles, new_seed(), limits)
    assert names == {"norm_forward_long", "norm_backward_long"}


def _repeated(seed: int) -> bool:
    x, _, weight, dy, _ = _inputs((37, 24), torch.float32, seed)
    leaves = x.requires_grad_(), weight.requires_grad_()
    runs = [torch.autograd.grad(rms_norm(*leaves, EPS), leaves, dy) for _ in range(2)]
    return all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_gradients_repeat_bit_for_bit(interpreted: Any) -> None:
    assert interpreted(1).run(_repeated, new_seed()) == [True]


@pytest.mark.parametrize("capability", [80, 90])
def test_machine_code(capability: int) -> None:
    """No spills; everything but a statistic of a row moves 16 bytes a lane."""
    from galvatron_compile.kernels.ahead import compile_ahead

    for kernel, arguments, warps in op.ahead():
        made = compile_ahead(kernel, arguments, capability=capability, num_warps=warps)
        assert made.spilled_bytes == 0, made.name
        assert made.num_wide_loads >= 4 and made.num_narrow_loads <= 1, made.name
        assert made.num_wide_stores >= 2, made.name


def test_moved_bytes() -> None:
    """As counted by hand for 10 rows of 8 in bfloat16."""
    assert op.moved_bytes(10, 8, 2) == 2 * (80 + 80 + 8)
    assert op.moved_bytes(10, 8, 2, adds=True) == 2 * (4 * 80 + 8)
    assert op.moved_bytes(10, 8, 2, backward=True) == 2 * (3 * 80 + 16)
    assert op.moved_bytes(10, 8, 2, adds=True, backward=True) == 2 * (4 * 80 + 16)
