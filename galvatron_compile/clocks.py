"""Clocks that time a step without holding it up, and how ranks compare theirs."""

from __future__ import annotations

import socket
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

_ROUNDS = 11


def host_ms() -> float:
    """Monotonic; on one machine all processes read the same."""
    return 1e3 * time.perf_counter()


class HostClock:
    """Where an action returns when it is done."""

    def mark(self) -> Any:
        return host_ms()

    def times_ms(self, marks: Sequence[Any]) -> list[float]:
        return [float(mark) for mark in marks]


class CudaClock:
    """Events on the compute stream. A wait for a collective holds that stream and not the host, so
    the events before and after it show what the wait costs."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        torch.cuda.synchronize(device)
        self.base, self.base_ms = self.mark(), host_ms()

    def mark(self) -> Any:
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event

    def times_ms(self, marks: Sequence[Any]) -> list[float]:
        torch.cuda.synchronize(self.device)
        return [self.base_ms + float(self.base.elapsed_time(mark)) for mark in marks]


def agree(
    device: torch.device, clock: Callable[[], float] = host_ms, machine: str | None = None
) -> tuple[float, bool]:
    """(by how many ms this rank's clock is ahead of rank 0's, whether all read the same clock).

    Ranks of one machine do. Else all leave a collective at nearly the same time and read their
    clocks; the median of several rounds is as good as one message is fast.

    Collective; device: of the tensors that are exchanged.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return 0.0, True
    readings = []
    for _ in range(_ROUNDS):
        dist.all_reduce(torch.zeros(1, device=device))
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        readings.append(clock())
    mine = (machine or _machine(), readings)
    everyone = [mine] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    if len({name for name, _ in everyone}) == 1:
        return 0.0, True
    ahead = [own - first for own, first in zip(readings, everyone[0][1], strict=True)]
    return statistics.median(ahead), False


def _machine() -> str:
    """The same for all processes under one running kernel, containers included."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    return boot.read_text().strip() if boot.exists() else socket.gethostname()
