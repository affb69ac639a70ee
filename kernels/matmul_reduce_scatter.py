"""Matmul whose sum over ranks is scattered by rows, overlapped tile by tile.

``y = this rank's rows of the SUM over ranks of x @ weight.T``; x [n m, k], y [m, out], in one
launch of persistent programs. They take the tiles of the other ranks' rows first (rank + 1, …) and
store each into its owner's symmetric buffer, over the link, then raise that tile's flag there. Own
tiles come last: by then the partial tiles of the others have come, or are waited for one by one.
The owner adds in float32: own, then rank + 1, …, the same order in every run. Partial tiles, its
own among them, are kept in the dtype of ``x``: each is rounded once.

All programs must be resident at once (one for every multiprocessor). Under the interpreter programs
run one after the other, so there two launches make the remote and the own tiles.

Flops: ``2 n m k out``. Link, in and out: ``(n - 1) m out`` elements each. Memory: see
:func:`moved_bytes`. The backward pass is the mirror: all-gather + matmul.

Not run on a GPU yet, as ``all_gather_matmul.py``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from galvatron_compile.kernels.base import INTERPRETED, exact, tl, triton
from galvatron_compile.kernels.matmul_tiles import (
    block_sizes,
    check_factors,
    multiply_tile,
    num_programs,
    place_of,
    store_tile,
)
from galvatron_compile.kernels.peers import Peers, peers_of, plain_reduce_scatter
from galvatron_compile.kernels.sync import buffer_of, flag_of, is_sound, signal, wait


@triton.jit
def _reduce_tile(  # type: ignore[no-untyped-def]
    y, buffers, pads, state, tile, row, column, num_rows, num_columns, m, out, capacity,
    num_slots, rank, limit, READY: tl.constexpr, n: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, SLICE: tl.constexpr,
):  # fmt: skip
    """A tile of y: the sum of all ranks' partial tiles in this rank's buffer, once all have come.

    row, column: of the tile's first element. NaN if a rank did not signal.
    """
    epoch, arrived = tl.load(state), is_sound(state)
    tl.debug_barrier()  # the own partial tile was stored by other threads than will read it
    if not READY:
        for step in range(1, n):
            source = (rank + step) % n
            flag = flag_of(pads, rank, source * num_slots + tile)
            arrived = wait(flag, epoch, source, state + 1, limit) & arrived
    here = buffer_of(buffers, rank, epoch, capacity, y) + row * out + column
    rows, columns = tl.arange(0, BLOCK_M), tl.arange(0, SLICE)
    for start in range(0, BLOCK_N, SLICE):  # a slice at a time: registers
        mask = (rows[:, None] < num_rows) & (columns[None, :] < num_columns - start)
        within = rows[:, None] * out + columns[None, :] + start
        total = tl.zeros((BLOCK_M, SLICE), tl.float32)
        for step in range(0, n):
            partial = here + tl.cast((rank + step) % n, tl.int64) * m * out
            total += tl.load(partial + within, mask=mask, other=0.0).to(tl.float32)
        total = tl.where(arrived, total, float("nan"))
        target = y + row * out + column
        tl.store(target + within, total.to(y.dtype.element_ty), mask=mask)


@triton.jit
def matmul_reduce_scatter_kernel(  # type: ignore[no-untyped-def]
    x, weight, y, buffers, pads, state, m, out, k, stride_xm, stride_xk, stride_wn, stride_wk,
    capacity, num_slots, rank, limit, first_owner, last_owner, n: tl.constexpr,
    READY: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    SLICE: tl.constexpr, EVEN_K: tl.constexpr, INTERPRETED: tl.constexpr, GROUP: tl.constexpr = 8,
):  # fmt: skip
    """x [n m, k] and weight [out, k] have any strides, y [m, out] is contiguous.

    Makes the tiles of the owners rank + 1 + first_owner … rank + last_owner (modulo n).
    READY: partial tiles are there, neither signal nor wait (to time all but the synchronisation).
    """
    epoch, sound = tl.load(state), is_sound(state)
    tiles_m, tiles_n = tl.cdiv(m, BLOCK_M), tl.cdiv(out, BLOCK_N)
    num_tiles = tiles_m * tiles_n
    first = first_owner * num_tiles + tl.program_id(0)
    for place in range(first, last_owner * num_tiles, tl.num_programs(0)):
        owner = (rank + 1 + place // num_tiles) % n
        tile = place % num_tiles
        tile_row, tile_column = place_of(tile, tiles_m, tiles_n, GROUP)
        row = tl.cast(tile_row, tl.int64) * BLOCK_M
        column = tl.cast(tile_column, tl.int64) * BLOCK_N
        num_rows, num_columns = m - tile_row * BLOCK_M, out - tile_column * BLOCK_N
        total = multiply_tile(
            x + (tl.cast(owner, tl.int64) * m + row) * stride_xm, weight + column * stride_wn,
            num_rows, num_columns, k, stride_xm, stride_xk, stride_wn, stride_wk,
            BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K, INTERPRETED,
        )  # fmt: skip
        theirs = buffer_of(buffers, owner, epoch, capacity, y)
        theirs += (tl.cast(rank, tl.int64) * m + row) * out + column
        if sound:
            store_tile(theirs, total, out, num_rows, num_columns, BLOCK_M, BLOCK_N)
        if owner == rank:
            _reduce_tile(
                y, buffers, pads, state, tile, row, column, num_rows, num_columns, m, out,
                capacity, num_slots, rank, limit, READY, n, BLOCK_M, BLOCK_N, SLICE,
            )  # fmt: skip
        elif not READY:
            signal(flag_of(pads, owner, rank * num_slots + tile), epoch, sound)


@torch.library.custom_op("galvatron::matmul_reduce_scatter", mutates_args=())
def matmul_reduce_scatter(x: Tensor, weight: Tensor, n: int, peers: str) -> Tensor:
    """This rank's block of rows of the SUM over ``n`` ranks of ``x @ weight.T``.

    x: [n m, k], weight: [out, k], both this rank's own (k is what the ranks share out).
    Returns [m, out].

    Raises:
        ValueError: k or the dtype of x and weight differ, or the rows do not divide by the number
            of ranks.
    """
    check_factors(x, weight)
    if x.shape[0] % n:
        raise ValueError(f"{x.shape[0]} rows cannot be scattered to {n} ranks; pad them")
    ranks = peers_of(peers, n)
    m, out = x.shape[0] // n, weight.shape[0]
    num_tiles = 0
    if ranks.memory is not None:
        blocks = block_sizes(x)
        num_tiles = triton.cdiv(m, blocks["BLOCK_M"]) * triton.cdiv(out, blocks["BLOCK_N"])
    num_bytes = n * m * out * x.element_size()
    if not num_bytes or not ranks.runs(x, weight, num_bytes=num_bytes, num_slots=num_tiles):
        if n == 1:
            return x @ weight.t()
        return plain_reduce_scatter(exact(x) @ exact(weight).t(), ranks).to(x.dtype)
    y = x.new_empty((m, out))
    launch(x, weight, y, ranks)
    return y


def launch(x: Tensor, weight: Tensor, y: Tensor, peers: Peers, *, ready: bool = False) -> None:
    """The kernel, into y. ready: without signals and waits (y is then not a sum), for timing."""
    memory = peers.begin()
    blocks, n = block_sizes(x), peers.size
    for owners in ((0, n - 1), (n - 1, n)) if INTERPRETED else ((0, n),):
        matmul_reduce_scatter_kernel[(num_programs(x),)](
            x, weight, y, memory.buffers, memory.pads, memory.state,
            y.shape[0], y.shape[1], x.shape[1], *x.stride(), *weight.stride(),
            memory.capacity_bytes, memory.num_slots, peers.rank, memory.max_polls, *owners,
            n=n, READY=ready, SLICE=32, EVEN_K=x.shape[1] % blocks["BLOCK_K"] == 0,
            INTERPRETED=INTERPRETED, num_warps=8, num_stages=3, **blocks,
        )  # fmt: skip
    peers.end()


@matmul_reduce_scatter.register_fake
def _fake(x: Tensor, weight: Tensor, n: int, peers: str) -> Tensor:
    return x.new_empty((x.shape[0] // n, weight.shape[0]))


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, ctx.n, ctx.peers = inputs
    ctx.save_for_backward(x, weight)


def _backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
    from galvatron_compile.kernels.all_gather_matmul import all_gather_matmul  # it needs this too
    from galvatron_compile.kernels.all_reduce import all_gather_peers

    x, weight = ctx.saved_tensors
    dx = dweight = None
    if ctx.needs_input_grad[0]:
        dx, gathered = all_gather_matmul(dy, weight.t(), ctx.n, ctx.peers)
    else:
        gathered = all_gather_peers(dy, ctx.n, ctx.peers)
    if ctx.needs_input_grad[1]:
        dweight = gathered.t() @ x
    return dx, dweight, None, None


matmul_reduce_scatter.register_autograd(_backward, setup_context=_save)


def matmul_reduce_scatter_reference(xs: list[Tensor], weights: list[Tensor]) -> list[Tensor]:
    """``y`` of every rank in float64, from all ranks' inputs."""
    total = sum(x.double() @ w.double().t() for x, w in zip(xs, weights, strict=True))
    assert isinstance(total, Tensor)
    return list(total.chunk(len(xs)))


def flops(m: int, k: int, out: int, n: int) -> int:
    """Of one rank; m: rows of y."""
    return 2 * n * m * k * out


def moved_bytes(m: int, k: int, out: int, n: int, itemsize: int = 2) -> int:
    """In the memory of one rank: x, weight; the partial tiles of its rows (written, read); y."""
    return itemsize * (n * m * k + out * k + 2 * n * m * out + m * out)


def link_bytes(m: int, out: int, n: int, itemsize: int = 2) -> int:
    """Into, and out of, one rank over the link."""
    return itemsize * (n - 1) * m * out


def ahead() -> list[tuple[Any, dict[str, Any], int]]:
    """For ``compile_ahead``: (kernel, arguments, num_warps): forward, and weights transposed."""
    return [(matmul_reduce_scatter_kernel, _ahead(straight), 8) for straight in (True, False)]


def _ahead(straight: bool) -> dict[str, Any]:
    pointers = dict.fromkeys(("x", "weight", "y"), "*bf16")
    pointers |= dict.fromkeys(("buffers", "pads", "state"), "*i64")
    sizes = dict.fromkeys(("m", "out", "k", "capacity", "num_slots", "stride_xm"), "i32:16")
    strides = {"stride_wn": "i32:16", "stride_wk": 1}
    if not straight:
        strides = {"stride_wn": 1, "stride_wk": "i32:16"}
    return {
        **pointers, **sizes, **strides, "stride_xk": 1, "rank": "i32", "limit": "i32",
        "first_owner": "i32", "last_owner": "i32", "n": 8, "READY": False,
        "BLOCK_M": 128, "BLOCK_N": 256, "BLOCK_K": 64, "SLICE": 32, "EVEN_K": True,
        "INTERPRETED": False, "GROUP": 8,
    }  # fmt: skip
