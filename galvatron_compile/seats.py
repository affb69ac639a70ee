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
    """What ranks may share: cores by their numbers, or the time that a quota allows."""

    machine: str
    cores_or_group: tuple[int, ...]
    num_cores: float


@dataclass(frozen=True)
class Seat:
    """Where one rank computes.

    machine: ranks that see one kernel's boot id are on one, whatever their network says. allowed:
    the cores that the rank may use. num_threads: of its computation. quota: of CPU time, if any.
    """

    machine: str
    allowed: tuple[int, ...]
    num_threads: int
    quota: Quota | None = None

    @staticmethod
    def own() -> Seat:
        """This process's."""
        boot = Path("/proc/sys/kernel/random/boot_id")
        name = boot.read_text().strip() if boot.exists() else platform.node()
        affinity = getattr(os, "sched_getaffinity", None)
        allowed = affinity(0) if affinity else range(os.cpu_count() or 1)
        group = ControlGroup.own()
        quota = group.quota() if group is not None else None
        return Seat(name, tuple(sorted(allowed)), torch.get_num_threads(), quota)

    def parts(self) -> list[Part]:
        """What limits this rank: its quota, if any, and its cores."""
        cores = Part(self.machine, self.allowed, len(self.allowed))
        if self.quota is None:
            return [cores]
        return [Part(self.machine, self.quota.group, self.quota.cpus), cores]


def shared_cores(seats: Sequence[Seat]) -> tuple[Cores, ...]:
    """Of every rank the cores it has a part in; () where every thread has a core of its own.

    Ranks that may use the same cores share them: who is idle leaves its part to the others. Ranks
    in one control group share its quota; what they leave, nobody else gets. Of the two the tighter
    one counts, and the quota if they are level.
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
