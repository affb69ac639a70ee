"""Timing that all ranks agree on: all start together, and the slowest rank's mean counts."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist

_MIN_SAMPLE_MS = 1.0
_MAX_INNER = 1000


def typical(samples: Sequence[float]) -> float:
    """The mean, with no sample counted as more than three times the median.

    A step is a sum of many calls, so what delays one in five belongs to it (collectives on TCP
    often take half as long again); what happens once, and takes ten times as long, does not.
    """
    most = 3 * statistics.median(samples)
    return statistics.fmean(min(sample, most) for sample in samples)


class Stopwatch:
    """Times calls on every rank of the default process group (or in a lone process) at once.

    point_s: about how long one measurement may take.
    limit_s: after this long (on a machine busy with other work) a measurement is one sample, and
        sweeps end at their second point.
    """

    def __init__(self, device: torch.device, point_s: float, limit_s: float) -> None:
        self.device = device
        self.point_s = point_s
        self.deadline_s = time.monotonic() + limit_s
        self.late = False  # agreed by all ranks, who must take the same number of samples
        self.alone = not dist.is_initialized() or dist.get_world_size() == 1

    def ms(self, call: Callable[[], object]) -> float:
        """Typical time of one call, of the slowest rank; the same on all. Every rank must call.

        A sample is as many calls as make a millisecond, so that clocks and launches do not count;
        there are 3 to 15 samples.
        """
        call()  # warms up: allocations, connections, code selection
        first_ms = min(self.sample(call, 1) for _ in range(1 if self.late else 3))
        once_ms, over_s = self.agree([first_ms, time.monotonic() - self.deadline_s])
        self.late = over_s > 0
        if self.late:
            return max(once_ms, 1e-4)
        once_ms = max(once_ms, 1e-4)
        inner = min(_MAX_INNER, math.ceil(_MIN_SAMPLE_MS / once_ms))
        num_samples = min(15, max(3, int(1e3 * self.point_s / (inner * once_ms))))
        samples = [self.sample(call, inner) for _ in range(num_samples)]
        return self.agree([typical(samples)])[0]

    def sample(self, call: Callable[[], object], inner: int) -> float:
        """ms per call of ``inner`` calls in a row, on this rank, started with the others."""
        self.barrier()
        if self.device.type == "cuda":
            start, end = self._event(), self._event()
            start.record()
            for _ in range(inner):
                call()
            end.record()
            torch.cuda.synchronize(self.device)
            return float(start.elapsed_time(end)) / inner
        start_s = time.perf_counter()
        for _ in range(inner):
            call()
        return 1e3 * (time.perf_counter() - start_s) / inner

    def barrier(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        if not self.alone:
            dist.barrier()

    def agree(self, values: Sequence[float]) -> list[float]:
        """The largest over all ranks, of each value."""
        if self.alone:
            return list(values)
        tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(tensor, dist.ReduceOp.MAX)
        return [float(value) for value in tensor.tolist()]

    def predicts_over(self, points: Sequence[tuple[float, float]], size: float) -> bool:
        """Whether a call of ``size`` would outlast a measurement, by the last two (size, ms).

        Never with fewer than two points: a curve needs a slope.
        """
        if len(points) < 2:
            return False
        (x0, y0), (x1, y1) = points[-2:]
        if self.late:
            return True
        return y1 + max(0.0, y1 - y0) / (x1 - x0) * (size - x1) > 1e3 * self.point_s

    def _event(self) -> torch.cuda.Event:
        return torch.cuda.Event(enable_timing=True)
