"""Flags, barriers and bounded waits between real processes; nothing is left behind."""

from __future__ import annotations

import os
import time
from typing import Any

import pytest
import torch
import torch.distributed as dist
from peer_checks import NAME, poisoned

from galvatron_compile.kernels import matmul_reduce_scatter, sync
from galvatron_compile.kernels.ahead import compile_ahead
from galvatron_compile.kernels.peers import Peers, make_peers, peers_of, register


def late_ranks(rounds: int) -> list[tuple[float, float]]:
    """When this rank came to each barrier, and when it left it."""
    peers = make_peers(capacity_bytes=4096, num_slots=4)
    times = []
    for turn in range(rounds):
        if turn % peers.size == peers.rank:
            time.sleep(0.05)
        came = time.monotonic()
        peers.barrier()
        times.append((came, time.monotonic()))
    return times


@pytest.mark.parametrize("size", [2, 4])
def test_no_rank_leaves_a_barrier_before_all_have_come(interpreted: Any, size: int) -> None:
    found = interpreted(size).run(late_ranks, 2 * size)
    for turn in zip(*found, strict=True):
        assert min(left for _, left in turn) >= max(came for came, _ in turn)


def one_does_not_come() -> str:
    peers = make_peers(capacity_bytes=4096, num_slots=4, max_polls=2000)
    try:
        if peers.rank != 1:
            peers.barrier()
    except RuntimeError as error:
        return str(error)
    return ""


def test_a_rank_that_never_signals_is_named(interpreted: Any) -> None:
    first, second = interpreted(2).run(one_does_not_come)
    assert first.startswith("rank 0 of 2 waited in vain for rank 1: ") and "make new Peers" in first
    assert second == ""


def lost_in_a_product() -> tuple[bool, str]:
    """A product whose peer never sends gives NaN and an error, not numbers that look right."""
    with poisoned(num_slots=16) as peers:
        assert peers.memory is not None
        peers.memory.max_polls = 500
        y, message = torch.zeros(4, 8), ""
        if peers.rank == 0:
            try:
                matmul_reduce_scatter.launch(torch.ones(8, 8), torch.ones(8, 8), y, peers)
            except RuntimeError as error:
                message = str(error)
        return bool(y.isnan().all()), message


def test_what_waited_in_vain_is_not_a_number(interpreted: Any) -> None:
    (is_nan, message), _ = interpreted(2).run(lost_in_a_product)
    assert is_nan and "rank 0 of 2 waited in vain for rank 1" in message


def shared_files() -> tuple[int, int]:
    """Shared files of ours with a name, before and while peers have their memory."""

    def named() -> int:
        return sum(name.startswith("galvatron-") for name in os.listdir("/dev/shm"))

    before = named()
    peers = make_peers(capacity_bytes=1 << 20)
    dist.barrier()
    assert peers.memory is not None
    return before, named()


def test_shared_memory_has_no_name_that_could_stay(interpreted: Any) -> None:
    assert interpreted(2).run(shared_files) == [(0, 0), (0, 0)]


def other_sizes() -> None:
    make_peers(capacity_bytes=4096 * (1 + dist.get_rank()))


def test_ranks_must_ask_for_the_same(interpreted: Any) -> None:
    for error in interpreted(2).errors(other_sizes):
        assert isinstance(error, ValueError)
        assert "ranks asked for different (capacity_bytes, num_slots)" in str(error)


def test_names_are_checked() -> None:
    register(NAME, Peers(0, 2))
    with pytest.raises(ValueError, match=r"peers 'test' are 2 ranks, the operator was made for 4"):
        peers_of(NAME, 4)
    with pytest.raises(ValueError, match=r"no peers are registered as 'nobody' \(known: .*'test'"):
        peers_of("nobody", 2)
    assert peers_of("nobody", 1).size == 1


@pytest.mark.parametrize("capability", [80, 90])
def test_the_barrier_releases_and_acquires_at_system_scope(capability: int) -> None:
    arguments = {
        "pads": "*i64", "state": "*i64", "slot": "i32", "rank": "i32", "n": "i32", "limit": "i32",
    }  # fmt: skip
    made = compile_ahead(sync.barrier_kernel, arguments, capability=capability, num_warps=1)
    assert made.spilled_bytes == 0
    assert "sys.release" in made.ptx and "sys.acquire" in made.ptx
