"""Ranks that have a part of a core each, and what that leaves behind: nothing."""

from __future__ import annotations

import json
import os
from functools import partial
from pathlib import Path

import pytest
from emulated import TIMEOUT_S, emulated, groups_left, nothing_left, quotas_needed

from galvatron_compile import emulation_cores
from galvatron_compile.control_groups import ControlGroup
from galvatron_compile.emulation import EmulatedCluster, EmulationError, emulated_cluster
from galvatron_compile.emulation_child import remove_group
from galvatron_compile.emulation_cores import rank_groups, remove
from galvatron_compile.errors import PeerError

# Two threads that never stop, and a process that does not either.
BUSY = """
import json, os, subprocess, sys, threading, time
from galvatron_compile.control_groups import ControlGroup
quota = ControlGroup.own().quota()
child = subprocess.Popen([sys.executable, "-c", "while True: pass"])
start, spent = time.perf_counter(), time.process_time()
while time.perf_counter() < start + 1: pass
share = (time.process_time() - spent) / (time.perf_counter() - start)
print(json.dumps([quota.group, quota.cpus, share]))
"""


@quotas_needed
def test_a_rank_and_its_processes_get_no_more_than_their_part() -> None:
    """No timing: how slow the machine may be, the kernel gives no more."""
    with emulated(2, cpus_per_rank=0.2) as cluster:
        assert len(groups_left()) == 2
        result = cluster.run(["-c", BUSY], timeout_s=TIMEOUT_S)
    (group, cpus, share), (other, other_cpus, _) = map(json.loads, result.outputs)
    assert cpus == other_cpus == 0.2
    assert group != other
    assert share < 0.3


@quotas_needed
def test_a_rank_that_fails_leaves_no_group() -> None:
    with emulated(1, cpus_per_rank=0.5) as cluster, pytest.raises(PeerError, match="code 3"):
        cluster.run(["-c", "import sys; sys.exit(3)"], timeout_s=TIMEOUT_S)
    assert not groups_left()


@quotas_needed
def test_a_cluster_that_cannot_start_leaves_no_group(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        assert len(groups_left()) == 1
        raise OSError("no more processes")

    monkeypatch.setattr("galvatron_compile.emulation._start_guard", refuse)
    with (
        nothing_left(),
        pytest.raises(OSError, match="no more processes"),
        emulated_cluster(EmulatedCluster(1, cpus_per_rank=0.5)),
    ):
        raise AssertionError("it must not start")


@quotas_needed
def test_without_its_guard_a_cluster_leaves_nothing_either() -> None:
    script = "import subprocess; subprocess.Popen(['sleep', '1000'], start_new_session=True)"
    with emulated(1, cpus_per_rank=0.5) as cluster:
        cluster._guard.kill()
        cluster.run(["-c", script], timeout_s=TIMEOUT_S)
        assert len(groups_left()) == 1
    assert not groups_left()


@pytest.mark.parametrize("cpus", [0.0, 0.1, -1.0, float("nan"), float("inf")])
def test_a_part_that_no_rank_can_have_is_refused(cpus: float) -> None:
    with pytest.raises(EmulationError, match=r"cores for a rank; choose 0\.125 or more"):
        EmulatedCluster(cpus_per_rank=cpus)


def test_more_than_the_cores_there_are_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(ControlGroup, "own", lambda: ControlGroup(1, tmp_path, tmp_path))
    cores = len(os.sched_getaffinity(0))
    message = rf"need more than the {cores} that are here; choose {cores / 8:.3g} or less"
    with pytest.raises(EmulationError, match=message):
        rank_groups(8, cores / 8 + 0.01)
    assert rank_groups(8, None) == []


def test_where_there_is_no_control_it_says_so(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "cgroup.subtree_control").write_text("memory\n")
    for own in (None, ControlGroup(2, tmp_path, tmp_path)):
        monkeypatch.setattr(ControlGroup, "own", lambda own=own: own)
        with pytest.raises(EmulationError, match="no control group here controls CPU time; run on"):
            rank_groups(1, 0.2)


def test_a_container_has_no_more_than_its_quota(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "cpu.max").write_text("50000 100000\n")
    monkeypatch.setattr(ControlGroup, "own", lambda: ControlGroup(2, tmp_path, tmp_path))
    with pytest.raises(EmulationError, match=r"more than the 0\.5 that are here; choose 0\.25 or"):
        rank_groups(2, 0.3)


def test_what_was_made_before_a_refusal_is_removed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    made: list[Path] = []

    def make(self: ControlGroup, parent: Path, cpus: float) -> Path:
        if made:
            raise PermissionError(13, "not permitted")
        made.append(parent / "galvatron-1")
        made[0].mkdir()
        return made[0]

    monkeypatch.setattr(ControlGroup, "own", lambda: ControlGroup(1, tmp_path, tmp_path))
    monkeypatch.setattr(ControlGroup, "make", make)
    with pytest.raises(EmulationError, match=r"be limited \(.*not permitted.*run as root"):
        rank_groups(2, 0.2)
    assert made and not made[0].exists()


def test_a_group_that_stays_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    group, kept = tmp_path / "group", tmp_path / "group" / "kept"
    group.mkdir()
    kept.write_text("")  # keeps it from being removed, as a process does that is in a real one
    monkeypatch.setattr(emulation_cores, "remove_group", partial(remove_group, patience_s=0.02))
    with pytest.raises(EmulationError, match=rf"left behind: .*{group}.*; rmdir it"):
        remove([tmp_path / "gone", group])
    kept.unlink()
    remove([group])
    assert not group.exists()
