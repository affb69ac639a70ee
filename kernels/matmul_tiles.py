"""Tiles of a matmul, as the kernels that overlap it with communication make them: persistent
programs, each of which takes one tile after the other.

A tile reads ``(BLOCK_M + BLOCK_N) k`` elements and does ``2 BLOCK_M BLOCK_N k`` flops. On sm_90 the
products become wgmma instructions (the tests read the machine code).
"""

from __future__ import annotations

import torch
from torch import Tensor

from galvatron_compile.kernels.base import INTERPRETED, tl, triton


@triton.jit
def multiply_tile(  # type: ignore[no-untyped-def]
    a, w, num_rows, num_columns, k, stride_am, stride_ak, stride_wn, stride_wk,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, EVEN_K: tl.constexpr,
    INTERPRETED: tl.constexpr,
):  # fmt: skip
    """float32 ``a[:BLOCK_M, :k] @ w[:BLOCK_N, :k].T``; a, w: pointers to the first element.

    Rows and columns from num_rows and num_columns on (there may be none) are zero.
    """
    rows, columns, inner = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    a_block = a + rows[:, None] * stride_am + inner[None, :] * stride_ak
    w_block = w + columns[None, :] * stride_wn + inner[:, None] * stride_wk
    a_mask = rows[:, None] < num_rows
    w_mask = columns[None, :] < num_columns
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, k, BLOCK_K):
        if EVEN_K:
            a_tile = tl.load(a_block, mask=a_mask, other=0.0)
            w_tile = tl.load(w_block, mask=w_mask, other=0.0)
        else:
            inside = inner < k - start
            a_tile = tl.load(a_block, mask=a_mask & inside[None, :], other=0.0)
            w_tile = tl.load(w_block, mask=w_mask & inside[:, None], other=0.0)
        if INTERPRETED:  # its dot is wrong in bfloat16
            a_tile, w_tile = a_tile.to(tl.float32), w_tile.to(tl.float32)
        total = tl.dot(a_tile, w_tile, total, input_precision="ieee")
        a_block += BLOCK_K * stride_ak
        w_block += BLOCK_K * stride_wk
    return total


@triton.jit
def place_of(tile, tiles_m, tiles_n, GROUP: tl.constexpr):  # type: ignore[no-untyped-def]
    """(row, column) of a tile: down GROUP rows, then the next column, so that tiles that run at
    the same time share rows and columns in the cache."""
    first = tile // (GROUP * tiles_n) * GROUP
    height = tl.minimum(tiles_m - first, GROUP)
    within = tile - first * tiles_n
    return first + within % height, within // height


@triton.jit
def store_tile(  # type: ignore[no-untyped-def]
    target, tile, stride, num_rows, num_columns, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Store what lies inside; target: pointer to the tile's first element, in its dtype."""
    rows, columns = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    mask = (rows[:, None] < num_rows) & (columns[None, :] < num_columns)
    block = target + rows[:, None] * stride + columns[None, :]
    tl.store(block, tile.to(target.dtype.element_ty), mask=mask)


def check_factors(x: Tensor, weight: Tensor) -> None:
    """Kernels would read what lies behind a factor that is too small, so look first.

    Raises:
        ValueError: not ``x [rows, k]`` and ``weight [out, k]`` of one dtype.
    """
    fits = x.dim() == weight.dim() == 2 and x.shape[1] == weight.shape[1]
    if not fits or x.dtype != weight.dtype:
        raise ValueError(
            f"x must be [rows, k] and weight [out, k] of one dtype, not {list(x.shape)} {x.dtype} "
            f"and {list(weight.shape)} {weight.dtype}"
        )


def num_programs(x: Tensor) -> int:
    """As many as can be resident at once, whatever each needs: one on every multiprocessor."""
    if not x.is_cuda:
        return 4
    return int(torch.cuda.get_device_properties(x.device).multi_processor_count)


def block_sizes(x: Tensor) -> dict[str, int]:
    """Of a tile. float32 uses no tensor cores at full precision, so registers limit it."""
    if INTERPRETED or not x.is_cuda:
        return {"BLOCK_M": 32, "BLOCK_N": 32, "BLOCK_K": 32}
    if x.element_size() == 4:
        return {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 32}
    big = torch.cuda.get_device_capability(x.device) >= (9, 0)
    return {"BLOCK_M": 128, "BLOCK_N": 256 if big else 128, "BLOCK_K": 64}
