"""Kernels with peers, for bench/gpu.py: right results in several processes that share one GPU, and
the time of both overlapped products with all flags preset."""

from __future__ import annotations

import os
import socket
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from galvatron_compile.kernels import all_gather_matmul, all_reduce, matmul_reduce_scatter, sum_norm
from galvatron_compile.kernels.peers import Peers, _num_flags, _symmetric, make_peers, register

NAME = "bench"


def check_in_processes(size: int, rounds: int, device: str) -> str:
    """Empty if ``rounds`` rounds of every kernel were right on ``size`` processes, else what was
    wrong. Processes share a GPU through symmetric memory, or memory under the interpreter."""
    # Several ranks on one device are refused otherwise; NCCL never takes them, so gloo agrees.
    os.environ["TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES"] = "1"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    try:
        torch.multiprocessing.spawn(_rank, (size, port, rounds, device), nprocs=size)
    except Exception as error:
        return str(error).strip().split("\n")[-1]
    return ""


def _rank(rank: int, size: int, port: int, rounds: int, device: str) -> None:
    torch.set_num_threads(1)
    where = f"tcp://127.0.0.1:{port}"
    dist.init_process_group("gloo", init_method=where, rank=rank, world_size=size)
    tiny = device == "cpu"
    peers = register(NAME, make_peers(capacity_bytes=1 << 22, device=device))
    generator = torch.Generator().manual_seed(7)  # the same inputs are drawn on every rank
    dtype = torch.float32 if tiny else torch.bfloat16
    for turn in range(rounds):
        _round(turn, peers, generator, dtype, device, 8 if tiny else 128)
    if device != "cpu":
        torch.cuda.synchronize()
    peers.check()
    dist.destroy_process_group()


def _round(
    turn: int, peers: Peers, generator: torch.Generator, dtype: torch.dtype, device: str, m: int
) -> None:
    n, rank = peers.size, peers.rank

    def drawn(*shape: int) -> list[Tensor]:
        values = torch.randn((n, *shape), generator=generator)
        return list(values.to(dtype).to(device))

    xs, weights = drawn(m, 2 * m), drawn(3 * m, 2 * m)
    y, gathered = all_gather_matmul.all_gather_matmul(xs[rank], weights[rank], n, NAME)
    same(turn, "gathered", gathered, torch.cat(xs), 1)
    wanted = all_gather_matmul.all_gather_matmul_reference(xs, weights)[rank]
    same(turn, "all_gather_matmul", y, wanted, 2 * m)
    whole = drawn(n * m, 2 * m)
    z = matmul_reduce_scatter.matmul_reduce_scatter(whole[rank], weights[rank], n, NAME)
    wanted = matmul_reduce_scatter.matmul_reduce_scatter_reference(whole, weights)[rank]
    same(turn, "matmul_reduce_scatter", z, wanted, 2 * m * n)
    total = all_reduce.all_reduce_peers(xs[rank], n, NAME)
    same(turn, "all_reduce", total, all_reduce.all_reduce_reference(xs), n)
    scale = drawn(2 * m)[0]
    found = sum_norm.all_reduce_add_rms_norm(xs[rank], total, scale, 1e-5, n, NAME)
    expected = sum_norm.sum_norm_reference(xs, total, scale, 1e-5)
    for one, other in zip(found, expected, strict=True):
        same(turn, "all_reduce_add_rms_norm", one, other, 16)


def same(turn: int, what: str, got: Tensor, wanted: Tensor, length: int) -> None:
    """RuntimeError unless as exact as a sum of ``length`` products of normal numbers, of which each
    rank's part is rounded."""
    bound = 20 * length**0.5 * (torch.finfo(got.dtype).eps + length * 2.0**-23)
    error = float((got.double() - wanted).abs().max())
    if not error <= bound:
        raise RuntimeError(f"round {turn}: {what} is off by {error:g}, more than {bound:g}")


def alone(size: int, capacity_bytes: int, device: torch.device) -> Peers:
    """Peers that are all this process itself: addresses are there, nobody else is."""
    num_slots = 4096
    flag_bytes = 8 * _num_flags(size, num_slots)
    whole = torch.zeros(flag_bytes + 2 * capacity_bytes, dtype=torch.uint8, device=device)
    memory = _symmetric(
        [whole] * size, 0, flag_bytes, capacity_bytes, num_slots, 1000, []
    )
    return Peers(0, size, None, memory)


def preset_products(device: torch.device) -> list[tuple[str, Any, Any, float]]:
    """(name, kernel, cuBLAS, flops) of both products as one rank of 8 of a 70B model runs them."""
    n, m, k, out = 8, 1024, 8192, 3584
    peers = alone(n, 2 * n * m * max(k, out), device)
    x = torch.randn(m, k, device=device).bfloat16()
    weight = torch.randn(out, k, device=device).bfloat16()
    gathered = torch.randn(n * m, k, device=device).bfloat16()
    y = gathered.new_empty(n * m, out)
    rows = torch.randn(n * m, out, device=device).bfloat16()
    back = torch.randn(k, out, device=device).bfloat16()
    z = rows.new_empty(m, k)
    return [
        (
            "all_gather_matmul",
            lambda: all_gather_matmul.launch(x, weight, y, gathered, peers, ready=True),
            lambda: gathered @ weight.t(),
            2.0 * n * m * k * out,
        ),
        (
            "matmul_reduce_scatter",
            lambda: matmul_reduce_scatter.launch(rows, back, z, peers, ready=True),
            lambda: rows @ back.t(),
            2.0 * n * m * k * out,
        ),
    ]
