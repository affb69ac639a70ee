"""Which ranks share cores, by their affinity or under a quota."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from galvatron_compile.control_groups import ControlGroup, Quota
from galvatron_compile.seats import Seat, shared_cores
from galvatron_compile.work import Cores

HALF, OTHER_HALF = Quota((9, 1), 0.5), Quota((9, 2), 0.5)
POD = Quota((9, 3), 1.5)


def seat(*allowed: int, quota: Quota | None = None, threads: int = 1, machine: str = "m") -> Seat:
    return Seat(machine, allowed, threads, (quota,) if quota else ())


def inside_pod(cpus: float) -> list[Seat]:
    return [Seat("m", (0, 1, 2), 1, (Quota((9, k), cpus), POD)) for k in (4, 5)]


@pytest.mark.parametrize(
    ("seats", "expected"),
    [
        # Cores of one's own.
        ([seat(0), seat(1)], ()),
        ([seat(0), seat(0, machine="n")], ()),
        ([seat(0, 1), seat(0, 1)], ()),
        # Shared ones; then it is told of those too that have enough.
        ([seat(0), seat(0)], (Cores(0, 1, 1), Cores(0, 1, 1))),
        ([seat(0, 1, threads=2), seat(0, 1)], (Cores(0, 2, 2), Cores(0, 2, 1))),
        ([seat(0), seat(0), seat(1)], (Cores(0, 1, 1), Cores(0, 1, 1), Cores(1, 1, 1))),
        # Half a core each, which nobody else gets.
        ([seat(0, quota=HALF), seat(0, quota=OTHER_HALF)], (Cores(0, 0.5, 1), Cores(1, 0.5, 1))),
        ([seat(0, quota=HALF), seat(1, quota=OTHER_HALF)], (Cores(0, 0.5, 1), Cores(1, 0.5, 1))),
        # One quota for two ranks of a container, on cores enough; and the same number elsewhere.
        ([seat(*range(8), quota=POD)] * 2, (Cores(0, 1.5, 1),) * 2),
        ([seat(*range(8), quota=POD), seat(*range(8), quota=POD, machine="n")], ()),
        # Quotas of their own inside a shared one that is tighter, or is not.
        (inside_pod(1.0), (Cores(0, 1.5, 1), Cores(0, 1.5, 1))),
        (inside_pod(0.5), (Cores(0, 0.5, 1), Cores(1, 0.5, 1))),
        # The cores 9 and 3 are not the group (9, 3).
        ([seat(9, 3, threads=2), seat(1, quota=Quota((9, 3), 2))], ()),
        # A quota that the cores do not reach, and one that is looser than the sharing of a core.
        ([seat(0, quota=POD)], ()),
        ([seat(0, quota=Quota((9, k), 0.8)) for k in (1, 2)], (Cores(0, 1, 1), Cores(0, 1, 1))),
    ],
)
def test_who_shares_cores_with_whom(seats: list[Seat], expected: tuple[Cores, ...]) -> None:
    assert shared_cores(seats) == expected


def test_own_seat(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "cpu.max").write_text("50000 100000\n")
    monkeypatch.setattr(ControlGroup, "own", lambda: ControlGroup(2, tmp_path, tmp_path))
    own = Seat.own()
    assert [quota.cpus for quota in own.quotas] == [0.5]
    assert own.machine
    assert own.num_threads == torch.get_num_threads()
    if hasattr(os, "sched_getaffinity"):
        assert own.allowed == tuple(sorted(os.sched_getaffinity(0)))
