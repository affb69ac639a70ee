"""The end of a sum over ranks, the residual's addition and the RMS norm behind it, in one kernel.

``total = residual + SUM over ranks of partial``, ``y = weight * total * rsqrt(mean(total²) + eps)``
over rows of f features; float32 inside, total and y rounded once. For R rows of e bytes an element
it reads partial, residual and the peers' buffers, writes this rank's buffer, total and y: ``(4 + n)
R f e`` bytes, of which ``(n - 1) R f e`` come over the links; a one-shot all-reduce, addition and
norm one after the other move ``(7 + n) R f e``. About ``(n + 5) R f`` flops.

A program does some rows, on every rank the same: it puts them into its buffer, signals, waits for
the program of the same number of each peer, adds and normalises. There are at most as many programs
as can be resident. Sums of many bytes are worth two-shot (``all_reduce.py``): then its kernel runs
first and ``rms_norm.py``'s behind it. The form for rows that are shared out is scatter_norm.py.

Not run on a GPU yet.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from galvatron_compile.kernels import rms_norm, row_norms
from galvatron_compile.kernels.all_reduce import all_reduce_peers
from galvatron_compile.kernels.all_reduce_kernels import exchange, sum_of_ranks
from galvatron_compile.kernels.base import next_power_of_2, tl, triton, warps_for
from galvatron_compile.kernels.matmul_tiles import num_programs
from galvatron_compile.kernels.peers import Peers, peers_of
from galvatron_compile.kernels.sync import buffer_of, copy_flat, is_sound

MAX_FEATURES = 16384  # of a row, which one program holds in registers
MAX_BYTES = 1 << 20  # more is faster two-shot


@triton.jit
def add_and_normalise(  # type: ignore[no-untyped-def]
    residual, weight, y, total, buffers, epoch, like, first, above, num_rows, features, eps,
    arrived, capacity, n: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Rows ``first … first + num_rows`` of y and total; ``above``: int64, rows of the buffers above
    row 0 of y. like: a pointer of the type of what lies in the buffers. NaN if not all arrived."""
    columns = tl.arange(0, BLOCK)
    mask = columns < features
    scales = tl.load(weight + columns, mask=mask, other=0.0).to(tl.float32)
    for row in range(first, first + num_rows):
        summed = (above + row) * features + columns
        offsets = tl.cast(row, tl.int64) * features + columns
        added = sum_of_ranks(buffers, epoch, like, summed, mask, capacity, n)
        added += tl.load(residual + offsets, mask=mask, other=0.0).to(tl.float32)
        added = tl.where(arrived, added, float("nan"))
        tl.store(total + offsets, added.to(total.dtype.element_ty), mask=mask)
        square = tl.sum(tl.where(mask, added * added, 0.0), 0)
        normed = added * (1.0 / tl.sqrt(square / features + eps)) * scales
        tl.store(y + offsets, normed.to(y.dtype.element_ty), mask=mask)


@triton.jit
def sum_norm_kernel(  # type: ignore[no-untyped-def]
    partial, residual, weight, y, total, buffers, pads, state, num_rows, rows_each, features, eps,
    capacity, num_slots, rank, limit, n: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """partial, residual, y, total: contiguous [num_rows, features]; rows_each: of a program."""
    epoch, sound = tl.load(state), is_sound(state)
    first = tl.program_id(0) * rows_each
    rows = tl.minimum(num_rows - first, rows_each)
    mine = buffer_of(buffers, rank, epoch, capacity, partial)
    start = tl.cast(first, tl.int64) * features
    if sound:
        copy_flat(partial + start, mine + start, rows * features, BLOCK)
    arrived = exchange(pads, state, sound, 0, num_slots, rank, limit, n)
    add_and_normalise(
        residual, weight, y, total, buffers, epoch, partial, first, tl.cast(0, tl.int64), rows,
        features, eps, arrived, capacity, n, BLOCK,
    )  # fmt: skip


@torch.library.custom_op("galvatron::all_reduce_add_rms_norm", mutates_args=())
def all_reduce_add_rms_norm(
    partial: Tensor, residual: Tensor, weight: Tensor, eps: float, n: int, peers: str
) -> tuple[Tensor, Tensor]:
    """(y, total); partial and residual [..., f] of one shape, weight [f]; total is of the dtype of
    partial, y of the promoted one of partial and weight.

    Both results are replicated, and so their gradients are: partial and residual get the same.

    Raises:
        ValueError: shapes that do not fit.
    """
    row_norms.check(partial, residual, weight)
    ranks = peers_of(peers, n)
    if fits(partial, residual, weight, ranks) and num_bytes_of(partial) <= MAX_BYTES:
        y, total = row_norms.empty_result(partial, weight), partial.new_empty(partial.shape)
        launch(sum_norm_kernel, partial, residual, weight, eps, y, total, ranks)
        return y, total
    summed = all_reduce_peers(partial, n, peers)
    return rms_norm.add_rms_norm(summed, residual, weight, eps)


def num_bytes_of(x: Tensor) -> int:
    return x.numel() * x.element_size()


def fits(partial: Tensor, residual: Tensor, weight: Tensor, peers: Peers) -> bool:
    """Whether a kernel of this file or of scatter_norm.py does it."""
    needs = {"num_bytes": num_bytes_of(partial), "num_slots": 1}
    short = 0 < partial.shape[-1] <= MAX_FEATURES and partial.numel() > 0
    return short and peers.runs(partial, residual, weight, **needs)


def launch(
    kernel: Any,
    partial: Tensor,
    residual: Tensor,
    weight: Tensor,
    eps: float,
    y: Tensor,
    total: Tensor,
    peers: Peers,
) -> None:
    """A kernel of this file or of scatter_norm.py, into y and total, which are contiguous."""
    features = y.shape[-1]
    num_rows = y.numel() // features
    memory = peers.begin()
    rows_each = triton.cdiv(num_rows, min(num_programs(y), memory.num_slots))
    block = next_power_of_2(features)
    kernel[(triton.cdiv(num_rows, rows_each),)](
        partial.contiguous(), residual.contiguous(), weight.contiguous(), y, total,
        memory.buffers, memory.pads, memory.state, num_rows, rows_each, features, eps,
        memory.capacity_bytes, memory.num_slots, peers.rank, memory.max_polls,
        n=peers.size, BLOCK=block, num_warps=warps_for(block),
    )  # fmt: skip
    peers.end()


@all_reduce_add_rms_norm.register_fake
def _fake(
    partial: Tensor, residual: Tensor, weight: Tensor, eps: float, n: int, peers: str
) -> tuple[Tensor, Tensor]:
    return row_norms.empty_result(partial, weight), partial.new_empty(partial.shape)


def save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    """For ``gradients``; also of the operator in scatter_norm.py."""
    _, residual, weight, ctx.eps, ctx.n, ctx.peers = inputs
    ctx.residual_dtype = residual.dtype
    ctx.save_for_backward(output[1], weight)
    ctx.set_materialize_grads(False)


def gradients(
    ctx: Any, dy: Tensor | None, dtotal: Tensor | None
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Of the sum over ranks (and of partial, if each rank has all rows), residual and weight."""
    total, weight = ctx.saved_tensors
    gradient, dweight = dtotal, None
    if dy is not None:
        scale = torch.ops.galvatron.rms_norm(total, weight, ctx.eps)[1]
        gradient, dweight = torch.ops.galvatron.rms_norm_backward(dy, total, weight, scale, dtotal)
    return gradient, None if gradient is None else gradient.to(ctx.residual_dtype), dweight


def _backward(ctx: Any, dy: Tensor | None, dtotal: Tensor | None) -> tuple[Any, ...]:
    return *gradients(ctx, dy, dtotal), None, None, None


all_reduce_add_rms_norm.register_autograd(_backward, setup_context=save)


def sum_norm_reference(
    partials: list[Tensor], residual: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """(y, total) in float64, from all ranks' partial sums."""
    total = torch.stack([p.double() for p in partials]).sum(0) + residual.double()
    scale = torch.rsqrt(total.square().mean(-1, keepdim=True) + eps)
    return weight.double() * total * scale, total


def flops(rows: int, features: int, n: int) -> int:
    return (n + 5) * rows * features


def moved_bytes(rows: int, features: int, n: int, itemsize: int) -> int:
    """Of one rank, its own memory and its peers'."""
    return (4 + n) * rows * features * itemsize + features * itemsize


def ahead() -> list[tuple[Any, dict[str, Any], int]]:
    """What ``compile_ahead`` takes: 4 ranks, rows of 4096 features in bf16."""
    return [(sum_norm_kernel, ahead_arguments(), warps_for(4096))]


def ahead_arguments() -> dict[str, Any]:
    """Of this kernel and of the one in scatter_norm.py."""
    return {
        "partial": "*bf16", "residual": "*bf16", "weight": "*bf16", "y": "*bf16",
        "total": "*bf16", "buffers": "*i64", "pads": "*i64", "state": "*i64", "num_rows": "i32",
        "rows_each": "i32", "features": "i32:16", "eps": "fp32", "capacity": "i64:16",
        "num_slots": "i32:16", "rank": "i32", "limit": "i32", "n": 4, "BLOCK": 4096,
    }  # fmt: skip
