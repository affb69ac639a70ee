"""A part of the cores for every rank of an emulated cluster, as if it were its own."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path

from galvatron_compile.control_groups import PERIOD_US, ControlGroup
from galvatron_compile.emulation_child import remove_group
from galvatron_compile.emulation_network import EmulationError

NO_CONTROL = (
    "no control group here controls CPU time; run on the machine itself or in a virtual machine, "
    "or without a limit on the ranks' cores"
)
LEAST_CPUS = 1_000 / PERIOD_US  # the kernel takes no quota of less than a millisecond


def check_cpus(cpus_per_rank: float | None) -> None:
    """EmulationError for what no rank can have."""
    if cpus_per_rank is None:
        return
    if not (math.isfinite(cpus_per_rank) and cpus_per_rank >= LEAST_CPUS):
        raise EmulationError(
            f"{cpus_per_rank:g} cores for a rank; choose {LEAST_CPUS:g} or more, or no limit"
        )


def rank_groups(num_ranks: int, cpus_per_rank: float | None) -> list[Path]:
    """A control group for every rank; none without a limit. Who ends the ranks removes them.

    Raises:
        EmulationError: there are not so many cores, or the system does not permit it.
    """
    if cpus_per_rank is None:
        return []
    own = ControlGroup.own()
    if own is None:
        raise EmulationError(NO_CONTROL)
    quota = own.quota()
    cores = min(len(os.sched_getaffinity(0)), quota.cpus if quota else math.inf)
    if num_ranks * cpus_per_rank > cores + 1e-9:
        raise EmulationError(
            f"{num_ranks} ranks of {cpus_per_rank:g} cores each need more than the {cores:g} that "
            f"are here; choose {cores / num_ranks:.3g} or less"
        )
    groups: list[Path] = []
    try:
        parent = own.parent_of_new()
        if parent is None:
            raise EmulationError(NO_CONTROL)
        for _ in range(num_ranks):
            groups.append(own.make(parent, cpus_per_rank))
    except OSError as error:
        remove(groups)
        raise EmulationError(
            f"this system does not let the ranks' cores be limited ({error}); run as root, in a "
            "container with docker run --privileged, or without a limit"
        ) from error
    return groups


def remove(groups: Sequence[Path]) -> None:
    """Those that are still there; their processes have ended.

    Raises:
        EmulationError: one cannot be removed.
    """
    for group in groups:
        try:
            remove_group(str(group))
        except FileNotFoundError:
            continue  # the guard was here
        except OSError as error:
            raise EmulationError(f"a control group is left behind: {error}; rmdir it") from error
