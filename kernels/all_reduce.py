"""All-reduce, reduce-scatter and all-gather that read the peers' buffers themselves.

*One-shot*: every rank reads the whole tensor of each peer and adds: one exchange of signals, for
tensors so small that latency counts. *Two-shot*: every rank adds its own shard, then reads the sums
of the others: two exchanges, ``2 (n - 1) / n`` tensors over the link instead of ``n - 1``. The
first half of two-shot alone is a reduce-scatter, publishing and reading alone an all-gather.

Sums are made in float32, in rank order: one-shot gives the same bits on every rank, and two-shot
too. How the ranks' programs work together is told in all_reduce_kernels.py.

Link, into and out of one rank, for ``size`` elements: see :func:`link_bytes`. Memory: ``x`` read
and stored once, the result stored once, and what peers read. No flops worth counting.

Not run on a GPU yet, as ``all_gather_matmul.py``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from galvatron_compile.kernels.all_reduce_kernels import (
    all_gather_kernel,
    one_shot_kernel,
    reduce_scatter_kernel,
    two_shot_kernel,
)
from galvatron_compile.kernels.base import INTERPRETED, triton
from galvatron_compile.kernels.peers import (
    Peers,
    peers_of,
    plain_all_gather,
    plain_reduce_scatter,
)

# Where one-shot ends: a guess from public reports for 8 ranks on NVLink, to be measured.
ONE_SHOT_BYTES = 256 << 10
MAX_SIZE = 1 << 30  # elements; places in a shard are 32-bit numbers


def _launch(kernel: Any, x: Tensor, y: Tensor, shard: int, peers: Peers, *sizes: int) -> Tensor:
    """A kernel that takes shards of ``shard`` elements; sizes: what it wants to know before that.

    At most 32 programs, which all are resident: those of the ranks wait for each other.
    """
    memory = peers.begin()
    block = 1024 if INTERPRETED else 4096
    programs = min(triton.cdiv(shard, block), 2 if INTERPRETED else 32, memory.num_slots)
    kernel[(programs,)](
        x, y, memory.buffers, memory.pads, memory.state, *sizes, shard, memory.capacity_bytes,
        memory.num_slots, peers.rank, memory.max_polls, n=peers.size, BLOCK=block, num_warps=8,
    )  # fmt: skip
    peers.end()
    return y


def _runs(x: Tensor, peers: Peers) -> bool:
    num_bytes = x.numel() * x.element_size()
    fits = x.is_floating_point() and 0 < x.numel() <= MAX_SIZE
    return fits and peers.runs(x, num_bytes=num_bytes, num_slots=1)


def _shard(size: int, n: int) -> int:
    """Elements of a shard: a multiple of 16, so that all begin where wide accesses can."""
    return -(-size // (16 * n)) * 16


@torch.library.custom_op("galvatron::all_reduce_peers", mutates_args=())
def all_reduce_peers(x: Tensor, n: int, peers: str) -> Tensor:
    """SUM over ``n`` ranks of ``x``, any shape; one-shot if small, else two-shot."""
    ranks = peers_of(peers, n)
    if n == 1:
        return x.clone(memory_format=torch.contiguous_format)
    if _runs(x, ranks):
        y = torch.empty_like(x, memory_format=torch.contiguous_format)
        if x.numel() * x.element_size() <= ONE_SHOT_BYTES:
            return _launch(one_shot_kernel, x.contiguous(), y, x.numel(), ranks)
        shard = _shard(x.numel(), n)
        return _launch(two_shot_kernel, x.contiguous(), y, shard, ranks, x.numel())
    flat = x.reshape(-1)
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
    return _launch(reduce_scatter_kernel, x.contiguous(), y, y.numel(), ranks)


@torch.library.custom_op("galvatron::all_gather_peers", mutates_args=())
def all_gather_peers(x: Tensor, n: int, peers: str) -> Tensor:
    """The rows of all ranks, one behind the other; x: [rows, …], returns [n rows, …]."""
    ranks = peers_of(peers, n)
    if n == 1:
        return x.clone(memory_format=torch.contiguous_format)
    if not _runs(x, ranks):
        return plain_all_gather(x, ranks)
    y = x.new_empty((n * x.shape[0], *x.shape[1:]))
    return _launch(all_gather_kernel, x.contiguous(), y, x.numel(), ranks)


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
    if size * itemsize <= ONE_SHOT_BYTES:
        return itemsize * (n - 1) * size
    return itemsize * 2 * (n - 1) * size // n


def ahead() -> list[tuple[Any, dict[str, Any], int]]:
    """For ``compile_ahead``: (kernel, arguments, num_warps), for bfloat16 on 8 ranks."""
    kernels = (one_shot_kernel, two_shot_kernel, reduce_scatter_kernel, all_gather_kernel)
    given = {
        **dict.fromkeys(("x", "y"), "*bf16"), **dict.fromkeys(("buffers", "pads", "state"), "*i64"),
        **dict.fromkeys(("size", "shard", "capacity", "num_slots"), "i32:16"), "rank": "i32",
        "limit": "i32", "n": 8, "BLOCK": 4096,
    }  # fmt: skip
    return [(kernel, {name: given[name] for name in kernel.arg_names}, 8) for kernel in kernels]
