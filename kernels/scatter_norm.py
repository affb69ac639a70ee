"""The end of a sum whose rows are shared out among the ranks, the residual's addition and the RMS
norm behind it, in one kernel: what sequence parallelism does where a row-parallel product ends.

``total = residual + this rank's rows of the SUM over ranks of partial``, ``y`` its RMS norm (the
formula is in sum_norm.py); float32 inside, total and y rounded once. For R rows of f features on a
rank, of e bytes an element, it reads partial (n R rows), residual and the ranks' buffers, writes
this rank's buffer, total and y: ``(3 n + 3) R f e`` bytes, of which ``(n - 1) R f e`` come over the
links; a reduce-scatter, addition and norm one after the other move ``(3 n + 5) R f e``. About
``(n + 5) R f`` flops. The backward gathers the rows' gradient: ``(n - 1) R f e`` over the links.

A program does some rows of every shard, on every rank the same: it puts them into its buffer,
signals, waits for the program of the same number of each peer, adds its own shard's and normalises.

Not run on a GPU yet.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from galvatron_compile.kernels import rms_norm, row_norms
from galvatron_compile.kernels.all_reduce import all_gather_peers, reduce_scatter_peers
from galvatron_compile.kernels.all_reduce_kernels import exchange
from galvatron_compile.kernels.base import tl, triton, warps_for
from galvatron_compile.kernels.peers import peers_of
from galvatron_compile.kernels.sum_norm import (
    add_and_normalise,
    ahead_arguments,
    fits,
    gradients,
    launch,
    save,
)
from galvatron_compile.kernels.sync import buffer_of, copy_flat, is_sound


@triton.jit
def scatter_norm_kernel(  # type: ignore[no-untyped-def]
    partial, residual, weight, y, total, buffers, pads, state, num_rows, rows_each, features, eps,
    capacity, num_slots, rank, limit, n: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """partial: contiguous [n num_rows, features]; residual, y, total: [num_rows, features];
    rows_each: rows of y that a program makes."""
    epoch, sound = tl.load(state), is_sound(state)
    first = tl.program_id(0) * rows_each
    rows = tl.minimum(num_rows - first, rows_each)
    mine = buffer_of(buffers, rank, epoch, capacity, partial)
    if sound:
        for part in range(0, n):
            start = (tl.cast(part, tl.int64) * num_rows + first) * features
            copy_flat(partial + start, mine + start, rows * features, BLOCK)
    arrived = exchange(pads, state, sound, 0, num_slots, rank, limit, n)
    add_and_normalise(
        residual, weight, y, total, buffers, epoch, partial, first,
        tl.cast(rank, tl.int64) * num_rows, rows, features, eps, arrived, capacity, n, BLOCK,
    )  # fmt: skip


@torch.library.custom_op("galvatron::reduce_scatter_add_rms_norm", mutates_args=())
def reduce_scatter_add_rms_norm(
    partial: Tensor, residual: Tensor, weight: Tensor, eps: float, n: int, peers: str
) -> tuple[Tensor, Tensor]:
    """(y, total), the rows of this rank: block ``rank`` of the ``n`` blocks of the first dim.

    partial: [n rows, ..., f]; residual: [rows, ..., f]; weight: [f]. total is of the dtype of
    partial, y of the promoted one of partial and weight. For a loss that is the sum over ranks:
    partial's gradient is that of the sum's rows gathered from all ranks, weight's is of this rank's
    rows only, so who holds a replicated weight adds it over the ranks.

    Raises:
        ValueError: shapes that do not fit, or rows that do not divide by the number of ranks.
    """
    _check(partial, residual, weight, n)
    ranks = peers_of(peers, n)
    if fits(partial, residual, weight, ranks):
        total = partial.new_empty(residual.shape)
        y = row_norms.empty_result(total, weight)
        launch(scatter_norm_kernel, partial, residual, weight, eps, y, total, ranks)
        return y, total
    summed = reduce_scatter_peers(partial, n, peers)
    return rms_norm.add_rms_norm(summed, residual, weight, eps)


def _check(partial: Tensor, residual: Tensor, weight: Tensor, n: int) -> None:
    if partial.shape[0] % n:
        raise ValueError(f"{partial.shape[0]} rows cannot be scattered to {n} ranks; pad them")
    row_norms.check(partial[: partial.shape[0] // n], residual, weight)


@reduce_scatter_add_rms_norm.register_fake
def _fake(
    partial: Tensor, residual: Tensor, weight: Tensor, eps: float, n: int, peers: str
) -> tuple[Tensor, Tensor]:
    total = partial.new_empty((partial.shape[0] // n, *partial.shape[1:]))
    return row_norms.empty_result(total, weight), total


def _backward(ctx: Any, dy: Tensor | None, dtotal: Tensor | None) -> tuple[Any, ...]:
    dtotal, dresidual, dweight = gradients(ctx, dy, dtotal)
    dpartial = None
    if dtotal is not None and ctx.needs_input_grad[0]:
        dpartial = all_gather_peers(dtotal, ctx.n, ctx.peers)
    return dpartial, dresidual, dweight, None, None, None


reduce_scatter_add_rms_norm.register_autograd(_backward, setup_context=save)


def scatter_norm_reference(
    partials: list[Tensor], residuals: list[Tensor], weights: list[Tensor], eps: float
) -> list[tuple[Tensor, Tensor]]:
    """(y, total) of every rank in float64, from all ranks' inputs."""
    summed = torch.stack([p.double() for p in partials]).sum(0).chunk(len(partials))
    totals = [rows + r.double() for rows, r in zip(summed, residuals, strict=True)]
    normed = [rms_norm.rms_norm_reference(t, w, eps) for t, w in zip(totals, weights, strict=True)]
    return list(zip(normed, totals, strict=True))


def flops(rows: int, features: int, n: int) -> int:
    """Of one rank; rows: of y."""
    return (n + 5) * rows * features


def moved_bytes(rows: int, features: int, n: int, itemsize: int) -> int:
    """Of one rank, its own memory and its peers'; rows: of y."""
    return (3 * n + 3) * rows * features * itemsize + features * itemsize


def link_bytes(rows: int, features: int, n: int, itemsize: int = 2) -> int:
    """Into, and out of, one rank over the link; rows: of y."""
    return itemsize * (n - 1) * rows * features


def ahead() -> list[tuple[Any, dict[str, Any], int]]:
    """What ``compile_ahead`` takes: 4 ranks, rows of 4096 features in bf16."""
    return [(scatter_norm_kernel, ahead_arguments(), warps_for(4096))]
