"""An emulated cluster: nodes with limited links between them, on one Linux machine.

>>> with emulated_cluster(EmulatedCluster(num_nodes=2, rate_bits_per_s=2e8)) as cluster:
...     result = cluster.run(["script.py", "--steps", "10"], timeout_s=300)
>>> result.outputs[0]  # what rank 0 printed

Each node is a network namespace (:mod:`galvatron_compile.emulation_network`). Ranks of one node
talk over its loopback, ranks of different nodes over real TCP through rate-limited links. Compute,
memory and disks are the machine's own, shared by all nodes. Latency is not emulated.

Nothing outlives the launcher, even one that is killed with SIGKILL: ranks ask the kernel to die
with it, a guard process ends whatever they started (:mod:`galvatron_compile.emulation_child`), and
namespaces without a name end with the last process in them. The guard also removes the ranks'
control groups, where they have a part of the cores each (:mod:`galvatron_compile.emulation_cores`).
So there is nothing to clean up at the next start, and no signal handler.
"""

from __future__ import annotations

import json
import math
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from galvatron_compile import emulation_child
from galvatron_compile.emulation_cores import Groups, RankGroups, check_cpus, remove
from galvatron_compile.emulation_network import (
    INTERFACE,
    MAX_NODES,
    EmulationError,
    Network,
    node_address,
    why_not,
)
from galvatron_compile.emulation_ranks import CONTROL, FinishedRun, OnLine, RankCommand, Ranks

__all__ = [
    "EmulatedCluster",
    "EmulationError",
    "FinishedRun",
    "RunningCluster",
    "emulated_cluster",
    "set_link_rate",
    "why_not",
]

FIRST_PORT = 29_500
MIN_RATE_BITS_PER_S = 1e5


@dataclass(frozen=True)
class EmulatedCluster:
    """What to emulate.

    Attributes:
        num_nodes: network namespaces, 1 to 250.
        ranks_per_node: processes in each.
        rate_bits_per_s: of each node's link, in each direction at once; None: no limit.
        pin: rank i runs on core i mod cores only, so that nodes share the cores evenly.
        cpus_per_rank: so many cores' worth of time for every rank, such as 0.5, and no more, even
            where others are idle; None: no limit. Ranks that share cores are then nearly as devices
            are: one that waits for more than some milliseconds does not speed up another.
    """

    num_nodes: int = 2
    ranks_per_node: int = 1
    rate_bits_per_s: float | None = None
    pin: bool = False
    cpus_per_rank: float | None = None

    def __post_init__(self) -> None:
        if not 1 <= self.num_nodes <= MAX_NODES:
            raise EmulationError(
                f"cannot emulate {self.num_nodes} nodes; choose a number from 1 to {MAX_NODES}"
            )
        if self.ranks_per_node < 1:
            raise EmulationError(
                f"{self.ranks_per_node} ranks on a node; every node needs at least one"
            )
        check_rate(self.rate_bits_per_s)
        check_cpus(self.cpus_per_rank)

    @property
    def world_size(self) -> int:
        return self.num_nodes * self.ranks_per_node


def check_rate(rate_bits_per_s: float | None) -> None:
    """EmulationError for what no link can have."""
    if rate_bits_per_s is None:
        return
    if not (math.isfinite(rate_bits_per_s) and rate_bits_per_s >= MIN_RATE_BITS_PER_S):
        raise EmulationError(
            f"a link of {rate_bits_per_s:g} bits a second; choose {MIN_RATE_BITS_PER_S:g} "
            "(100kbit) or more, or no limit"
        )


@contextmanager
def emulated_cluster(settings: EmulatedCluster) -> Iterator[RunningCluster]:
    """The cluster, up as long as the context. EmulationError where it is not possible."""
    reason = why_not()
    if reason is not None:
        raise EmulationError(f"cannot emulate a cluster here: {reason}")
    cluster = RunningCluster(settings)
    try:
        yield cluster
    finally:
        cluster.close()


class RunningCluster:
    """Nodes that are up; made by :func:`emulated_cluster`."""

    def __init__(self, settings: EmulatedCluster) -> None:
        self.settings = settings
        self._num_runs = 0
        self._running = threading.Lock()
        groups = _groups(settings)
        self._groups = groups.folders
        self._network = Network(settings.num_nodes)
        try:
            self.set_rate(settings.rate_bits_per_s)
            self._guard = _start_guard(self._network.namespace_fds, self._groups)
        except BaseException:
            self._network.close()
            raise
        try:
            groups.make()  # now that the guard is there to remove them
        except BaseException:
            self.close()
            raise

    def set_rate(self, rate_bits_per_s: float | None) -> None:
        """Change the rate of every link, also while ranks run; None lifts the limit."""
        check_rate(rate_bits_per_s)
        self._network.set_rate(rate_bits_per_s)

    def run(
        self,
        arguments: Sequence[str],
        *,
        timeout_s: float | None = None,
        environment: Mapping[str, str] | None = None,
        on_line: OnLine | None = None,
    ) -> FinishedRun:
        """``python ARGUMENTS…`` on every rank, with the environment that torchrun gives.

        Call it in a thread that stays until it returns. The ranks see no network but the cluster's.

        Args:
            arguments: a script and its arguments, or ``-m``, a module and its arguments.
            timeout_s: how long it may take, the start of the processes included.
            environment: added to this process's environment and to what torchrun gives.
            on_line: called with (rank, ``"stdout"`` or ``"stderr"``, line) as ranks write.

        Raises:
            PeerError: a rank failed or was late: which, how, and its last lines of stderr. The
                others are stopped, and whatever processes they started.
        """
        if not arguments:
            raise EmulationError("nothing to run; give a script and its arguments")
        if not self._running.acquire(blocking=False):
            raise EmulationError("this cluster runs something already; wait until that ends")
        try:
            commands = self._commands(arguments, environment or {})
            self._num_runs += 1
            with Ranks(commands, on_line, self.set_rate) as ranks:
                return ranks.wait(timeout_s)
        finally:
            self._running.release()

    def close(self) -> None:
        """End the guard, which ends what is left in the nodes, and the nodes themselves.

        Raises:
            EmulationError: a control group of a rank cannot be removed.
        """
        assert self._guard.stdin is not None
        try:
            self._guard.stdin.close()
            self._guard.wait()
            # Nothing to do, unless something has ended the guard before its time.
            emulation_child.end_processes(self._network.namespace_fds)
            remove(self._groups)
        finally:
            self._network.close()

    def _commands(
        self, arguments: Sequence[str], environment: Mapping[str, str]
    ) -> list[RankCommand]:
        cores = sorted(os.sched_getaffinity(0))
        commands = []
        for rank in range(self.settings.world_size):
            node, local_rank = divmod(rank, self.settings.ranks_per_node)
            commands.append(
                RankCommand(
                    node=node,
                    namespace_fd=self._network.namespace_fds[node],
                    cores=(cores[rank % len(cores)],) if self.settings.pin else (),
                    group=str(self._groups[rank]) if self._groups else "",
                    command=(sys.executable, *arguments),
                    environment={**os.environ, **self._variables(rank, local_rank), **environment},
                )
            )
        return commands

    def _variables(self, rank: int, local_rank: int) -> dict[str, str]:
        """What torchrun sets, which interface gloo and NCCL take, and one thread a rank."""
        return {
            "RANK": str(rank),
            "WORLD_SIZE": str(self.settings.world_size),
            "LOCAL_RANK": str(local_rank),
            "LOCAL_WORLD_SIZE": str(self.settings.ranks_per_node),
            "GROUP_RANK": str(rank // self.settings.ranks_per_node),
            "GROUP_WORLD_SIZE": str(self.settings.num_nodes),
            "MASTER_ADDR": node_address(0),
            # A port of its own: connections of the run before may not have ended yet.
            "MASTER_PORT": str(FIRST_PORT + self._num_runs % 10_000),
            "GLOO_SOCKET_IFNAME": INTERFACE,
            "NCCL_SOCKET_IFNAME": INTERFACE,
            "OMP_NUM_THREADS": "1",
            "PYTHONUNBUFFERED": "1",
            "PYTHONFAULTHANDLER": "1",
        }


def set_link_rate(rate_bits_per_s: float | None) -> None:
    """Change the rate of all links from inside: for a script that runs in an emulated cluster.

    When it returns, the new rate holds. One rank calls it while no rank sends, as between two
    barriers: one start of the processes then serves several rates.
    """
    if CONTROL not in os.environ:
        raise EmulationError(
            "this process is no rank of an emulated cluster; start the script with "
            "galvatron-compile emulate, or RunningCluster.run"
        )
    with socket.socket(fileno=os.dup(int(os.environ[CONTROL]))) as control:
        control.send(json.dumps({"rate_bits_per_s": rate_bits_per_s}).encode())
        error = json.loads(control.recv(1 << 12))["error"]
    if error:
        raise EmulationError(error)


def _groups(settings: EmulatedCluster) -> Groups:
    if settings.cpus_per_rank is None:
        return Groups()
    return RankGroups(settings.world_size, settings.cpus_per_rank, pinned=settings.pin)


def _start_guard(namespace_fds: Sequence[int], groups: Sequence[Path]) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-I", "-S", emulation_child.__file__, "guard"]
    return subprocess.Popen(
        [*command, ",".join(map(str, namespace_fds)), *map(str, groups)],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        pass_fds=namespace_fds,
        start_new_session=True,
    )
