"""Layer norm over the last dim, alone or after adding a residual.

``y = weight * (x - mean) / sqrt(variance + eps) + bias``, weight and bias each optional. For R rows
of n elements of e bytes with p parameters it moves ``(2R + p)ne`` bytes (with a residual
``(4R + p)ne``) and does about 7 flops an element; the backward moves ``(3R + 2p)ne``
(``(4R + 2p)ne``). Memory bounds all of them. How rows map to programs is told in
row_norm_kernels.py.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from galvatron_compile.kernels import row_norms


def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """Layer norm of ``x [..., n]`` over its last dim, statistics in float32.

    weight, bias: ``[n]`` or None. Of the promoted dtype of all.

    Raises:
        ValueError: weight or bias is not ``[n]``.
    """
    row_norms.check(x, None, weight, bias)
    y, _, _ = torch.ops.galvatron.layer_norm(x, weight, bias, eps)
    return y


def add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """(layer norm of the total, total) with ``total = x + residual`` in the dtype of ``x``.

    Raises:
        ValueError: residual is not of the shape of x, or weight or bias is not ``[n]``.
    """
    row_norms.check(x, residual, weight, bias)
    y, total, _, _ = torch.ops.galvatron.add_layer_norm(x, residual, weight, bias, eps)
    return y, total


def layer_norm_reference(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    """In plain float64."""
    x = x.double()
    centred = x - x.mean(-1, keepdim=True)
    y = centred / torch.sqrt((centred * centred).mean(-1, keepdim=True) + eps)
    y = y if weight is None else y * weight.double()
    return y if bias is None else y + bias.double()


def moved_bytes(
    num_rows: int,
    n: int,
    itemsize: int,
    *,
    num_parameters: int = 2,
    adds: bool = False,
    backward: bool = False,
) -> int:
    """Bytes read and written; ``adds``: with a residual."""
    return row_norms.moved_bytes(
        num_rows, n, itemsize, num_parameters=num_parameters, adds=adds, backward=backward
    )


def flops(num_rows: int, n: int, *, backward: bool = False) -> int:
    """Sum, difference, square, sum, two products, sum; the backward: seven more."""
    return (14 if backward else 7) * num_rows * n


def ahead() -> list[tuple[Any, dict[str, Any], int]]:
    """(kernel, arguments, warps) as launched for bfloat16 rows of 4096 and 8192."""
    return [
        case
        for n in (4096, 8192)
        for adds in (False, True)
        for case in row_norms.ahead(n, centred=True, adds=adds, has_bias=True)
    ]


@torch.library.custom_op("galvatron::layer_norm", mutates_args=())
def _layer_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    y, _, mean, rstd = row_norms.forward(x, None, weight, bias, eps, centred=True)
    return y, mean, rstd


@_layer_norm.register_fake
def _(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    y = row_norms.empty_result(x, weight, bias)
    return y, row_norms.empty_statistic(x), row_norms.empty_statistic(x)


@torch.library.custom_op("galvatron::layer_norm_backward", mutates_args=())
def _layer_norm_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    has_bias: bool,
    dtotal: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dx, dweight, dbias), empty where there is no such parameter; dtotal as in rms_norm.py."""
    return row_norms.backward(dy, dtotal, x, weight, mean, rstd, has_bias=has_bias)


@_layer_norm_backward.register_fake
def _(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    has_bias: bool,
    dtotal: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    like = x if weight is None else weight
    n = x.shape[-1]
    dweight = like.new_empty(0 if weight is None else n)
    return x.new_empty(x.shape), dweight, like.new_empty(n if has_bias else 0)


def _grads(
    ctx: Any, dy: Tensor, dtotal: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    x, weight, mean, rstd = ctx.saved_tensors
    has_bias = ctx.bias_dtype is not None
    dx, dweight, dbias = torch.ops.galvatron.layer_norm_backward(
        dy, x, weight, mean, rstd, has_bias, dtotal
    )
    dbias = dbias.to(ctx.bias_dtype) if has_bias else None
    return dx, None if weight is None else dweight, dbias


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, bias, _ = inputs
    _, mean, rstd = output
    ctx.set_materialize_grads(False)
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.save_for_backward(x, weight, mean, rstd)


def _backward(ctx: Any, dy: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    if dy is None:
        return None, None, None, None
    return *_grads(ctx, dy, None), None


_layer_norm.register_autograd(_backward, setup_context=_save)


@torch.library.custom_op("galvatron::add_layer_norm", mutates_args=())
def _add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return row_norms.forward(x, residual, weight, bias, eps, centred=True)


@_add_layer_norm.register_fake
def _(
    x: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    y = row_norms.empty_result(x, weight, bias)
    mean, rstd = row_norms.empty_statistic(x), row_norms.empty_statistic(x)
    return y, x.new_empty(x.shape), mean, rstd


def _save_total(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, residual, weight, bias, _ = inputs
    _, total, mean, rstd = output
    ctx.set_materialize_grads(False)
    ctx.residual_dtype = residual.dtype
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.save_for_backward(total, weight, mean, rstd)


def _add_backward(
    ctx: Any, dy: Tensor | None, dtotal: Tensor | None, *_: Tensor | None
) -> tuple[Tensor | None, ...]:
    dx, dweight, dbias = dtotal, None, None
    if dy is not None:
        dx, dweight, dbias = _grads(ctx, dy, dtotal)
    return dx, None if dx is None else dx.to(ctx.residual_dtype), dweight, dbias, None


_add_layer_norm.register_autograd(_add_backward, setup_context=_save_total)
