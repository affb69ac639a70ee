"""All-gather of rows, overlapped with the matmul that needs them.

``gathered = rows of all ranks [n m, k]``, ``y = gathered @ weight.T [n m, out]``, in one launch. Of
its programs, ``PRODUCERS`` move data and the others multiply:

1. A producer copies chunks of ``BLOCK_M`` rows of this rank's shard to its symmetric buffer and
   signals every peer; then it copies the peers' chunks, as they come, over the link to ``gathered``
   and raises this rank's own flag for each (pull: the gathered tensor needs no symmetric memory).
2. The others take tiles of ``y`` in turn (persistent): first those of the own shard, read from
   ``x`` without waiting, then those of rank + 1, rank + 2, …, each once the chunk's flag is up.

All programs must be resident at once, since some wait for others: the grid has as many as there
are multiprocessors. Producers have the lowest numbers and publish before they wait, so that
programs that run one after the other (the interpreter) do not hang either.

Flops: ``2 n m k out``. Link, in and out: ``(n - 1) m k`` elements each. Memory: see
:func:`moved_bytes`. The backward pass is the mirror: matmul + reduce-scatter for ``x``.

Not run on a GPU yet: numerics and the protocol are tested in the interpreter across processes,
registers, tensor cores and barriers in the machine code.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from galvatron_compile.kernels.base import INTERPRETED, tl, triton
from galvatron_compile.kernels.matmul_tiles import (
    block_sizes,
    check_factors,
    multiply_tile,
    num_programs,
    place_of,
    store_tile,
)
from galvatron_compile.kernels.peers import Peers, peers_of, plain_all_gather
from galvatron_compile.kernels.sync import (
    buffer_of,
    copy_flat,
    fill_with_nan,
    flag_of,
    is_sound,
    signal,
    wait,
)


@triton.jit
def _produce(  # type: ignore[no-untyped-def]
    x, gathered, buffers, pads, state, m, k, capacity, num_slots, rank, limit, n: tl.constexpr,
    BLOCK_M: tl.constexpr, COPY: tl.constexpr, PRODUCERS: tl.constexpr,
):  # fmt: skip
    """Publish every PRODUCERS-th chunk of this rank's rows, then fetch as many of each peer's."""
    epoch, sound = tl.load(state), is_sound(state)
    here = flag_of(pads, rank, 0)
    num_chunks = tl.cdiv(m, BLOCK_M)
    shard = tl.cast(m, tl.int64) * k
    for chunk in range(tl.program_id(0), num_chunks, PRODUCERS):
        first = tl.cast(chunk, tl.int64) * BLOCK_M * k
        count = tl.minimum(m - chunk * BLOCK_M, BLOCK_M) * k
        if sound:
            copy_flat(x + first, buffer_of(buffers, rank, epoch, capacity, x) + first, count, COPY)
        for step in range(1, n):
            signal(flag_of(pads, (rank + step) % n, rank * num_slots + chunk), epoch, sound)
        copy_flat(x + first, gathered + rank * shard + first, count, COPY)
    for step in range(1, n):
        source = (rank + step) % n
        theirs = buffer_of(buffers, source, epoch, capacity, x)
        for chunk in range(tl.program_id(0), num_chunks, PRODUCERS):
            first = tl.cast(chunk, tl.int64) * BLOCK_M * k
            count = tl.minimum(m - chunk * BLOCK_M, BLOCK_M) * k
            slot = source * num_slots + chunk
            target = gathered + source * shard + first
            if wait(here + slot, epoch, source, state + 1, limit) & sound:
                copy_flat(theirs + first, target, count, COPY)
                signal(here + n * num_slots + slot, epoch, sound)
            else:
                fill_with_nan(target, count, COPY)


@triton.jit
def all_gather_matmul_kernel(  # type: ignore[no-untyped-def]
    x, weight, y, gathered, buffers, pads, state, m, out, k, stride_wn, stride_wk, capacity,
    num_slots, rank, limit, n: tl.constexpr, PRODUCERS: tl.constexpr, READY: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, COPY: tl.constexpr,
    EVEN_K: tl.constexpr, INTERPRETED: tl.constexpr, GROUP: tl.constexpr = 8,
):  # fmt: skip
    """x [m, k], y [n m, out], gathered [n m, k] are contiguous; weight [out, k] has any strides.

    READY: ``gathered`` is complete, wait for nothing (to time the matmul alone; PRODUCERS = 0).
    """
    if tl.program_id(0) < PRODUCERS:
        _produce(
            x, gathered, buffers, pads, state, m, k, capacity, num_slots, rank, limit,
            n, BLOCK_M, COPY, PRODUCERS,
        )  # fmt: skip
    else:
        epoch = tl.load(state)
        fetched = flag_of(pads, rank, n * num_slots)
        tiles_m, tiles_n = tl.cdiv(m, BLOCK_M), tl.cdiv(out, BLOCK_N)
        num_tiles = tiles_m * tiles_n
        stride = tl.num_programs(0) - PRODUCERS
        for tile in range(tl.program_id(0) - PRODUCERS, n * num_tiles, stride):
            source = (rank + tile // num_tiles) % n
            row, column = place_of(tile % num_tiles, tiles_m, tiles_n, GROUP)
            above = tl.cast(source, tl.int64) * m + row * BLOCK_M  # rows of y above the tile
            a = gathered + above * k
            arrived = tile >= 0
            if source == rank:
                a = x + tl.cast(row, tl.int64) * BLOCK_M * k
            elif not READY:
                flag = fetched + source * num_slots + row
                arrived = wait(flag, epoch, source, state + 1, limit)
            total = multiply_tile(
                a, weight + tl.cast(column, tl.int64) * BLOCK_N * stride_wn,
                m - row * BLOCK_M, out - column * BLOCK_N, k, k, 1, stride_wn, stride_wk,
                BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K, INTERPRETED,
            )  # fmt: skip
            total = tl.where(arrived, total, float("nan"))
            store_tile(
                y + above * out + column * BLOCK_N, total, out,
                m - row * BLOCK_M, out - column * BLOCK_N, BLOCK_M, BLOCK_N,
            )  # fmt: skip


@torch.library.custom_op("galvatron::all_gather_matmul", mutates_args=())
def all_gather_matmul(x: Tensor, weight: Tensor, n: int, peers: str) -> tuple[Tensor, Tensor]:
    """``(gathered @ weight.T, gathered)`` where gathered are the rows of ``n`` ranks.

    x: [m, k], rows of this rank; the same m on every rank. weight: [out, k], this rank's own.
    Returns [n m, out] and [n m, k]; rank r's rows are block r.

    Raises:
        ValueError: k or the dtype of x and weight differ.
    """
    check_factors(x, weight)
    ranks = peers_of(peers, n)
    blocks = block_sizes(x)
    num_chunks = triton.cdiv(x.shape[0], blocks["BLOCK_M"]) if ranks.memory is not None else 0
    num_bytes = x.numel() * x.element_size()
    if not x.numel() or not ranks.runs(x, weight, num_bytes=num_bytes, num_slots=num_chunks):
        gathered = plain_all_gather(x, ranks) if n > 1 else x.clone(memory_format=_DENSE)
        return gathered @ weight.t(), gathered
    y = x.new_empty((n * x.shape[0], weight.shape[0]))
    gathered = x.new_empty((n * x.shape[0], x.shape[1]))
    launch(x.contiguous(), weight, y, gathered, ranks)
    return y, gathered


_DENSE = torch.contiguous_format


def launch(
    x: Tensor, weight: Tensor, y: Tensor, gathered: Tensor, peers: Peers, *, ready: bool = False
) -> None:
    """The kernel, into y and gathered. ready: gathered is complete already, only multiply."""
    memory = peers.begin()
    blocks = block_sizes(x)
    producers = 0 if ready else (2 if INTERPRETED else 16)
    all_gather_matmul_kernel[(num_programs(x),)](
        x, weight, y, gathered, memory.buffers, memory.pads, memory.state,
        x.shape[0], weight.shape[0], x.shape[1], weight.stride(0), weight.stride(1),
        memory.capacity_bytes, memory.num_slots, peers.rank, memory.max_polls,
        n=peers.size, PRODUCERS=producers, READY=ready,
        EVEN_K=x.shape[1] % blocks["BLOCK_K"] == 0, COPY=16384, INTERPRETED=INTERPRETED,
        num_warps=8, num_stages=3, **blocks,
    )  # fmt: skip
    peers.end()


@all_gather_matmul.register_fake
def _fake(x: Tensor, weight: Tensor, n: int, peers: str) -> tuple[Tensor, Tensor]:
    rows = n * x.shape[0]
    return x.new_empty((rows, weight.shape[0])), x.new_empty((rows, x.shape[1]))


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.set_materialize_grads(False)  # gathered is rarely used: no reduce-scatter of zeros then
    _, weight, ctx.n, ctx.peers = inputs
    ctx.save_for_backward(weight, output[1])


def _backward(ctx: Any, dy: Tensor | None, dgathered: Tensor | None) -> tuple[Any, ...]:
    # Here, because each of these files needs the others' operators.
    from galvatron_compile.kernels.all_reduce import reduce_scatter_peers
    from galvatron_compile.kernels.matmul_reduce_scatter import matmul_reduce_scatter

    weight, gathered = ctx.saved_tensors
    dx = dweight = None
    if dy is not None and ctx.needs_input_grad[0]:
        dx = matmul_reduce_scatter(dy, weight.t(), ctx.n, ctx.peers)
    if dgathered is not None and ctx.needs_input_grad[0]:
        more = reduce_scatter_peers(dgathered, ctx.n, ctx.peers)
        dx = more if dx is None else dx + more
    if dy is not None and ctx.needs_input_grad[1]:
        dweight = dy.t() @ gathered
    return dx, dweight, None, None


all_gather_matmul.register_autograd(_backward, setup_context=_save)


def all_gather_matmul_reference(shards: list[Tensor], weights: list[Tensor]) -> list[Tensor]:
    """``y`` of every rank in float64, from all ranks' inputs."""
    gathered = torch.cat([x.double() for x in shards])
    return [gathered @ weight.double().t() for weight in weights]


def flops(m: int, k: int, out: int, n: int) -> int:
    """Of one rank; m: rows of a shard."""
    return 2 * n * m * k * out


def moved_bytes(m: int, k: int, out: int, n: int, itemsize: int = 2) -> int:
    """In the memory of one rank: shards read by producers (own and, for a peer, published), written
    to the buffer and to ``gathered``, read by the matmul once; weight; y."""
    shard = m * k
    own, others = 4 * shard, (n - 1) * shard * 3
    return itemsize * (own + others + out * k + n * m * out)


def link_bytes(m: int, k: int, n: int, itemsize: int = 2) -> int:
    """Into, and out of, one rank over the link."""
    return itemsize * (n - 1) * m * k


def ahead() -> list[tuple[Any, dict[str, Any], int]]:
    """For ``compile_ahead``: (kernel, arguments, num_warps): forward, and weights transposed."""
    return [(all_gather_matmul_kernel, _ahead(straight), 8) for straight in (True, False)]


def _ahead(straight: bool) -> dict[str, Any]:
    pointers = dict.fromkeys(("x", "weight", "y", "gathered"), "*bf16")
    pointers |= dict.fromkeys(("buffers", "pads", "state"), "*i64")
    sizes = dict.fromkeys(("m", "out", "k", "capacity", "num_slots"), "i32:16")
    strides = {"stride_wn": "i32:16", "stride_wk": 1}
    if not straight:
        strides = {"stride_wn": 1, "stride_wk": "i32:16"}
    return {
        **pointers, **sizes, **strides, "rank": "i32", "limit": "i32", "n": 8,
        "PRODUCERS": 16, "READY": False, "BLOCK_M": 128, "BLOCK_N": 256, "BLOCK_K": 64,
        "COPY": 16384, "EVEN_K": True, "INTERPRETED": False, "GROUP": 8,
    }  # fmt: skip
