"""Rotary position embedding: ``x * cos + rotate_half(x) * sin``, and its transpose.

With halves ``x = [x1, x2]``, ``cos = [c1, c2]``, ``sin = [s1, s2]`` of the last dim::

    y1 = x1 c1 - x2 s1      dx1 = dy1 c1 + dy2 s2
    y2 = x2 c2 + x1 s2      dx2 = dy2 c2 - dy1 s1

(the halves of cos and sin may differ). For ``x [b, h, s, d]`` of e bytes an element it moves
``2bhsd e`` bytes, and ``2sd`` elements of cos and sin for each batch they have; 3 flops an element.
Memory bounds it. A program owns ``HEADS`` heads at ``POSITIONS`` positions of one batch, so that
cos and sin are read once for several heads. Strides are whatever x has; nothing is copied.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from galvatron_compile.kernels.base import (
    INTERPRETED,
    exact,
    next_power_of_2,
    runs_kernels,
    tl,
    triton,
)

TILE = 16384 if INTERPRETED else 2048  # pairs of elements
MAX_HEADS = 4
WARPS = 4


def rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """``x`` rotated; laid out as ``x`` where that is dense, of the promoted dtype of all.

    x: ``[b, h, s, d]`` of any strides; cos, sin: ``[b or 1, s, d]`` or ``[b or 1, 1, s, d]``.
    Gradients of cos and sin, where they are wanted, are made in PyTorch.

    Raises:
        ValueError: shapes do not fit, or d is odd.
    """
    return torch.ops.galvatron.rotary(x, *_tables(x, cos, sin))


def rotary_(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """As :func:`rotary`, into ``x`` itself, which is returned. No autograd: for owners of ``x``."""
    torch.ops.galvatron.rotary_(x, *_tables(x, cos, sin))
    return x


def rotary_reference(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """In plain float64."""
    x, cos, sin = x.double(), cos.double(), sin.double()
    if cos.dim() == 3:
        cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    half = x.shape[-1] // 2
    return x * cos + torch.cat((-x[..., half:], x[..., :half]), -1) * sin


def moved_bytes(b: int, h: int, s: int, d: int, itemsize: int, *, num_tables: int = 1) -> int:
    """x in and out, and cos and sin for each of ``num_tables`` batches."""
    return (2 * b * h + 2 * num_tables) * s * d * itemsize


def flops(b: int, h: int, s: int, d: int) -> int:
    """Two products and a sum an element."""
    return 3 * b * h * s * d


def ahead() -> list[tuple[Any, dict[str, Any], int]]:
    """(kernel, arguments, warps) for bfloat16 ``[b, h, s, 128]`` seen through a transpose."""
    given: dict[str, Any] = dict.fromkeys(("x", "cos", "sin", "y"), "*bf16")
    given |= dict.fromkeys(rotary_kernel.arg_names[4:-4], "i32:16")
    given |= dict.fromkeys(("x_d", "cos_d", "sin_d", "y_d"), 1)
    given |= {"num_heads": "i32", "HEADS": 4, "POSITIONS": 8, "HALF": 64}
    return [(rotary_kernel, {**given, "TRANSPOSED": flag}, WARPS) for flag in (False, True)]


@triton.jit
def _load(pointer, offsets, mask):  # type: ignore[no-untyped-def]
    return tl.load(pointer + offsets, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def rotary_kernel(  # type: ignore[no-untyped-def]
    x, cos, sin, y, num_heads, num_positions, half,
    x_b, x_h, x_s, x_d, cos_b, cos_s, cos_d, sin_b, sin_s, sin_d, y_b, y_h, y_s, y_d,
    HEADS: tl.constexpr, POSITIONS: tl.constexpr, HALF: tl.constexpr, TRANSPOSED: tl.constexpr,
):  # fmt: skip
    """Tile ``[HEADS, POSITIONS, HALF]`` of both halves; all reads come before all writes."""
    num_tiles = tl.cdiv(num_positions, POSITIONS)  # the other dims of a grid end at 65535
    batch = (tl.program_id(0) // num_tiles).to(tl.int64)
    heads = (tl.program_id(1).to(tl.int64) * HEADS + tl.arange(0, HEADS))[:, None, None]
    tile = (tl.program_id(0) % num_tiles).to(tl.int64)
    positions = (tile * POSITIONS + tl.arange(0, POSITIONS))[None, :, None]
    pairs = tl.arange(0, HALF)[None, None, :]
    shared = (positions < num_positions) & (pairs < half)
    inside = shared & (heads < num_heads)

    cos += batch * cos_b + positions * cos_s + pairs * cos_d
    sin += batch * sin_b + positions * sin_s + pairs * sin_d
    c1, c2 = _load(cos, 0, shared), _load(cos, half * cos_d, shared)
    s1, s2 = _load(sin, 0, shared), _load(sin, half * sin_d, shared)
    x += batch * x_b + heads * x_h + positions * x_s + pairs * x_d
    x1, x2 = _load(x, 0, inside), _load(x, half * x_d, inside)
    if TRANSPOSED:
        y1 = x1 * c1 + x2 * s2
        y2 = x2 * c2 - x1 * s1
    else:
        y1 = x1 * c1 - x2 * s1
        y2 = x2 * c2 + x1 * s2
    y += batch * y_b + heads * y_h + positions * y_s + pairs * y_d
    tl.store(y, y1.to(y.dtype.element_ty), mask=inside)
    tl.store(y + half * y_d, y2.to(y.dtype.element_ty), mask=inside)


@torch.library.custom_op("galvatron::rotary", mutates_args=())
def _rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return _rotate(x, cos, sin, _empty(x, cos, sin), transposed=False)


@_rotary.register_fake
def _empty(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    dtype = torch.promote_types(x.dtype, torch.promote_types(cos.dtype, sin.dtype))
    return torch.empty_like(x, dtype=dtype)


@torch.library.custom_op("galvatron::rotary_backward", mutates_args=())
def _rotary_backward(dy: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The transpose of ``rotary`` at ``dy``."""
    return _rotate(dy, cos, sin, torch.empty_like(dy), transposed=True)


@_rotary_backward.register_fake
def _(dy: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return torch.empty_like(dy)


@torch.library.custom_op("galvatron::rotary_", mutates_args={"x"})
def _rotary_in_place(x: Tensor, cos: Tensor, sin: Tensor) -> None:
    _rotate(x, cos, sin, x, transposed=False)


@_rotary_in_place.register_fake
def _(x: Tensor, cos: Tensor, sin: Tensor) -> None:
    return None


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, y: Tensor, *, transposed: bool) -> Tensor:
    """Rotate ``x`` into ``y`` (which may be ``x``). cos, sin: ``[b or 1, s, d]``."""
    b, h, s, d = x.shape
    half = d // 2
    if not x.numel() or not runs_kernels(x, cos, sin):
        wide, c, t = exact(x), exact(cos).unsqueeze(1), exact(sin).unsqueeze(1)
        if transposed:
            scaled = wide * t
            turned = torch.cat((scaled[..., half:], -scaled[..., :half]), -1)
            return y.copy_(wide * c + turned)
        return y.copy_(wide * c + _turned(wide) * t)
    pairs = next_power_of_2(half)
    heads = min(MAX_HEADS, next_power_of_2(h))
    positions = max(1, min(TILE // (heads * pairs), next_power_of_2(s)))
    rotary_kernel[triton.cdiv(s, positions) * b, triton.cdiv(h, heads)](
        x, cos, sin, y, h, s, half,
        *x.stride(), *_strides(cos), *_strides(sin), *y.stride(),
        HEADS=heads, POSITIONS=positions, HALF=pairs, TRANSPOSED=transposed, num_warps=WARPS,
    )  # fmt: skip
    return y


def _strides(table: Tensor) -> tuple[int, ...]:
    """Strides over batch, positions and elements; one table for all batches has stride 0."""
    return 0 if table.shape[0] == 1 else table.stride(0), table.stride(1), table.stride(2)


def _tables(x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin as ``[b or 1, s, d]``, checked against ``x``."""
    if x.dim() != 4 or x.shape[-1] % 2:
        raise ValueError(f"x must be [b, h, s, d] with an even d, not {list(x.shape)}")
    tables = []
    for table in (cos, sin):
        flat = table.squeeze(1) if table.dim() == 4 and table.shape[1] == 1 else table
        fits = flat.dim() == 3 and flat.shape[1:] == x.shape[2:]
        if not fits or flat.shape[0] not in (1, x.shape[0]):
            raise ValueError(
                f"cos and sin must be [b or 1, s, d] for x {list(x.shape)}, not {list(table.shape)}"
            )
        tables.append(flat)
    return tables[0], tables[1]


def _save(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    x, cos, sin = inputs
    ctx.x_dtype = x.dtype
    kept = [x] if any(ctx.needs_input_grad[1:]) else []
    ctx.save_for_backward(cos, sin, *kept)


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    cos, sin, *kept = ctx.saved_tensors
    wanted = ctx.needs_input_grad
    dx = None
    if wanted[0]:
        dx = torch.ops.galvatron.rotary_backward(dy, cos, sin).to(ctx.x_dtype)
    dcos = _of_table(dy, kept[0], cos) if wanted[1] else None
    dsin = _of_table(dy, _turned(kept[0]), sin) if wanted[2] else None
    return dx, dcos, dsin


def _of_table(dy: Tensor, factor: Tensor, table: Tensor) -> Tensor:
    """The gradient of a table that ``factor`` is multiplied with, over heads and batches."""
    found = (exact(dy) * exact(factor)).sum(1)
    return found.sum_to_size(table.shape).to(table.dtype)


def _turned(x: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    return torch.cat((-x[..., half:], x[..., :half]), -1)


_rotary.register_autograd(_backward, setup_context=_save)
