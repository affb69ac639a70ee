"""Times on a GPU that a slow host cannot spoil."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

Call = Callable[[], Any]
FLUSHED_BYTES = 2**28  # several times an L2 cache


class Timed(NamedTuple):
    """Median time of a call. late: the host could not queue the call's launches before the GPU got
    to them, so the time is partly the host's (a call that waits for the GPU is always late)."""

    ms: float
    late: bool = False


Timer = Callable[[Call], Timed]


class CudaTimer:
    """Medians of CUDA events with a cold cache, after some runs to warm up.

    In front of the first event the GPU is kept busy for longer than the host takes to launch
    everything, so launches do not count. Whether that was so is looked up after each run.
    Not run yet: no GPU was at hand.
    """

    def __init__(self, seconds: float = 0.3) -> None:
        self.seconds = seconds
        self.flushed = torch.empty(FLUSHED_BYTES, dtype=torch.uint8, device="cuda")
        self.cycles_per_ms = self._cycles_per_ms()

    def __call__(self, call: Call) -> Timed:
        for _ in range(3):
            call()
        torch.cuda.synchronize()
        before = time.perf_counter()
        call()
        delay_ms = min(20.0, 1.5e3 * (time.perf_counter() - before) + 0.05)
        torch.cuda.synchronize()
        times: list[float] = []
        num_late = 0
        until = time.perf_counter() + self.seconds
        while len(times) < 10 or (time.perf_counter() < until and len(times) < 200):
            ms, late = self._once(call, delay_ms)
            if late and num_late < 3:  # try again with a longer delay
                num_late += 1
                delay_ms = min(20.0, 2 * delay_ms)
                continue
            times.append(ms)
        return Timed(statistics.median(times), num_late >= 3)

    def _once(self, call: Call, delay_ms: float) -> tuple[float, bool]:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.flushed.zero_()
        torch.cuda._sleep(int(delay_ms * self.cycles_per_ms))
        start.record()
        call()
        late = start.query()  # the GPU is past the delay already
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end), late

    def _cycles_per_ms(self) -> float:
        cycles = 20_000_000  # about 10 ms
        for _ in range(2):  # the first is to warm up
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            torch.cuda._sleep(cycles)
            end.record()
            torch.cuda.synchronize()
        return cycles / start.elapsed_time(end)


def called_once(call: Call) -> Timed:
    """For dry runs: the call is made and the time is a dummy."""
    call()
    return Timed(1.0)


def copy_bytes_per_s(timer: Timer, device: torch.device, num_bytes: int = 2**31) -> float:
    """The copy ceiling: bytes read and written."""
    source = torch.ones(num_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * num_bytes / timer(lambda: target.copy_(source)).ms * 1e3


def matmul_flops_per_s(timer: Timer, device: torch.device, size: int = 8192) -> float:
    """The matmul ceiling: a square product of PyTorch's (cuBLAS) of random bfloat16."""
    a, b = (torch.randn(size, size, device=device).bfloat16() for _ in range(2))
    out = torch.empty_like(a)
    return 2 * size**3 / timer(lambda: torch.mm(a, b, out=out)).ms * 1e3
