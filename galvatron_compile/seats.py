"""Which ranks of a job compute on the same cores of the same machine, and how much of them."""

from __future__ import annotations

import os
import platform
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from galvatron_compile.control_groups import ControlGroup, Quota
from galvatron_compile.work import Cores


class Part(NamedTuple):
    """What ranks may share: cores, or the time that the quota of a control group allows.

    what: a description of it that no other part of the machine has.
    """

    machine: str
    what: str
    num_cores: float


@dataclass(frozen=True)
class Seat:
    """Where one rank computes.

    machine: ranks that see one kernel's boot id are on one, whatever their network says. allowed:
    the cores that the rank may use. num_threads: of its computation. quotas: of CPU time, of its
    own control group first.
    """

    machine: str
    allowed: tuple[int, ...]
    num_threads: int
    quotas: tuple[Quota, ...] = ()

    @staticmethod
    def own() -> Seat:
        """This process's."""
        boot = Path("/proc/sys/kernel/random/boot_id")
        name = boot.read_text().strip() if boot.exists() else platform.node()
        affinity = getattr(os, "sched_getaffinity", None)
        allowed = affinity(0) if affinity else range(os.cpu_count() or 1)
        group = ControlGroup.own()
        quotas = group.quotas() if group is not None else ()
        return Seat(name, tuple(sorted(allowed)), torch.get_num_threads(), quotas)

    def parts(self) -> list[Part]:
        """What limits this rank: quotas, if any, and its cores."""
        limits = [Part(self.machine, f"group {each.group}", each.cpus) for each in self.quotas]
        return [*limits, Part(self.machine, f"cores {self.allowed}", len(self.allowed))]


def shared_cores(seats: Sequence[Seat]) -> tuple[Cores, ...]:
    """Of every rank the cores it has a part in; () where every thread has a core of its own.

    Ranks that may use the same cores share them: who is idle leaves its part to the others. Ranks
    in one control group share its quota; what they leave, nobody else gets. The tightest of these
    counts for a rank, and quotas if they are level. (A rank with a tight quota of its own on a core
    that others use is not counted among those who share it.)
    """
    threads = Counter[Part]()
    for seat in seats:
        for part in seat.parts():
            threads[part] += seat.num_threads
    tightest = [max(seat.parts(), key=lambda p: threads[p] / p.num_cores) for seat in seats]
    if all(threads[part] <= part.num_cores for part in tightest):
        return ()
    pools = list(dict.fromkeys(tightest))
    return tuple(
        Cores(pools.index(part), part.num_cores, seat.num_threads)
        for part, seat in zip(tightest, seats, strict=True)
    )
