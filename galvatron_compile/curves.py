"""Measured points and what lies between them. Plain arithmetic, no torch."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise

from galvatron_compile.errors import ProfileError

Points = tuple[tuple[float, float], ...]

KINDS = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all", "broadcast", "p2p")
TIERS = ("node", "cluster")


def check_points(points: Points, what: str) -> None:
    """ProfileError unless both coordinates are positive and finite and the first one rises."""
    if not points:
        raise ProfileError(f"{what} has no points; give at least one [size, value] pair")
    for point in points:
        if not all(math.isfinite(number) and number > 0 for number in point):
            raise ProfileError(f"{what} has the point {list(point)}; both numbers must be positive")
    for (low, _), (high, _) in pairwise(points):
        if low >= high:
            raise ProfileError(f"{what}: sizes must rise, but {high:g} follows {low:g}")


@dataclass(frozen=True)
class RateCurve:
    """How fast one kind of computation runs, by its size.

    points: (FLOPs of one call, FLOP/s). Between points the rate is interpolated linearly in
        log-log space; outside, it is that of the nearest point.
    source: where the numbers are from, "measured on …" or "default: …".
    """

    dtype: str
    points: Points
    source: str

    def __post_init__(self) -> None:
        check_points(self.points, f"rate of {self.dtype}")

    def rate_flops_per_s(self, flops: float) -> float:
        """FLOP/s of a call of ``flops``."""
        sizes = [size for size, _ in self.points]
        if flops <= sizes[0]:
            return self.points[0][1]
        if flops >= sizes[-1]:
            return self.points[-1][1]
        i = bisect_left(sizes, flops)
        (x0, y0), (x1, y1) = self.points[i - 1], self.points[i]
        share = math.log(flops / x0) / math.log(x1 / x0)
        return math.exp(math.log(y0) + share * math.log(y1 / y0))

    def ms(self, flops: float) -> float:
        return 1e3 * flops / self.rate_flops_per_s(flops)


@dataclass(frozen=True)
class CollectiveCurve:
    """Time of one collective over groups of ``num_ranks``, by payload.

    points: (payload bytes, ms). Between points time is linear in the payload, which is latency +
        bytes / bandwidth fitted piece by piece; above the last point the last piece goes on, below
        the first one the line runs to :attr:`latency_ms` at nothing.
    """

    kind: str
    tier: str
    num_ranks: int
    points: Points
    source: str

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ProfileError(f"collective kind {self.kind!r}; expected one of {', '.join(KINDS)}")
        if self.tier not in TIERS:
            raise ProfileError(f"tier {self.tier!r} of {self.kind}; expected node or cluster")
        if self.num_ranks < 2:
            raise ProfileError(f"{self.kind} over {self.num_ranks} ranks; it needs at least 2")
        check_points(self.points, f"{self.kind} over {self.num_ranks} ranks ({self.tier})")

    @property
    def latency_ms(self) -> float:
        """Time of an empty payload: the first two points' line, never above the first time."""
        if len(self.points) == 1:
            return self.points[0][1]
        (x0, y0), (x1, y1) = self.points[:2]
        return min(y0, max(0.0, y0 - x0 * (y1 - y0) / (x1 - x0)))

    @property
    def bytes_per_s(self) -> float:
        """Payload bytes per second at the largest measured payload."""
        payload_bytes, ms = self.points[-1]
        return 1e3 * payload_bytes / ms

    @cached_property
    def _line(self) -> tuple[Points, list[float]]:
        line = ((0.0, self.latency_ms), *self.points)
        return line, [x for x, _ in line]

    def ms(self, payload_bytes: float) -> float:
        line, sizes = self._line
        i = min(max(bisect_left(sizes, payload_bytes), 1), len(line) - 1)
        (x0, y0), (x1, y1) = line[i - 1], line[i]
        if payload_bytes > x1:  # noise may make the last piece fall: never below its bandwidth
            slope = max((y1 - y0) / (x1 - x0), 0.5 * y1 / x1)
            return y1 + slope * (payload_bytes - x1)
        return y0 + (y1 - y0) * (payload_bytes - x0) / (x1 - x0)


def bus_factor(kind: str, num_ranks: int) -> float:
    """Bytes that cross a rank's link per payload byte, the convention of nccl-tests.

    https://github.com/NVIDIA/nccl-tests/blob/master/doc/PERFORMANCE.md
    """
    if kind == "all_reduce":
        return 2 * (num_ranks - 1) / num_ranks
    if kind in ("all_gather", "reduce_scatter", "all_to_all"):
        return (num_ranks - 1) / num_ranks
    return 1.0


def between_sizes(curves: Sequence[CollectiveCurve], num_ranks: int, payload_bytes: float) -> float:
    """ms for a group size that may not have been measured.

    ``curves`` share kind and tier and ascend in size.

    Between two measured sizes times are linear in log(size). Outside, latency grows with
    log2(size) (tree) and the rest with the bytes that cross a link.
    """
    i = 0
    while i < len(curves) and curves[i].num_ranks < num_ranks:
        i += 1
    if i < len(curves) and curves[i].num_ranks == num_ranks:
        return curves[i].ms(payload_bytes)
    if 0 < i < len(curves):
        small, large = curves[i - 1].num_ranks, curves[i].num_ranks
        share = math.log(num_ranks / small) / math.log(large / small)
        low, high = curves[i - 1].ms(payload_bytes), curves[i].ms(payload_bytes)
        return low + share * (high - low)
    nearest = curves[0] if i == 0 else curves[-1]
    latency_ms, total_ms = nearest.latency_ms, nearest.ms(payload_bytes)
    steps = math.log2(num_ranks) / math.log2(nearest.num_ranks)
    volume = bus_factor(nearest.kind, num_ranks) / bus_factor(nearest.kind, nearest.num_ranks)
    return latency_ms * steps + max(0.0, total_ms - latency_ms) * volume


def rising(points: Sequence[tuple[float, float]]) -> Points:
    """Times that never fall with size: none is longer than that of a larger size.

    Noise only adds to a time, so where a smaller size took longer it is that one which was
    disturbed; and a planner must not be led to pad.
    """
    values = list(accumulate((value for _, value in reversed(points)), min))[::-1]
    return tuple((size, value) for (size, _), value in zip(points, values, strict=True))
