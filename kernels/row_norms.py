"""Normalising rows, with a residual added first or not: what rms_norm.py and layer_norm.py share.

Launches the kernels of row_norm_kernels.py (the formulas are there), or computes the same in plain
PyTorch. Rows of up to ``MAX_FORWARD`` elements are read once; the backward also keeps ``dy``,
``weight`` and the gradient of ``weight`` in registers, which fit up to ``MAX_BACKWARD``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from galvatron_compile.kernels.base import (
    INTERPRETED,
    as_rows,
    exact,
    next_power_of_2,
    runs_kernels,
    triton,
    warps_for,
)
from galvatron_compile.kernels.row_norm_kernels import (
    norm_backward,
    norm_backward_long,
    norm_forward,
    norm_forward_long,
)

MAX_FORWARD = 16384
MAX_BACKWARD = 8192
LONG_BLOCK = 2048
LONG_ROWS = 4  # rows that share one read and write of a long row's sums
TILE = 32768 if INTERPRETED else 4096  # elements; the interpreter pays per program


def forward(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    *,
    centred: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(y, total, mean, rstd) of rows ``x [..., n]``; all new tensors, contiguous.

    y is of the promoted dtype of what it is made of; mean and rstd are ``[...]`` in float32. total
    is empty without a residual, mean is empty if not centred: there is nothing to save.
    """
    n = x.shape[-1]
    given = [t for t in (x, residual, weight, bias) if t is not None]
    y = empty_result(x, weight, bias)
    if not x.numel() or not runs_kernels(*given):
        return _plain_forward(x, residual, weight, bias, eps, y, centred)
    total = x.new_empty(x.shape if residual is not None else 0)
    mean = empty_statistic(x) if centred else x.new_empty(0)
    rstd = empty_statistic(x)
    rows = as_rows(x)
    added = None if residual is None else as_rows(residual)
    long = n > MAX_FORWARD
    block = LONG_BLOCK if long else next_power_of_2(n)
    tile = 1 if long else tile_rows(rows.shape[0], block)
    kernel = norm_forward_long if long else norm_forward
    kernel[triton.cdiv(rows.shape[0], tile),](
        rows, added, _dense(weight), _dense(bias), y, total, mean, rstd,
        rows.shape[0], n, rows.stride(0), 0 if added is None else added.stride(0), eps,
        CENTRED=centred, ADDS=added is not None,
        HAS_WEIGHT=weight is not None, HAS_BIAS=bias is not None,
        ROWS=tile, BLOCK=block, num_warps=warps_for(tile * block),
    )  # fmt: skip
    return y, total, mean, rstd


def backward(
    dy: Tensor,
    dtotal: Tensor | None,
    x: Tensor,
    weight: Tensor | None,
    mean: Tensor | None,
    rstd: Tensor,
    *,
    has_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dx, dweight, dbias) with ``x`` what was normalised (the total); centred if mean is given.

    dtotal: what reaches ``x`` besides, added to dx. Without weight or bias its gradient is empty.
    """
    n = x.shape[-1]
    given = [t for t in (dy, dtotal, x, weight) if t is not None]
    if not x.numel() or not runs_kernels(*given):
        return _plain_backward(dy, dtotal, x, weight, mean, rstd, has_bias)
    dx = x.new_empty(x.shape)
    rows, grads = as_rows(x), as_rows(dy)
    others = None if dtotal is None else as_rows(dtotal)
    long = n > MAX_BACKWARD
    block = LONG_BLOCK if long else next_power_of_2(n)
    tile = min(LONG_ROWS, rows.shape[0]) if long else tile_rows(rows.shape[0], block)
    tile = next_power_of_2(tile)
    num_programs = min(triton.cdiv(rows.shape[0], tile), 2 * num_processors(x))
    weight_sums = x.new_empty((num_programs, n if weight is not None else 0), dtype=torch.float32)
    bias_sums = x.new_empty((num_programs, n if has_bias else 0), dtype=torch.float32)
    kernel = norm_backward_long if long else norm_backward
    kernel[num_programs,](
        grads, others, rows, _dense(weight), mean, rstd, dx, weight_sums, bias_sums,
        rows.shape[0], n, grads.stride(0), 0 if others is None else others.stride(0),
        rows.stride(0),
        CENTRED=mean is not None, ADDS=others is not None,
        HAS_WEIGHT=weight is not None, HAS_BIAS=has_bias,
        ROWS=tile, BLOCK=block, num_warps=warps_for(tile * block),
    )  # fmt: skip
    dtype = x.dtype if weight is None else weight.dtype
    return dx, weight_sums.sum(0).to(dtype), bias_sums.sum(0).to(dtype)


def empty_result(x: Tensor, *parameters: Tensor | None) -> Tensor:
    """Memory for y: contiguous, of the promoted dtype."""
    dtype = x.dtype
    for parameter in parameters:
        if parameter is not None:
            dtype = torch.promote_types(dtype, parameter.dtype)
    return x.new_empty(x.shape, dtype=dtype)


def empty_statistic(x: Tensor) -> Tensor:
    """Memory for the mean or rstd of each row."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    return x.new_empty(x.shape[:-1], dtype=dtype)


def tile_rows(num_rows: int, block: int) -> int:
    """Rows of a tile (a power of 2): short rows share a program, as long as all SMs have some."""
    rows = max(1, TILE // block)
    while rows > 1 and not INTERPRETED and num_rows // rows < 4 * 132:
        rows //= 2
    return rows


def num_processors(x: Tensor) -> int:
    """Streaming multiprocessors of the GPU that holds ``x``."""
    if not x.is_cuda:
        return 2
    return int(torch.cuda.get_device_properties(x.device).multi_processor_count)


def check(x: Tensor, residual: Tensor | None, *parameters: Tensor | None) -> None:
    """Raise ValueError for shapes that do not fit ``x [..., n]``."""
    if residual is not None and residual.shape != x.shape:
        raise ValueError(f"residual must be {list(x.shape)} as x is, not {list(residual.shape)}")
    for parameter in parameters:
        if parameter is not None and parameter.shape != x.shape[-1:]:
            raise ValueError(
                f"weight and bias must be [{x.shape[-1]}] as the last dim of x, "
                f"not {list(parameter.shape)}"
            )


def moved_bytes(
    num_rows: int,
    n: int,
    itemsize: int,
    *,
    num_parameters: int = 1,
    adds: bool = False,
    backward: bool = False,
) -> int:
    """Bytes read and written once each.

    Forward: x in, y out, with a residual also residual in and total out. Backward: dy and x in, dx
    out, with a residual also dtotal in. Parameters are read (their gradients written) once.
    """
    matrices = (3 + adds) if backward else (2 + 2 * adds)
    vectors = num_parameters * (2 if backward else 1)
    return (matrices * num_rows + vectors) * n * itemsize


def ahead(
    n: int, *, centred: bool, adds: bool, has_bias: bool
) -> list[tuple[Any, dict[str, Any], int]]:
    """(kernel, arguments, warps) of a forward and a backward on many bfloat16 rows of n."""
    flags = dict(CENTRED=centred, ADDS=adds, HAS_WEIGHT=True, HAS_BIAS=has_bias)
    matrices = dict.fromkeys(("x", "residual", "weight", "bias", "y", "total"), "*bf16")
    matrices |= dict.fromkeys(("dy", "dtotal", "dx"), "*bf16")
    sums = dict.fromkeys(("mean", "rstd", "weight_sums", "bias_sums"), "*fp32")
    strides = ("x_stride", "residual_stride", "dy_stride", "dtotal_stride")
    sizes: dict[str, str] = dict.fromkeys((*strides, "num_rows", "n"), "i32:16") | {"eps": "fp32"}
    absent = ["residual", "dtotal"] * (not adds) + ["bias"] * (not has_bias)
    absent += ["mean"] * (not centred)
    cases: list[tuple[Any, dict[str, Any], int]] = []
    for kernels, longest, long_rows in (
        ((norm_forward, norm_forward_long), MAX_FORWARD, 1),
        ((norm_backward, norm_backward_long), MAX_BACKWARD, LONG_ROWS),
    ):
        long = n > longest
        block = LONG_BLOCK if long else next_power_of_2(n)
        rows = long_rows if long else max(1, 4096 // block)
        given = {**matrices, **sums, **sizes, **flags, "ROWS": rows, "BLOCK": block}
        given |= dict.fromkeys(absent)
        kernel = kernels[long]
        named = {name: given[name] for name in kernel.arg_names}
        cases.append((kernel, named, warps_for(rows * block)))
    return cases


def _dense(parameter: Tensor | None) -> Tensor | None:
    return None if parameter is None else parameter.contiguous()


def _plain_forward(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    y: Tensor,
    centred: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    total = x if residual is None else (x + residual).to(x.dtype).contiguous()
    hat = exact(total)
    mean = hat.mean(-1, keepdim=True)
    if centred:
        hat = hat - mean
    rstd = torch.rsqrt(hat.square().mean(-1, keepdim=True) + eps)
    result = hat * rstd
    if weight is not None:
        result = result * exact(weight)
    if bias is not None:
        result = result + exact(bias)
    y.copy_(result)
    none = x.new_empty(0)
    mean = mean.squeeze(-1) if centred else mean.new_empty(0)
    return y, none if residual is None else total, mean, rstd.squeeze(-1)


def _plain_backward(
    dy: Tensor,
    dtotal: Tensor | None,
    x: Tensor,
    weight: Tensor | None,
    mean: Tensor | None,
    rstd: Tensor,
    has_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    grad, hat, rstd = exact(dy), exact(x), rstd.unsqueeze(-1)
    if mean is not None:
        hat = hat - mean.unsqueeze(-1)
    hat = hat * rstd
    n = x.shape[-1]
    dtype = x.dtype if weight is None else weight.dtype
    none = x.new_empty(0, dtype=dtype)
    dbias = grad.reshape(-1, n).sum(0).to(dtype) if has_bias else none
    dweight = none.clone()
    if weight is not None:
        dweight = (grad * hat).reshape(-1, n).sum(0).to(dtype)
        grad = grad * exact(weight)
    along = (grad * hat).mean(-1, keepdim=True)
    level = grad.mean(-1, keepdim=True) if mean is not None else torch.zeros_like(along)
    dx = rstd * (grad - level - hat * along)
    if dtotal is not None:
        dx = dx + exact(dtotal)
    return dx.to(x.dtype).contiguous(), dweight, dbias
