"""What the tests of emulated clusters share: a cluster that is watched, and families of processes.

Most ranks in these tests are plain Python with sockets, which start in a tenth of torch's time.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from galvatron_compile.control_groups import ControlGroup
from galvatron_compile.emulation import (
    EmulatedCluster,
    EmulationError,
    RunningCluster,
    emulated_cluster,
    why_not,
)
from galvatron_compile.emulation_cores import RankGroups, remove


def why_no_quotas() -> str | None:
    """Why ranks cannot be given a part of a core here, or None where they can."""
    if REASON is not None:
        return REASON
    try:
        groups = RankGroups(2, 0.5, pinned=False)
        try:
            groups.make()
        finally:
            remove(groups.folders)
    except EmulationError as error:
        return str(error)
    return None


REASON = why_not()
needed = pytest.mark.skipif(REASON is not None, reason=f"cannot emulate a cluster: {REASON}")
WHY_NO_QUOTAS = why_no_quotas()
quotas_needed = pytest.mark.skipif(WHY_NO_QUOTAS is not None, reason=f"no quotas: {WHY_NO_QUOTAS}")
TIMEOUT_S = 120.0

# Every rank starts a process in a session of its own, says who they are, and then does argv[1].
FAMILY = """
import os, subprocess, sys, time
from pathlib import Path
child = subprocess.Popen(["sleep", "1000"], start_new_session=True)
print(os.getpid(), child.pid)
rank, meeting = os.environ["RANK"], Path(os.environ.get("MEETING", "."))

def meet():
    (meeting / rank).write_text("")
    while len(os.listdir(meeting)) < int(os.environ["WORLD_SIZE"]):
        time.sleep(0.01)

exec(sys.argv[1])
"""


@contextmanager
def emulated(
    num_nodes: int = 2,
    ranks_per_node: int = 1,
    rate_bits_per_s: float | None = None,
    pin: bool = False,
    cpus_per_rank: float | None = None,
) -> Iterator[RunningCluster]:
    """A cluster of which nothing may be left when the context ends."""
    settings = EmulatedCluster(num_nodes, ranks_per_node, rate_bits_per_s, pin, cpus_per_rank)
    with nothing_left(), emulated_cluster(settings) as cluster:
        yield cluster


@contextmanager
def nothing_left() -> Iterator[None]:
    """No process, no namespace, no interface and no control group outlives the context."""
    before = _children(), _shown_by_ip(), groups_left()
    try:
        yield
    finally:
        assert (_children(), _shown_by_ip(), groups_left()) == before
        assert namespaces_held() == []


def groups_left(launcher: int | None = None) -> set[Path]:
    """Control groups of ranks that exist. launcher: who made them; default: this process."""
    own = ControlGroup.own()
    parent = own.parent_of_new() if own is not None else None
    pattern = f"galvatron-{launcher or os.getpid()}-*"
    return set(parent.glob(pattern)) if parent is not None else set()


def namespaces_held() -> list[str]:
    """Network namespaces that this process holds open."""
    return [link for link in _links("self/fd/*") if link.startswith("net:")]


def namespaces_of_the_machine() -> set[str]:
    """Network namespaces that some process is in or holds open."""
    return {*_links("[0-9]*/ns/net"), *_links("[0-9]*/fd/*")}


def alive(pids: list[str]) -> list[str]:
    """Those that exist; a zombie has ended, whoever has still to ask for its exit code."""
    found = []
    for pid in pids:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            continue
        if state not in "ZX":
            found.append(pid)
    return found


def _links(pattern: str) -> list[str]:
    found = []
    for path in Path("/proc").glob(pattern):
        try:
            found.append(os.readlink(path))
        except OSError:  # the process or the descriptor is gone
            continue
    return found


def _children() -> set[str]:
    lists = Path("/proc/self/task").glob("*/children")
    return {pid for found in lists for pid in found.read_text().split()}


def _shown_by_ip() -> tuple[list[str], list[str]]:
    """Named namespaces, and the machine's interfaces without their state."""
    names, links = (
        subprocess.check_output(["ip", *what], text=True) for what in (["netns"], ["-br", "link"])
    )
    return names.split(), [line.split()[0] for line in links.splitlines()]
