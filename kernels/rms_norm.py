"""RMS norm over the last dim, alone or after adding a residual.

``y = weight * (x * rsqrt(mean(x^2) + eps))``. For R rows of n elements of e bytes it moves
``(2R + 1)ne`` bytes (with a residual ``(4R + 1)ne``) and does about 4 flops an element; the
backward moves ``(3R + 2)ne`` (``(4R + 2)ne``). Memory bounds all of them. How rows map to programs
is told in row_norm_kernels.py.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from galvatron_compile.kernels import row_norms


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """``weight * (x * rsqrt(mean(x^2) + eps))`` over the last dim, statistics in float32.

    x: ``[..., n]``; weight: ``[n]``. Of the promoted dtype of both.

    Raises:
        ValueError: weight is not ``[n]``.
    """
    row_norms.check(x, None, weight)
    y, _ = torch.ops.galvatron.rms_norm(x, weight, eps)
    return y


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(RMS norm of the total, total) with ``total = x + residual`` in the dtype of ``x``.

    Raises:
        ValueError: residual is not of the shape of x, or weight is not ``[n]``.
    """
    row_norms.check(x, residual, weight)
    y, total, _ = torch.ops.galvatron.add_rms_norm(x, residual, weight, eps)
    return y, total


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """In plain float64."""
    x = x.double()
    return weight.double() * (x * torch.rsqrt((x * x).mean(-1, keepdim=True) + eps))


def moved_bytes(
    num_rows: int, n: int, itemsize: int, *, adds: bool = False, backward: bool = False
) -> int:
    """Bytes read and written; ``adds``: with a residual."""
    return row_norms.moved_bytes(num_rows, n, itemsize, adds=adds, backward=backward)


def flops(num_rows: int, n: int, *, backward: bool = False) -> int:
    """Square, sum, two products; the backward: six products and sums more."""
    return (10 if backward else 4) * num_rows * n


def ahead() -> list[tuple[Any, dict[str, Any], int]]:
    """(kernel, arguments, warps) as launched for bfloat16 rows of 4096 and 8192."""
    return [
        case
        for n in (4096, 8192)
        for adds in (False, True)
        for case in row_norms.ahead(n, centred=False, adds=adds, has_bias=False)
    ]


@torch.library.custom_op("galvatron::rms_norm", mutates_args=())
def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    y, _, _, rstd = row_norms.forward(x, None, weight, None, eps, centred=False)
    return y, rstd


@_rms_norm.register_fake
def _(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return row_norms.empty_result(x, weight), row_norms.empty_statistic(x)


@torch.library.custom_op("galvatron::rms_norm_backward", mutates_args=())
def _rms_norm_backward(
    dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, dtotal: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(dx, dweight); dtotal: what reaches ``x`` besides, where it is a total that others read."""
    dx, dweight, _ = row_norms.backward(dy, dtotal, x, weight, None, rstd, has_bias=False)
    return dx, dweight


@_rms_norm_backward.register_fake
def _(
    dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, dtotal: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), weight.new_empty(weight.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, _ = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, weight, output[1])


def _backward(ctx: Any, dy: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    if dy is None:
        return None, None, None
    return *torch.ops.galvatron.rms_norm_backward(dy, *ctx.saved_tensors), None


_rms_norm.register_autograd(_backward, setup_context=_save)


@torch.library.custom_op("galvatron::add_rms_norm", mutates_args=())
def _add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    y, total, _, rstd = row_norms.forward(x, residual, weight, None, eps, centred=False)
    return y, total, rstd


@_add_rms_norm.register_fake
def _(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    y = row_norms.empty_result(x, weight)
    return y, x.new_empty(x.shape), row_norms.empty_statistic(x)


def _save_total(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, residual, weight, _ = inputs
    _, total, rstd = output
    ctx.set_materialize_grads(False)
    ctx.residual_dtype = residual.dtype
    ctx.save_for_backward(total, weight, rstd)


def _add_backward(
    ctx: Any, dy: Tensor | None, dtotal: Tensor | None, _: Tensor | None
) -> tuple[Tensor | None, ...]:
    dx, dweight = dtotal, None
    if dy is not None:
        dx, dweight = torch.ops.galvatron.rms_norm_backward(dy, *ctx.saved_tensors, dtotal)
    return dx, None if dx is None else dx.to(ctx.residual_dtype), dweight, None


_add_rms_norm.register_autograd(_add_backward, setup_context=_save_total)
