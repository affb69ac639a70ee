"""What is left when the launcher of an emulated cluster is killed: nothing."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import pytest
from emulated import (
    FAMILY,
    TIMEOUT_S,
    WHY_NO_QUOTAS,
    alive,
    emulated,
    groups_left,
    namespaces_of_the_machine,
    needed,
    nothing_left,
)

from galvatron_compile.emulation_cores import remove

pytestmark = needed

# Prints the ids of each of two ranks and of the process that it started, and the guard's.
LAUNCHER = """
import signal, sys
from galvatron_compile.emulation import EmulatedCluster, emulated_cluster
signal.signal(signal.SIGINT, signal.default_int_handler)  # a parent may have it ignored
pids = []
def on_line(rank, stream, line):
    pids.extend(line.split())
    if len(pids) == 4:
        print(*pids, cluster._guard.pid, flush=True)
with emulated_cluster(EmulatedCluster(cpus_per_rank=float(sys.argv[2]) or None)) as cluster:
    cluster.run(["-c", sys.argv[1], "time.sleep(1000)"], on_line=on_line)
"""


@contextmanager
def launched() -> Iterator[tuple[subprocess.Popen[str], list[str]]]:
    """A launcher and those ids. A test that fails leaves no more behind than one that passes."""
    pids: list[str] = []
    launcher = subprocess.Popen(
        [sys.executable, "-c", LAUNCHER, FAMILY, "0" if WHY_NO_QUOTAS else "0.5"],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert launcher.stdout is not None
    try:
        pids = launcher.stdout.readline().split()
        assert len(pids) == 5
        yield launcher, pids
    finally:
        launcher.kill()
        launcher.wait()
        launcher.stdout.close()
        for pid in alive(pids):
            with suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)


def wait_for_the_end_of(pids: list[str]) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while alive(pids) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not alive(pids)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_nothing_survives_a_killed_launcher(number: signal.Signals) -> None:
    with nothing_left(), launched() as (launcher, pids):
        nodes = {os.readlink(f"/proc/{pid}/ns/net") for pid in pids[:4]}
        assert len(nodes) == 2
        launcher.send_signal(number)
        launcher.wait(timeout=TIMEOUT_S)
        wait_for_the_end_of(pids)  # the guard's too, which removes the control groups
        assert not groups_left(launcher.pid)
        assert not nodes & namespaces_of_the_machine()
    with emulated(num_nodes=2) as cluster:
        cluster.run(["-c", "pass"], timeout_s=TIMEOUT_S)


def test_ranks_end_with_a_launcher_whose_guard_was_killed() -> None:
    """Not so what the ranks have started, and their control groups: those are the guard's."""
    with launched() as (launcher, pids):
        os.kill(int(pids[4]), signal.SIGKILL)
        launcher.kill()
        launcher.wait(timeout=TIMEOUT_S)
        try:
            wait_for_the_end_of(pids[:4:2])
        finally:
            for pid in alive(pids):
                os.kill(int(pid), signal.SIGKILL)
            remove(sorted(groups_left(launcher.pid)))
