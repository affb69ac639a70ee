"""All-reduce, reduce-scatter and all-gather that read the peers' buffers themselves.

*One-shot*: every rank reads the whole tensor of each peer and adds: one exchange of signals, for
tensors so small that latency counts. *Two-shot*: every rank adds its own shard, then reads the sums
of the others: two exchanges, ``2 (n - 1) / n`` tensors over the link instead of ``n - 1``. The
first half of two-shot alone is a reduce-scatter, publishing and reading alone an all-gather.

A tensor is cut into ``n`` shards and a shard into blocks of ``BLOCK``; program ``j`` of every rank
has the blocks ``j, j + programs, …`` of every shard: it stores them in its rank's symmetric buffer,
signals, and waits only for the programs ``j`` of its peers. So no program waits for another of its
own rank, and they may run in any order, or one after the other. Sums are made in float32, in rank
order: one-shot gives the same bits on every rank, and two-shot too.

Link, into and out of one rank, for ``size`` elements: see :func:`link_bytes`. Memory: ``x`` read
and stored once, the result stored once, and what peers read. No flops worth counting.

Not run on a GPU yet, as ``all_gather_matmul.py``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from galvatron_compile.kernels.base import INTERPRETED, tl, triton
from galvatron_compile.kernels.peers import (
    Peers,
    peers_of,
    plain_all_gather,
    plain_reduce_scatter,
)
from galvatron_compile.kernels.sync import buffer_of, flag_of, signal, wait

# Where one-shot ends: a guess from public reports for 8 ranks on NVLink, to be measured.
ONE_SHOT_BYTES = 256 << 10


@triton.jit
def publish(  # type: ignore[no-untyped-def]
    x, buffers, pads, state, first, count, first_signal, capacity, num_slots, rank,
    n: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Store this program's blocks of ``x[first : first + count]`` in this rank's buffer."""
    mine = buffer_of(buffers, rank, tl.load(state), capacity, x)
    start = tl.program_id(0) * BLOCK
    for offset in range(start, count, tl.num_programs(0) * BLOCK):
        places = offset + tl.arange(0, BLOCK)
        mask = places < count
        tl.store(mine + first + places, tl.load(x + first + places, mask=mask), mask=mask)


@triton.jit
def tell(pads, state, slot, num_slots, rank, n: tl.constexpr):  # type: ignore[no-untyped-def]
    """Signal program ``j`` of every peer from program ``j`` of this rank; slot: 0, or n num_slots
    for a second signal in one operation."""
    for step in range(1, n):
        flag = slot + rank * num_slots + tl.program_id(0)
        signal(flag_of(pads, (rank + step) % n, flag), tl.load(state))


@triton.jit
def hear(pads, state, slot, num_slots, rank, limit, n: tl.constexpr):  # type: ignore[no-untyped-def]
    """Wait for what ``tell`` signals; whether all peers did."""
    epoch = tl.load(state)
    arrived = epoch >= 0
    for step in range(1, n):
        source = (rank + step) % n
        flag = flag_of(pads, rank, slot + source * num_slots + tl.program_id(0))
        arrived = wait(flag, epoch, source, state + 1, limit) & arrived
    return arrived


@triton.jit
def sum_of_ranks(  # type: ignore[no-untyped-def]
    buffers, state, like, places, mask, capacity, n: tl.constexpr
):
    """float32 sum over the ranks, in rank order, of what lies at ``places`` of their buffers."""
    epoch = tl.load(state)
    total = tl.load(buffer_of(buffers, 0, epoch, capacity, like) + places, mask=mask, other=0.0)
    total = total.to(tl.float32)
    for source in range(1, n):
        theirs = buffer_of(buffers, source, epoch, capacity, like)
        total += tl.load(theirs + places, mask=mask, other=0.0).to(tl.float32)
    return total


@triton.jit
def exchange_kernel(  # type: ignore[no-untyped-def]
    x, y, buffers, pads, state, shard, capacity, num_slots, rank, limit, n: tl.constexpr,
    REDUCE: tl.constexpr, GATHER: tl.constexpr, ONE_SHOT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """x: n shards of ``shard`` elements (REDUCE) or one (GATHER alone); y: n (GATHER) or one.

    ONE_SHOT: x is one shard, and so is y: every rank adds all of it.
    """
    epoch = tl.load(state)
    step_size = tl.num_programs(0) * BLOCK
    start = tl.program_id(0) * BLOCK
    shard_64 = tl.cast(shard, tl.int64)
    num_parts = n if REDUCE and not ONE_SHOT else 1
    for part in range(0, num_parts):
        publish(
            x, buffers, pads, state, part * shard_64, shard, 0, capacity, num_slots, rank, n, BLOCK
        )
    tell(pads, state, 0, num_slots, rank, n)
    arrived = hear(pads, state, 0, num_slots, rank, limit, n)
    mine = buffer_of(buffers, rank, epoch, capacity, x)
    if REDUCE:
        first = shard_64 * 0 if ONE_SHOT else shard_64 * rank
        for offset in range(start, shard, step_size):
            places = offset + tl.arange(0, BLOCK)
            mask = places < shard
            total = sum_of_ranks(buffers, state, x, first + places, mask, capacity, n)
            total = tl.where(arrived, total, float("nan")).to(y.dtype.element_ty)
            if GATHER and not ONE_SHOT:
                # Nobody else reads this part of this buffer: it becomes the sum.
                tl.store(mine + first + places, total, mask=mask)
                tl.store(y + first + places, total, mask=mask)
            else:
                tl.store(y + places, total, mask=mask)
    if GATHER and not ONE_SHOT:
        if REDUCE:
            tell(pads, state, n * num_slots, num_slots, rank, n)
            arrived = hear(pads, state, n * num_slots, num_slots, rank, limit, n) & arrived
        for step in range(1 if REDUCE else 0, n):
            source = (rank + step) % n
            theirs = buffer_of(buffers, source, epoch, capacity, x)
            if REDUCE:
                theirs += source * shard_64
            for offset in range(start, shard, step_size):
                places = offset + tl.arange(0, BLOCK)
                mask = places < shard
                values = tl.load(theirs + places, mask=mask, other=0.0).to(tl.float32)
                values = tl.where(arrived, values, float("nan")).to(y.dtype.element_ty)
                tl.store(y + source * shard_64 + places, values, mask=mask)


def _launch(x: Tensor, y: Tensor, shard: int, peers: Peers, **mode: bool) -> Tensor:
    """mode: REDUCE, GATHER, ONE_SHOT of the kernel."""
    memory = peers.begin()
    block = 1024 if INTERPRETED else 4096
    programs = min(triton.cdiv(shard, block), 2 if INTERPRETED else 32, memory.num_slots)
    exchange_kernel[(programs,)](
        x, y, memory.buffers, memory.pads, memory.state, shard, memory.capacity_bytes,
        memory.num_slots, peers.rank, memory.max_polls, n=peers.size, BLOCK=block,
        **mode, num_warps=8,
    )  # fmt: skip
    peers.end()
    return y


def _runs(x: Tensor, peers: Peers) -> bool:
    num_bytes = x.numel() * x.element_size()
    return num_bytes > 0 and peers.runs(x, num_bytes=num_bytes, num_slots=1)


@torch.library.custom_op("galvatron::all_reduce_peers", mutates_args=())
def all_reduce_peers(x: Tensor, n: int, peers: str) -> Tensor:
    """SUM over ``n`` ranks of ``x``, any shape; one-shot if small, else two-shot."""
    ranks = peers_of(peers, n)
    if n == 1:
        return x.clone(memory_format=torch.contiguous_format)
    flat = x.reshape(-1)
    if _runs(x, ranks):
        one_shot = flat.numel() % n != 0 or x.numel() * x.element_size() <= ONE_SHOT_BYTES
        shard = flat.numel() if one_shot else flat.numel() // n
        y = torch.empty_like(x, memory_format=torch.contiguous_format)
        mode = {"REDUCE": True, "GATHER": True, "ONE_SHOT": one_shot}
        return _launch(flat.contiguous(), y, shard, ranks, **mode)
    whole = torch.nn.functional.pad(flat, (0, -flat.numel() % n))
    parts = plain_all_gather(plain_reduce_scatter(whole, ranks), ranks)
    return parts[: flat.numel()].reshape(x.shape).clone()


@torch.library.custom_op("galvatron::reduce_scatter_peers", mutates_args=())
def reduce_scatter_peers(x: Tensor, n: int, peers: str) -> Tensor:
    """This rank's block of rows of the SUM over ranks; x: [n rows, …], returns [rows, …]."""
    if x.shape[0] % n:
        raise ValueError(f"{x.shape[0]} rows cannot be scattered to {n} ranks; pad them")
    ranks = peers_of(peers, n)
    if n == 1:
        return x.clone(memory_format=torch.contiguous_format)
    if not _runs(x, ranks):
        return plain_reduce_scatter(x, ranks)
    y = x.new_empty((x.shape[0] // n, *x.shape[1:]))
    mode = {"REDUCE": True, "GATHER": False, "ONE_SHOT": False}
    return _launch(x.contiguous(), y, y.numel(), ranks, **mode)


@torch.library.custom_op("galvatron::all_gather_peers", mutates_args=())
def all_gather_peers(x: Tensor, n: int, peers: str) -> Tensor:
    """The rows of all ranks, one behind the other; x: [rows, …], returns [n rows, …]."""
    ranks = peers_of(peers, n)
    if n == 1:
        return x.clone(memory_format=torch.contiguous_format)
    if not _runs(x, ranks):
        return plain_all_gather(x, ranks)
    y = x.new_empty((n * x.shape[0], *x.shape[1:]))
    mode = {"REDUCE": False, "GATHER": True, "ONE_SHOT": False}
    return _launch(x.contiguous(), y, x.numel(), ranks, **mode)


@all_reduce_peers.register_fake
def _(x: Tensor, n: int, peers: str) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@reduce_scatter_peers.register_fake
def _(x: Tensor, n: int, peers: str) -> Tensor:
    return x.new_empty((x.shape[0] // n, *x.shape[1:]))


@all_gather_peers.register_fake
def _(x: Tensor, n: int, peers: str) -> Tensor:
    return x.new_empty((n * x.shape[0], *x.shape[1:]))


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, ctx.n, ctx.peers = inputs


# Each is the adjoint of the other, for a loss that is the sum over ranks.
all_reduce_peers.register_autograd(
    lambda ctx, dy: (all_reduce_peers(dy, ctx.n, ctx.peers), None, None), setup_context=_save
)
reduce_scatter_peers.register_autograd(
    lambda ctx, dy: (all_gather_peers(dy, ctx.n, ctx.peers), None, None), setup_context=_save
)
all_gather_peers.register_autograd(
    lambda ctx, dy: (reduce_scatter_peers(dy, ctx.n, ctx.peers), None, None), setup_context=_save
)


def all_reduce_reference(xs: list[Tensor]) -> Tensor:
    """The sum in float64, from all ranks' inputs."""
    return torch.stack([x.double() for x in xs]).sum(0)


def link_bytes(size: int, n: int, itemsize: int = 2) -> int:
    """Into, and out of, one rank for an all-reduce of ``size`` elements."""
    if size * itemsize <= ONE_SHOT_BYTES or size % n:
        return itemsize * (n - 1) * size
    return itemsize * 2 * (n - 1) * size // n


def ahead() -> list[tuple[Any, dict[str, Any], int]]:
    """For ``compile_ahead``: (kernel, arguments, num_warps): one-shot and two-shot."""
    return [(exchange_kernel, {
        **dict.fromkeys(("x", "y"), "*bf16"), **dict.fromkeys(("buffers", "pads", "state"), "*i64"),
        **dict.fromkeys(("shard", "capacity", "num_slots"), "i32:16"), "rank": "i32",
        "limit": "i32", "n": 8, "REDUCE": True, "GATHER": True, "ONE_SHOT": one, "BLOCK": 4096,
    }, 8) for one in (True, False)]  # fmt: skip
