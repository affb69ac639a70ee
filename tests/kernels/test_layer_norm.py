"""Layer norm: operators against float64, kernels under the interpreter, machine code."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from kernel_checks import close, launched, new_seed, watched
from torch import Tensor

from galvatron_compile.kernels import layer_norm as op
from galvatron_compile.kernels import row_norms
from galvatron_compile.kernels.layer_norm import add_layer_norm, layer_norm, layer_norm_reference

EPS = 1e-3  # large enough to tell where it is added
KERNELS = ("norm_forward", "norm_forward_long", "norm_backward", "norm_backward_long")
PARAMETERS = ("wb", "w", "b", "")  # which of weight and bias there are
Maybe = Tensor | None


def _inputs(
    shape: tuple[int, ...], dtype: torch.dtype, seed: int, parameters: str = "wb"
) -> tuple[Tensor, Tensor, Maybe, Maybe, Tensor, Tensor]:
    """x (off centre; in its first row eps matters), residual, weight, bias, dy, dtotal."""
    make = torch.Generator().manual_seed(seed)
    x, residual, dy, dtotal = (torch.randn(shape, generator=make) for _ in range(4))
    x += 3
    if x.numel():
        x.view(-1, shape[-1])[0] *= 0.01
    weight, bias = (torch.randn(shape[-1], generator=make).to(dtype) for _ in range(2))
    given = weight if "w" in parameters else None, bias if "b" in parameters else None
    return x.to(dtype), residual.to(dtype), *given, dy.to(dtype), dtotal.to(dtype)


def _expected(x: Tensor, weight: Maybe, bias: Maybe, dy: Tensor) -> tuple[Tensor, list[Tensor]]:
    """y, and the gradients of those that are there, in float64 through the reference."""
    wide = [None if t is None else t.detach().double().requires_grad_() for t in (x, weight, bias)]
    assert wide[0] is not None
    y = layer_norm_reference(wide[0], wide[1], wide[2], EPS)
    leaves = [t for t in wide if t is not None]
    return y.detach(), list(torch.autograd.grad(y, leaves, dy.double()))


def _compare(
    leaves: list[Maybe], actual: Any, expected: list[Tensor], along: int, down: int
) -> None:
    """along, down: terms of the sums over a row, and over rows of what such sums made."""
    assert [t is None for t in leaves] == [t is None for t in actual]
    given = [grad for grad in actual if grad is not None]
    for place, (grad, wanted) in enumerate(zip(given, expected, strict=True)):
        close(grad, wanted, terms=along if place == 0 else down, what=f"gradient {place}")


def _check(
    shape: tuple[int, ...], dtype: torch.dtype, seed: int, parameters: str, strided: bool = False
) -> None:
    x, _, weight, bias, dy, _ = _inputs(shape, dtype, seed, parameters)
    if strided:
        x = x.transpose(0, 1).contiguous().transpose(0, 1)
        dy = torch.stack((dy, dy * float("nan")), -1)[..., 0]
    y, expected = _expected(x, weight, bias, dy)
    leaves: list[Maybe] = [x, weight, bias]
    given = [t.requires_grad_() for t in leaves if t is not None]
    actual = layer_norm(x, weight, bias, EPS)
    assert actual.dtype == dtype and actual.is_contiguous()
    grads = iter(torch.autograd.grad(actual, given, dy))
    n, rows = shape[-1], x.numel() // shape[-1]
    close(actual.detach(), y, terms=4 * n, what="y")
    actual_grads = [None if t is None else next(grads) for t in leaves]
    _compare(leaves, actual_grads, expected, 4 * n, 4 * n + rows)


def _check_add(shape: tuple[int, ...], dtype: torch.dtype, seed: int, reads: str) -> None:
    """reads: which of the outputs ``y`` and ``total`` the loss depends on."""
    x, residual, weight, bias, dy, dtotal = _inputs(shape, dtype, seed)
    assert weight is not None and bias is not None
    leaves = [t.requires_grad_() for t in (x, residual, weight, bias)]
    y, total = add_layer_norm(x, residual, weight, bias, EPS)
    close(total.detach(), x.detach().double() + residual.detach().double(), what="total")
    wanted, (dx, *others) = _expected(total, weight, bias, dy)
    close(y.detach(), wanted, terms=4 * shape[-1], what="y")
    dx = dx * ("y" in reads) + dtotal.double() * ("t" in reads)
    used = {"yt": ((y, total), (dy, dtotal)), "y": ((y,), (dy,)), "t": ((total,), (dtotal,))}
    grads = torch.autograd.grad(used[reads][0], leaves, used[reads][1], allow_unused=True)
    close(grads[0], dx, terms=4 * shape[-1], what="dx")
    close(grads[1], dx, terms=4 * shape[-1], what="dresidual")
    if "y" in reads:
        for grad, expected in zip(grads[2:], others, strict=True):
            close(grad, expected, terms=4 * x.numel(), what="parameter")
    else:
        assert grads[2:] == (None, None)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("parameters", PARAMETERS)
def test_plain(parameters: str, dtype: torch.dtype) -> None:
    seed = new_seed()
    _check((3, 5, 8), dtype, seed, parameters)
    _check((4, 33), dtype, seed, parameters, strided=True)
    _check((7,), dtype, seed, parameters)


@pytest.mark.parametrize("reads", ["yt", "y", "t"])
def test_plain_add(reads: str) -> None:
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        _check_add((2, 3, 9), dtype, new_seed(), reads)


def test_gradcheck() -> None:
    x, residual, weight, bias, *_ = _inputs((2, 3, 5), torch.float64, new_seed())
    leaves = [t.requires_grad_() for t in (x, residual, weight, bias) if t is not None]
    assert torch.autograd.gradcheck(lambda x, _, w, b: layer_norm(x, w, b, EPS), leaves)
    assert torch.autograd.gradcheck(lambda x, _, w, b: layer_norm(x, w, None, EPS), leaves)
    assert torch.autograd.gradcheck(lambda x, _, w, b: layer_norm(x, None, b, EPS), leaves)
    assert torch.autograd.gradcheck(lambda x, r, w, b: add_layer_norm(x, r, w, b, EPS), leaves)


def test_opcheck() -> None:
    x, residual, weight, bias, *_ = _inputs((2, 3, 8), torch.float32, 0)
    assert weight is not None and bias is not None
    leaves = [t.requires_grad_() for t in (x, residual, weight, bias)]
    torch.library.opcheck(torch.ops.galvatron.layer_norm, (x, weight, None, EPS))
    torch.library.opcheck(torch.ops.galvatron.add_layer_norm, (*leaves, EPS))


def test_no_rows() -> None:
    x, residual, weight, bias, dy, _ = _inputs((2, 0, 8), torch.float32, 0)
    assert weight is not None and bias is not None
    y, total = add_layer_norm(x, residual, weight.requires_grad_(), bias.requires_grad_(), EPS)
    assert y.shape == total.shape == (2, 0, 8)
    y.backward(dy)
    assert torch.equal(weight.grad, torch.zeros(8)) and torch.equal(bias.grad, torch.zeros(8))


def test_shapes_are_refused() -> None:
    x = torch.ones(2, 8)
    with pytest.raises(ValueError, match=r"must be \[8\] as the last dim"):
        layer_norm(x, torch.ones(8), torch.ones(9), EPS)
    with pytest.raises(ValueError, match=r"residual must be \[2, 8\]"):
        add_layer_norm(x, torch.ones(8), None, None, EPS)


def _in_interpreter(dtype: torch.dtype, seed: int) -> None:
    with watched(row_norms, *KERNELS) as counts:
        _check((3, 257), dtype, seed, "wb")
        for parameters in PARAMETERS:
            _check((3, 2, 64), dtype, seed, parameters, strided=True)
        _check_add((3, 100), dtype, seed, "yt")
        _check_add((3, 100), dtype, seed, "t")
    assert launched(counts) == {"norm_forward", "norm_backward"}


def _several_tiles(seed: int, changes: dict[str, Any]) -> set[str]:
    """More tiles than programs, the last one not full."""
    with watched(row_norms, *KERNELS, **changes) as counts:
        for parameters in PARAMETERS:
            _check((11, 40), torch.float32, seed, parameters)
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


@pytest.mark.parametrize("capability", [80, 90])
def test_machine_code(capability: int) -> None:
    """No spills; everything but the two statistics of a row moves 16 bytes a lane."""
    from galvatron_compile.kernels.ahead import compile_ahead

    for kernel, arguments, warps in op.ahead():
        made = compile_ahead(kernel, arguments, capability=capability, num_warps=warps)
        assert made.spilled_bytes == 0, made.name
        assert made.num_wide_loads >= 4 and made.num_narrow_loads <= 2, made.name
        assert made.num_wide_stores >= 2, made.name


def test_moved_bytes() -> None:
    """As counted by hand for 10 rows of 8 in bfloat16 with weight and bias."""
    assert op.moved_bytes(10, 8, 2) == 2 * (80 + 80 + 16)
    assert op.moved_bytes(10, 8, 2, adds=True, backward=True) == 2 * (4 * 80 + 32)
