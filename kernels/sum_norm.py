"""The end of a sum over ranks, the residual's addition and the RMS norm behind it, in one kernel.

``total = residual + SUM over ranks of partial``, ``y = weight * total * rsqrt(mean(total²) + eps)``
over rows of f features; float32 inside, total and y rounded once. For R rows of e bytes an element
it reads partial, residual and the peers' buffers, writes this rank's buffer, total and y: ``(4 + n)
R f e`` bytes, of which ``(n - 1) R f e`` come over the links; a one-shot all-reduce, addition and
norm one after the other move ``(7 + n) R f e``. About ``(n + 5) R f`` flops.

A program does some rows on every rank: it puts them into its buffer, signals, waits for the program
of the same number of each peer, adds and normalises. Sums of many bytes are worth two-shot
(``all_reduce.py``): then its kernel runs first and ``rms_norm.py``'s behind it.

Not run on a GPU yet.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from galvatron_compile.kernels import rms_norm  # noqa: F401 - its operators
from galvatron_compile.kernels.all_reduce import all_reduce_peers, hear, tell
from galvatron_compile.kernels.base import next_power_of_2, tl, triton, warps_for
from galvatron_compile.kernels.peers import Peers, peers_of
from galvatron_compile.kernels.sync import buffer_of

MAX_FEATURES = 16384  # of a row, which one program holds in registers
MAX_BYTES = 1 << 20  # more is faster two-shot
MAX_PROGRAMS = 1024


@triton.jit
def sum_norm_kernel(  # type: ignore[no-untyped-def]
    partial, residual, weight, y, total, buffers, pads, state, num_rows, features, eps, capacity,
    num_slots, rank, limit, n: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """partial, residual, y, total: contiguous [num_rows, features]. ROWS: of a program."""
    epoch, program = tl.load(state), tl.program_id(0)
    columns = tl.arange(0, BLOCK)
    inside = columns < features
    mine = buffer_of(buffers, rank, epoch, capacity, partial)
    for place in range(0, ROWS):
        row = program * ROWS + place
        mask = inside & (row < num_rows)
        offsets = row.to(tl.int64) * features + columns
        tl.store(mine + offsets, tl.load(partial + offsets, mask=mask), mask=mask)
    tell(pads, state, 0, num_slots, rank, n)
    arrived = hear(pads, state, 0, num_slots, rank, limit, n)
    scales = tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
    for place in range(0, ROWS):
        row = program * ROWS + place
        mask = inside & (row < num_rows)
        offsets = row.to(tl.int64) * features + columns
        added = tl.load(residual + offsets, mask=mask, other=0.0).to(tl.float32)
        for source in range(0, n):
            theirs = buffer_of(buffers, source, epoch, capacity, partial)
            added += tl.load(theirs + offsets, mask=mask, other=0.0).to(tl.float32)
        added = tl.where(arrived, added, float("nan"))
        tl.store(total + offsets, added.to(total.dtype.element_ty), mask=mask)
        square = tl.sum(tl.where(mask, added * added, 0.0), 0)
        normed = added * (1.0 / tl.sqrt(square / features + eps)) * scales
        tl.store(y + offsets, normed.to(y.dtype.element_ty), mask=mask)


@torch.library.custom_op("galvatron::all_reduce_add_rms_norm", mutates_args=())
def all_reduce_add_rms_norm(
    partial: Tensor, residual: Tensor, weight: Tensor, eps: float, n: int, peers: str
) -> tuple[Tensor, Tensor]:
    """(y, total); partial and residual [..., f] of one shape and dtype, weight [f].

    Both results are replicated, and so their gradients are: partial and residual get the same.
    """
    ranks = peers_of(peers, n)
    partial, residual = partial.contiguous(), residual.contiguous()
    if _fits(partial, residual, weight, ranks):
        y, total = torch.empty_like(partial), torch.empty_like(partial)
        launch(partial, residual, weight, eps, y, total, ranks)
        return y, total
    summed = all_reduce_peers(partial, n, peers)
    y, total, _ = torch.ops.galvatron.add_rms_norm(summed, residual, weight, eps)
    return y, total


def _fits(partial: Tensor, residual: Tensor, weight: Tensor, peers: Peers) -> bool:
    num_bytes = partial.numel() * partial.element_size()
    num_programs = min(MAX_PROGRAMS, partial.numel() // max(1, partial.shape[-1]))
    return (
        0 < num_bytes <= MAX_BYTES
        and partial.shape[-1] <= MAX_FEATURES
        and peers.runs(partial, residual, weight, num_bytes=num_bytes, num_slots=num_programs)
    )


def launch(
    partial: Tensor,
    residual: Tensor,
    weight: Tensor,
    eps: float,
    y: Tensor,
    total: Tensor,
    peers: Peers,
) -> None:
    """The kernel, on contiguous tensors."""
    features = partial.shape[-1]
    num_rows = partial.numel() // features
    rows = next_power_of_2(triton.cdiv(num_rows, MAX_PROGRAMS))
    block = next_power_of_2(features)
    memory = peers.begin()
    sum_norm_kernel[(triton.cdiv(num_rows, rows),)](
        partial, residual, weight.contiguous(), y, total, memory.buffers, memory.pads,
        memory.state, num_rows, features, eps, memory.capacity_bytes, memory.num_slots,
        peers.rank, memory.max_polls, n=peers.size, ROWS=rows, BLOCK=block,
        num_warps=warps_for(block),
    )  # fmt: skip
    peers.end()


@all_reduce_add_rms_norm.register_fake
def _fake(
    partial: Tensor, residual: Tensor, weight: Tensor, eps: float, n: int, peers: str
) -> tuple[Tensor, Tensor]:
    like = torch.empty_like(partial, memory_format=torch.contiguous_format)
    return like, torch.empty_like(like)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _, _, weight, ctx.eps, _, _ = inputs
    ctx.save_for_backward(output[1], weight)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, dy: Tensor | None, dtotal: Tensor | None) -> tuple[Any, ...]:
    total, weight = ctx.saved_tensors
    gradient, dweight = dtotal, None
    if dy is not None:
        scale = torch.ops.galvatron.rms_norm(total, weight, ctx.eps)[1]
        gradient, dweight = torch.ops.galvatron.rms_norm_backward(dy, total, weight, scale)
        gradient = gradient if dtotal is None else gradient + dtotal
    return gradient, gradient, dweight, None, None, None


all_reduce_add_rms_norm.register_autograd(_backward, setup_context=_save)


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
    arguments = {
        "partial": "*bf16", "residual": "*bf16", "weight": "*bf16", "y": "*bf16",
        "total": "*bf16", "buffers": "*i64", "pads": "*i64", "state": "*i64", "num_rows": "i32",
        "features": "i32:16", "eps": "fp32", "capacity": "i64:16", "num_slots": "i32:16",
        "rank": "i32", "limit": "i32", "n": 4, "ROWS": 1, "BLOCK": 4096,
    }  # fmt: skip
    return [(sum_norm_kernel, arguments, warps_for(4096))]
