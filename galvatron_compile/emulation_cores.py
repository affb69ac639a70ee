"""A part of the cores for every rank of an emulated cluster, as if it were its own.

On version 2 of control groups the ranks' lie beside the launcher's and not in it, so that a limit
of the launcher's own, as of a systemd service, does not hold for them.
"""

from __future__ import annotations

import math
import os
import uuid
from collections.abc import Sequence
from pathlib import Path

from galvatron_compile.control_groups import PERIOD_US, ControlGroup
from galvatron_compile.emulation_child import remove_groups
from galvatron_compile.emulation_network import EmulationError

LEAST_CPUS = 1_000 / PERIOD_US  # the kernel takes no quota of less than a millisecond
NO_CONTROL = (
    "no control group here controls CPU time (with version 2 the topmost group has to hand it on: "
    "echo +cpu > /sys/fs/cgroup/cgroup.subtree_control); or run without a limit on the ranks' cores"
)
REFUSED = (
    "this system does not let the ranks' cores be limited ({}); run as root, in a container with "
    "docker run --privileged, or without a limit"
)


def check_cpus(cpus_per_rank: float | None) -> None:
    """EmulationError for what no rank can have."""
    if cpus_per_rank is None:
        return
    if not (math.isfinite(cpus_per_rank) and cpus_per_rank >= LEAST_CPUS):
        raise EmulationError(
            f"{cpus_per_rank:g} cores for a rank; choose {LEAST_CPUS:g} or more, or no limit"
        )


class Groups:
    """Control groups of ranks. Those without a limit have none.

    folders: one for every rank, or none.
    """

    def __init__(self) -> None:
        self.folders: list[Path] = []

    def make(self) -> None:
        """Nothing; see :class:`RankGroups`."""


class RankGroups(Groups):
    """Names for the control groups of all ranks. Known before there are any, so that the guard
    can remove them whatever happens; :meth:`make` makes them."""

    def __init__(self, num_ranks: int, cpus_per_rank: float, *, pinned: bool) -> None:
        """EmulationError: there are not so many cores, or nothing controls CPU time here."""
        super().__init__()
        self.cpus_per_rank = cpus_per_rank
        try:
            own = ControlGroup.own()
            parent = own.parent_of_new() if own is not None else None
            quotas = own.quotas() if own is not None else ()
        except OSError as error:
            raise EmulationError(REFUSED.format(error)) from error
        if own is None or parent is None:
            raise EmulationError(NO_CONTROL)
        num_cores = len(os.sched_getaffinity(0))
        most = min([num_cores, *(quota.cpus for quota in quotas)]) / num_ranks
        if pinned:
            most = min(most, 1 / math.ceil(num_ranks / num_cores))
        if cpus_per_rank > most + 1e-9:
            raise EmulationError(_too_many(num_ranks, cpus_per_rank, most))
        self.own = own
        name = f"galvatron-{os.getpid()}-{uuid.uuid4().hex[:8]}"
        self.folders = [parent / f"{name}-{rank}" for rank in range(num_ranks)]

    def make(self) -> None:
        """EmulationError: the system does not permit it."""
        try:
            for folder in self.folders:
                self.own.make(folder, self.cpus_per_rank)
        except OSError as error:
            raise EmulationError(REFUSED.format(error)) from error


def remove(folders: Sequence[Path]) -> None:
    """Groups in which no process is left.

    Raises:
        EmulationError: some cannot be removed.
    """
    errors = remove_groups([str(folder) for folder in folders])
    if errors:
        left = "; ".join(map(str, errors))
        raise EmulationError(f"control groups are left behind: {left}; rmdir them")


def _too_many(num_ranks: int, cpus_per_rank: float, most: float) -> str:
    what = f"{num_ranks} ranks of {cpus_per_rank:g} cores each are more than there is here"
    if most < LEAST_CPUS:
        return f"{what}, and so are {num_ranks} of {LEAST_CPUS:g}; take fewer ranks, or no limit"
    return f"{what}; choose {math.floor(most * 1000) / 1000:g} or less, or no limit"
