"""Kernels with peers, for bench/gpu.py: right results in several processes that share one GPU, and
peers that are this process itself, for timing."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from gpu_check import excess
from torch import Tensor

from galvatron_compile.kernels import (
    all_gather_matmul,
    all_reduce,
    matmul_reduce_scatter,
    scatter_norm,
    sum_norm,
)
from galvatron_compile.kernels.peers import Peers, make_peers, register
from galvatron_compile.kernels.symmetric_memory import Symmetric

NAME = "bench"
UP = 2**62  # a flag that is up for every epoch
# Rows of a rank in the rounds, one after the other: tiles are full, or not. On a GPU both sizes are
# compiled to the same code, which takes long enough; the interpreter has odd ones.
ROWS = {"cpu": (8, 5), "cuda": (128, 96)}
LARGE = 160 << 10  # elements: more than one-shot all-reduce takes


@dataclass(frozen=True)
class Rounds:
    """How it went: rounds that were right on every rank, and what was wrong, if anything was."""

    size: int
    seed: int
    passed: int
    wrong: str = ""


def check_in_processes(
    size: int, rounds: int, device: str, seed: int, seconds: float,
    play: Callable[..., None] | None = None,
) -> Rounds:  # fmt: skip
    """``rounds`` rounds of every kernel on ``size`` processes; killed after so many seconds.

    Processes share a GPU through symmetric memory, or memory under the interpreter.
    play: what a round does; default: every kernel with peers.
    """
    # Several ranks on one device are refused otherwise; NCCL never takes them, so gloo agrees.
    os.environ["TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES"] = "1"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    until = time.monotonic() + seconds
    passed = torch.zeros(size, dtype=torch.int64).share_memory_()
    given = (size, port, rounds, device, seed, passed, play or _round)
    started: Any = torch.multiprocessing.spawn(_rank, given, nprocs=size, join=False)
    try:
        while time.monotonic() < until:
            if started.join(timeout=1.0):
                return Rounds(size, seed, int(passed.min()))
    except Exception as error:
        text = str(error).strip().split("\n")[-1]
        return Rounds(size, seed, int(passed.min()), text)
    finally:
        for process in started.processes:
            if process.is_alive():
                process.kill()
            process.join(10)
        for file in started.error_files:  # of a rank that failed; torch reads it and leaves it
            Path(file).unlink(missing_ok=True)
    return Rounds(size, seed, int(passed.min()))


def _rank(
    rank: int, size: int, port: int, rounds: int, device: str, seed: int, passed: Tensor,
    play: Callable[..., None],
) -> None:  # fmt: skip
    torch.set_num_threads(1)
    where = f"tcp://127.0.0.1:{port}"
    dist.init_process_group("gloo", init_method=where, rank=rank, world_size=size)
    if device == "cuda":
        torch.cuda.set_device(0)
    peers = register(NAME, make_peers(capacity_bytes=1 << 22, device=device))
    # All ranks draw the inputs of all, so each knows what the others have.
    generator = torch.Generator(device).manual_seed(seed)
    for turn in range(rounds):
        play(turn, peers, generator, device)
        peers.check()
        passed[rank] = turn + 1
    dist.destroy_process_group()


def _round(turn: int, peers: Peers, generator: torch.Generator, device: str) -> None:
    """Every kernel once; the device is waited for once, at the end.

    Raises:
        RuntimeError: which results are wrong.
    """
    n, rank, m = peers.size, peers.rank, ROWS[device][turn % 2]
    # The interpreter cuts bfloat16 off, so it has float32.
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    found: dict[str, Tensor] = {}

    def drawn(*shape: int) -> list[Tensor]:
        values = torch.randn((n, *shape), generator=generator, device=device)
        return list(values.to(dtype))

    def same(what: str, got: Tensor, exact: Tensor, roundings: int = 1) -> None:
        found[what] = excess(got, exact, roundings)

    xs, weights, whole = drawn(m, 2 * m), drawn(3 * m, 2 * m), drawn(n * m, 2 * m)
    y, gathered = all_gather_matmul.all_gather_matmul(xs[rank], weights[rank], n, NAME)
    same("gathered", gathered, torch.cat(xs))
    exact = all_gather_matmul.all_gather_matmul_reference(xs, weights)[rank]
    same("all_gather_matmul", y, exact)
    z = matmul_reduce_scatter.matmul_reduce_scatter(whole[rank], weights[rank], n, NAME)
    exact = matmul_reduce_scatter.matmul_reduce_scatter_reference(whole, weights)[rank]
    same("matmul_reduce_scatter", z, exact, n + 3)  # n rounded parts, some large ones that cancel
    total = all_reduce.all_reduce_peers(xs[rank], n, NAME)
    same("all_reduce", total, all_reduce.all_reduce_reference(xs))
    if device == "cuda" or turn == 0:  # slow in the interpreter
        large = drawn(LARGE)
        two_shot = all_reduce.all_reduce_peers(large[rank], n, NAME)
        same("all_reduce, large", two_shot, all_reduce.all_reduce_reference(large))
    mine = all_reduce.reduce_scatter_peers(whole[rank], n, NAME)
    same("reduce_scatter", mine, all_reduce.all_reduce_reference(whole).chunk(n)[rank])
    all_rows = all_reduce.all_gather_peers(xs[rank], n, NAME)
    same("all_gather", all_rows, torch.cat(xs))
    residual, scale = drawn(m, 2 * m)[0], drawn(2 * m)[0]
    ends = sum_norm.all_reduce_add_rms_norm(xs[rank], residual, scale, 1e-5, n, NAME)
    wanted = sum_norm.sum_norm_reference(xs, residual, scale, 1e-5)
    for what, one, other in zip(("normed", "total"), ends, wanted, strict=True):
        same(f"all_reduce_add_rms_norm, {what}", one, other)
    ends = scatter_norm.reduce_scatter_add_rms_norm(
        whole[rank], xs[rank], weights[rank][0], 1e-5, n, NAME
    )
    given = whole, xs, [weight[0] for weight in weights]
    wanted = scatter_norm.scatter_norm_reference(*given, 1e-5)[rank]
    for what, one, other in zip(("normed", "total"), ends, wanted, strict=True):
        same(f"reduce_scatter_add_rms_norm, {what}", one, other)
    times = torch.stack([x.to(device) for x in found.values()]).tolist()
    wrong = [f"{k} by {x:.3g}" for k, x in zip(found, times, strict=True) if not x <= 1]
    if wrong:
        raise RuntimeError(f"round {turn}: times the tolerance: {', '.join(wrong)}")


def alone(
    size: int, capacity_bytes: int, device: torch.device, *, far: bool = False
) -> tuple[Peers, list[Tensor]]:
    """Rank 0 of ``size`` ranks of which the others are not there: all flags they would raise are
    up. Also every rank's data, uint8 ``[2, capacity_bytes]``: the halves for even and odd epochs.

    far: the others' data lies in pinned memory of the host, behind PCIe, which stands for a link.
    """
    num_slots = 4096
    pads = [_pad(size, num_slots, device) for _ in range(size)]
    place: dict[str, Any] = {"device": device}
    if far and device.type == "cuda":
        place = {"pin_memory": True}  # the GPU reads and writes it at the same address
    data = [torch.zeros(2, capacity_bytes, dtype=torch.uint8, device=device)]
    for _ in range(1, size):
        data.append(torch.zeros(2, capacity_bytes, dtype=torch.uint8, **place))
    memory = Symmetric(
        buffers=torch.tensor([x.data_ptr() for x in data], device=device),
        pads=torch.tensor([x.data_ptr() for x in pads], device=device),
        data=data[0],
        pad=pads[0],
        capacity_bytes=capacity_bytes,
        num_slots=num_slots,
        max_polls=1_000_000,
        owners=[*pads, *data],
    )
    return Peers(0, size, None, memory), data


def _pad(size: int, num_slots: int, device: torch.device) -> Tensor:
    return torch.full((2 * size * num_slots + size,), UP, dtype=torch.int64, device=device)
