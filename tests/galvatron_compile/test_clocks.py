"""How ranks compare their clocks."""

from __future__ import annotations

from typing import Any

import torch

from galvatron_compile.clocks import HostClock, agree, host_ms

AHEAD_MS = 1e9  # so far apart that no delay of a busy machine matters


def compare(same_machine: bool) -> tuple[float, bool]:
    rank = torch.distributed.get_rank()
    machine = "one" if same_machine else f"machine {rank}"
    return agree(torch.device("cpu"), lambda: host_ms() + AHEAD_MS * rank, machine)


def test_clocks_of_two_machines_are_compared(ranks: Any) -> None:
    (first, _), (second, shared) = ranks(2).run(compare, False)
    assert first == 0
    assert abs(second - AHEAD_MS) < 0.01 * AHEAD_MS
    assert not shared


def test_ranks_of_one_machine_read_one_clock(ranks: Any) -> None:
    assert ranks(2).run(compare, True) == [(0.0, True)] * 2


def test_a_lone_process_has_one_clock() -> None:
    assert agree(torch.device("cpu")) == (0.0, True)
    clock = HostClock()
    first, second = clock.times_ms([clock.mark(), clock.mark()])
    assert second >= first
