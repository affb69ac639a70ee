"""Flags, barriers and bounded waits between real processes; nothing is left behind."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from peer_checks import NAME, poisoned
from torch import Tensor

from galvatron_compile.kernels import (
    all_gather_matmul,
    all_reduce,
    matmul_reduce_scatter,
    peers,
    scatter_norm,
    sum_norm,
    sync,
)
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
@pytest.mark.parametrize("pool", ["interpreted", "ranks"])
def test_no_rank_leaves_a_barrier_before_all_have_come(
    request: pytest.FixtureRequest, size: int, pool: str
) -> None:
    found = request.getfixturevalue(pool)(size).run(late_ranks, 2 * size)
    for turn in zip(*found, strict=True):
        assert min(left for _, left in turn) >= max(came for came, _ in turn)


class OnDevice(Tensor):
    """Stands for a state on a GPU."""

    is_cuda = True  # type: ignore[assignment]


def test_a_glance_tells_a_failure_by_the_next_call() -> None:
    state = torch.zeros(2, dtype=torch.int64)
    found = Peers(0, 4, memory=mock.Mock(state=state.as_subclass(OnDevice)))
    found._seen = torch.zeros(2, dtype=torch.int64)  # pinned memory needs a GPU
    found.glance()
    state[1] = 3  # 1 + the rank that did not come
    found.glance()  # the copy that is read was made before
    with pytest.raises(RuntimeError, match="rank 0 of 4 waited in vain for rank 2"):
        found.glance()


def test_a_glance_without_a_gpu_does_nothing() -> None:
    Peers(0, 2).glance()
    Peers(0, 2, memory=mock.Mock(state=torch.ones(2, dtype=torch.int64))).glance()


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


def _sum_norm(x: Tensor, n: int) -> tuple[Tensor, ...]:
    return sum_norm.all_reduce_add_rms_norm(x, torch.zeros_like(x), torch.ones(4), 0.0, n, NAME)


def _scatter_norm(x: Tensor, n: int) -> tuple[Tensor, ...]:
    rows = torch.zeros_like(x[: len(x) // n])
    return scatter_norm.reduce_scatter_add_rms_norm(x, rows, torch.ones(4), 0.0, n, NAME)


def _two_shot(x: Tensor, n: int) -> tuple[Tensor, ...]:
    with mock.patch.object(all_reduce, "ONE_SHOT_BYTES", 0):
        return (all_reduce.all_reduce_peers(x, n, NAME),)


# What each makes of x [4, 4] on 2 ranks.
OPERATORS: dict[str, Callable[[Tensor, int], tuple[Tensor, ...]]] = {
    "one-shot": lambda x, n: (all_reduce.all_reduce_peers(x, n, NAME),),
    "two-shot": _two_shot,
    "reduce-scatter": lambda x, n: (all_reduce.reduce_scatter_peers(x, n, NAME),),
    "all-gather": lambda x, n: (all_reduce.all_gather_peers(x, n, NAME),),
    "gather and product": lambda x, n: (
        all_gather_matmul.all_gather_matmul(x, torch.eye(4), n, NAME)[::-1]
    ),
    "product and scatter": lambda x, n: (
        matmul_reduce_scatter.matmul_reduce_scatter(x, torch.eye(4), n, NAME),
    ),
    "sum and norm": lambda x, n: _sum_norm(x, n)[::-1],
    "scatter and norm": lambda x, n: _scatter_norm(x, n)[::-1],
}


def goes_on(name: str, turns: int) -> None:
    """Rank 0 waits in vain and goes on for ``turns`` operations; rank 1, which was only late, then
    does the same ones."""
    with poisoned(num_slots=16) as peers, pytest.MonkeyPatch.context() as patch:
        # As on CUDA, where the host does not look.
        patch.setattr(Peers, "end", lambda self: setattr(self, "_begun", False))
        # Others begin after the first has failed, here where one runs after the other.
        patch.setattr(sum_norm, "num_programs", lambda _: 1)
        # What is not a number later was made so, not found so.
        patch.setattr(Tensor, "new_empty", Tensor.new_zeros)
        patch.setattr(torch, "empty_like", torch.zeros_like)
        assert peers.memory is not None
        peers.memory.data.zero_()
        peers.barrier()
        peers.memory.max_polls = 300
        gathers = "gather" in name

        def run(turn: int) -> tuple[Tensor, ...]:
            return OPERATORS[name](torch.full((4, 4), 1.0 + turn + 8 * peers.rank), 2)

        def is_lost(turn: int, other: int) -> None:
            for y in run(turn):
                assert (y[4 * other : 4 * other + 4] if gathers else y).isnan().all(), y
            with pytest.raises(RuntimeError, match=f"waited in vain for rank {other}: "):
                peers.check()
            assert peers.memory is not None
            peers.memory.max_polls = 1 << 30  # hours, but from now on it gives up at once

        if peers.rank == 0:
            for turn in range(turns):  # turn 2 has the buffer of turn 0
                is_lost(turn, 1)
        dist.barrier()
        if peers.rank == 1:
            y = run(0)[0]
            rows = torch.tensor([1.0, 9.0]).repeat_interleave(4)[:, None].expand(8, 4)
            # Sums that rank 0 should have made in a second exchange are lost.
            there = y == (rows if gathers else 10.0)
            assert (there | y.isnan() if name == "two-shot" else there).all(), y
            peers.check()
            is_lost(1, 0)
        dist.barrier()
        if peers.rank == 0 and turns == 1:
            is_lost(1, 1)  # although all flags are up by now: its own part was not stored


@pytest.mark.parametrize("turns", [1, 3])
@pytest.mark.parametrize("name", OPERATORS)
def test_a_rank_that_waited_in_vain_harms_nobody(interpreted: Any, name: str, turns: int) -> None:
    interpreted(2).run(goes_on, name, turns)


def lost_in_a_product() -> str:
    with poisoned(num_slots=16) as peers:
        assert peers.memory is not None
        peers.memory.max_polls = 500
        if peers.rank == 0:
            try:
                matmul_reduce_scatter.matmul_reduce_scatter(
                    torch.ones(8, 8), torch.ones(8, 8), peers.size, NAME
                )
            except RuntimeError as error:
                return str(error)
        return ""


def test_an_operator_that_waited_in_vain_raises(interpreted: Any) -> None:
    message, _ = interpreted(2).run(lost_in_a_product)
    assert "rank 0 of 2 waited in vain for rank 1" in message


def lost_at_launch() -> None:
    with poisoned() as peers:
        x = torch.ones(4)
        with mock.patch.object(all_reduce, "one_shot_kernel", {}), pytest.raises(KeyError):
            all_reduce.all_reduce_peers(x, peers.size, NAME)
        with pytest.raises(RuntimeError, match="failed at its launch; make new Peers"):
            all_reduce.all_reduce_peers(x, peers.size, NAME)


def test_after_a_failed_launch_peers_are_of_no_use(interpreted: Any) -> None:
    interpreted(2).run(lost_at_launch)


@dataclass(eq=False)
class Stream:
    """Stands for a CUDA stream."""

    captures: bool
    waited_for: list[Stream] = field(default_factory=list)

    def wait_stream(self, other: Stream) -> None:
        self.waited_for.append(other)


def test_operations_on_several_streams_are_ordered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "_captures", lambda stream: stream.captures)
    first, second, captured, captured_too = map(Stream, (False, False, True, True))
    ours = Peers(0, 2)
    for stream in (first, first, second, captured, captured_too, first):
        ours._follow(stream)
    assert first.waited_for == [] and second.waited_for == [first]
    # What is captured cannot wait for what is not, nor the reverse.
    assert captured.waited_for == [] and captured_too.waited_for == [captured]


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
