"""Ranks that have a part of a core each, and what that leaves behind: nothing."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import time
from pathlib import Path

import pytest
from emulated import TIMEOUT_S, emulated, groups_left, nothing_left, quotas_needed

from galvatron_compile.control_groups import ControlGroup
from galvatron_compile.emulation import EmulatedCluster, EmulationError, emulated_cluster
from galvatron_compile.emulation_child import remove_groups
from galvatron_compile.emulation_cores import RankGroups, remove
from galvatron_compile.errors import PeerError

# A rank that never stops for a second, and a process that it starts, which does not either.
BUSY = """
import json, resource, subprocess, sys, time
from galvatron_compile.control_groups import ControlGroup
quota = ControlGroup.own().quotas()[0]
child = subprocess.Popen([sys.executable, "-c", "while True: pass"])
start, spent = time.perf_counter(), time.process_time()
while time.perf_counter() < start + 1: pass
spent, wall = time.process_time() - spent, time.perf_counter() - start
child.kill(); child.wait()
child = resource.getrusage(resource.RUSAGE_CHILDREN)
print(json.dumps([quota.group, quota.cpus, (spent + child.ru_utime + child.ru_stime) / wall]))
"""


@quotas_needed
def test_a_rank_and_its_processes_get_no_more_than_their_part() -> None:
    """No timing: however slow the machine may be, the kernel gives no more."""
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


@quotas_needed
@pytest.mark.parametrize("error", [OSError("no more groups"), KeyboardInterrupt()])
def test_a_cluster_that_cannot_start_leaves_no_group(
    monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    """The second group fails, or Ctrl-C comes when there is one."""
    make = ControlGroup.make

    def second_fails(self: ControlGroup, folder: Path, cpus: float) -> None:
        if groups_left():
            raise error
        make(self, folder, cpus)

    monkeypatch.setattr(ControlGroup, "make", second_fails)
    expected = EmulationError if isinstance(error, OSError) else KeyboardInterrupt
    with (
        nothing_left(),
        pytest.raises(expected),
        emulated_cluster(EmulatedCluster(2, cpus_per_rank=0.5)),
    ):
        raise AssertionError("it must not start")


@quotas_needed
def test_without_its_guard_a_cluster_leaves_nothing_either() -> None:
    with emulated_cluster(EmulatedCluster(1, cpus_per_rank=0.5)) as cluster:
        cluster._guard.kill()
        assert len(groups_left()) == 1
        nodes = cluster._network.namespace_fds
        enter = ["nsenter", f"--net=/proc/self/fd/{nodes[0]}"]
        left = subprocess.Popen([*enter, "sleep", "1000"], pass_fds=nodes)
        while Path(f"/proc/{left.pid}/comm").read_text() != "sleep\n":
            time.sleep(0.01)
    assert left.wait(timeout=TIMEOUT_S) < 0
    assert not groups_left()


@pytest.mark.parametrize("cpus", [0.0, 0.1, -1.0, float("nan"), float("inf")])
def test_a_part_that_no_rank_can_have_is_refused(cpus: float) -> None:
    with pytest.raises(EmulationError, match=r"cores for a rank; choose 0\.125 or more"):
        EmulatedCluster(cpus_per_rank=cpus)


@pytest.mark.parametrize(
    ("num_ranks", "cpus", "pinned", "quota", "message"),
    [
        (3, 0.667, False, None, r"3 ranks of 0\.667 cores each .*; choose 0\.666 or less"),
        (3, 0.66, True, None, r"; choose 0\.5 or less"),  # two of them share a core
        (2, 0.3, False, 0.5, r"; choose 0\.25 or less"),
        (32, 0.125, False, None, r"32 ranks .*so are 32 of 0\.125; take fewer ranks"),
    ],
)
def test_more_than_there_is_is_refused(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    num_ranks: int,
    cpus: float,
    pinned: bool,
    quota: float | None,
    message: str,
) -> None:
    if quota is not None:
        (tmp_path / "cpu.cfs_quota_us").write_text(f"{quota * 100_000:.0f}\n")
        (tmp_path / "cpu.cfs_period_us").write_text("100000\n")
    monkeypatch.setattr(ControlGroup, "own", lambda: ControlGroup(1, tmp_path, tmp_path))
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    with pytest.raises(EmulationError, match=message):
        RankGroups(num_ranks, cpus, pinned=pinned)
    assert len(RankGroups(2, 0.25, pinned=pinned).folders) == 2


def test_where_there_is_no_control_it_says_so(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "cgroup.subtree_control").write_text("memory\n")
    for own in (None, ControlGroup(2, tmp_path, tmp_path)):
        monkeypatch.setattr(ControlGroup, "own", lambda own=own: own)
        with pytest.raises(EmulationError, match=r"no control group here .* echo \+cpu"):
            RankGroups(1, 0.2, pinned=False)


def test_what_the_system_refuses_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refuse(self: Path) -> None:
        raise PermissionError(errno.EPERM, "not permitted")

    monkeypatch.setattr(ControlGroup, "own", lambda: ControlGroup(1, tmp_path, tmp_path))
    groups = RankGroups(1, 0.2, pinned=False)
    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(EmulationError, match=r"be limited \(.*not permitted.*run as root"):
        groups.make()


def test_groups_that_stay_are_named_and_the_others_go(tmp_path: Path) -> None:
    kept, also, free = (tmp_path / name for name in ("kept", "also", "free"))
    for group in (kept, also, free):
        group.mkdir()
    for group in (kept, also):
        (group / "process").write_text("")  # keeps a folder, as a process does a group
    folders = [str(tmp_path / "gone"), *map(str, (kept, free, also))]
    errors = remove_groups(folders, patience_s=0.05)
    assert [error.filename for error in errors] == [str(kept), str(also)]
    assert not free.exists()
    for group in (kept, also):
        (group / "process").unlink()
    remove([kept, also])
    assert not kept.exists() and not also.exists()


def test_what_cannot_be_removed_at_all_is_not_waited_for(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def sleep(_: float) -> None:
        raise AssertionError("waited")

    monkeypatch.setattr("galvatron_compile.emulation_child.time.sleep", sleep)
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(EmulationError, match=rf"left behind: .*{file}.*; rmdir them"):
        remove([file])
