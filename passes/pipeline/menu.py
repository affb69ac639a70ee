"""What alike layers choose from: options by time and memory."""

from __future__ import annotations

import numpy as np

from galvatron_compile.passes.pipeline.problem import Ints


class Menu:
    """Options that alike layers may take: those not beaten in time and memory.

    time_ns falls and memory_bytes rises along ``options``; hull: positions on the lower hull.
    """

    def __init__(self, options: Ints, time_ns: Ints, memory_bytes: Ints) -> None:
        order = np.lexsort((time_ns, memory_bytes))
        running = np.minimum.accumulate(time_ns[order])
        keep = np.ones(len(order), dtype=np.bool_)
        keep[1:] = time_ns[order][1:] < running[:-1]
        order = order[keep]
        self.options: Ints = options[order]
        self.time_ns: Ints = time_ns[order]
        self.memory_bytes: Ints = memory_bytes[order]
        self.hull = _lower_hull(self.memory_bytes.tolist(), self.time_ns.tolist())
        times, memories = self.time_ns[self.hull].tolist(), self.memory_bytes[self.hull].tolist()
        self.hull_time: list[int] = times
        self.hull_memory: list[int] = memories
        # Nanoseconds per byte that a step to the neighbour with less memory costs.
        self.slopes = [
            (times[e - 1] - times[e]) / (memories[e] - memories[e - 1])
            for e in range(1, len(self.hull))
        ]

    def __len__(self) -> int:
        return len(self.options)


def _lower_hull(memory: list[int], time: list[int]) -> list[int]:
    """Positions on the lower convex hull of points with rising memory and falling time."""
    hull: list[int] = []
    for i in range(len(memory)):
        while len(hull) >= 2:
            a, b = hull[-2], hull[-1]
            # b lies on or above the line from a to i.
            left = (time[a] - time[b]) * (memory[i] - memory[a])
            if left <= (time[a] - time[i]) * (memory[b] - memory[a]):
                hull.pop()
            else:
                break
        hull.append(i)
    return hull
