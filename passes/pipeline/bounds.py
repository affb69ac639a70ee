"""Lower bounds and smallest capacities of every stage of a family at once.

A *row* is what sets pipeline groups apart: micro-batches in flight, and which ends of its stage
send. For every row and every signature of layers (:mod:`.ranges`) the Lagrangian

    max over λ of  Σ_layers min_s [ time + λ · memory ]  -  λ · (capacity - transient)

bounds the stage from below, switching left out. The λ are the slopes of the hulls of the layer
classes, where the relaxation's optimum lies. Transients are bounded in ranges: options up to the
end of a range are allowed, and the start of the range is taken off the capacity.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from galvatron_compile.passes.pipeline.closed_form import Objective, layer_ns
from galvatron_compile.passes.pipeline.menu import Menu
from galvatron_compile.passes.pipeline.patterns import Floats
from galvatron_compile.passes.pipeline.problem import Bools, Ints, PipelineProblem
from galvatron_compile.passes.pipeline.ranges import Ranges, class_counts
from galvatron_compile.passes.pipeline.tables import Tables

FAR = 1 << 54
"""Stands for never: more than any time or size, and 64 of them fit into 64 bits."""


@dataclass(frozen=True, order=True)
class Row:
    flight: int
    sends_back: bool
    sends_next: bool


def rows_of(tables: Tables) -> list[Row]:
    """The row of every group of a family without virtual stages."""
    last = len(tables.flights) - 1
    return [Row(flight[0], g > 0, g < last) for g, flight in enumerate(tables.flights)]


class Bounds:
    """num_thresholds: into how many ranges transients are divided; more is tighter and slower."""

    def __init__(self, tables: Tables, found: Ranges, num_thresholds: int = 4) -> None:
        self.tables, self.found = tables, found
        self.counts = class_counts(found, tables.classes, tables.problem.costs.num_classes)
        self.used = np.flatnonzero(self.counts.any(axis=0))
        self.counts = self.counts[:, self.used]
        position = np.zeros(tables.problem.costs.num_classes, dtype=np.int64)
        position[self.used] = np.arange(len(self.used))
        self.first = position[tables.classes[found.first]]
        self.last = position[tables.classes[found.last - 1]]
        self.allowed = tables.allowed[self.used]
        self.transient = np.where(self.allowed, tables.transient_bytes[self.used], FAR)
        self.reserve = np.where(self.counts > 0, self.transient.min(axis=1), 0).max(axis=1)
        values = np.unique(self.transient[self.allowed])
        at = np.linspace(0, len(values), min(num_thresholds, len(values)) + 1).astype(np.int64)
        self.spans = [(int(values[a]), int(values[b - 1])) for a, b in pairwise(at)]

    def memory(self, row: Row) -> Ints:
        """[classes used, options]: bytes without the transient."""
        tables = self.tables
        return np.asarray(
            tables.state_bytes[self.used] + row.flight * tables.saved_bytes[self.used]
        )

    def multipliers(self, row: Row) -> Floats:
        """Slopes of the hulls of every class in use, and 0."""
        memory, slopes = self.memory(row), {0.0}
        for k, index in enumerate(self.used):
            options = np.flatnonzero(self.allowed[k])
            if len(options):
                menu = Menu(options, self.tables.time_ns[index, options], memory[k, options])
                slopes.update(menu.slopes)
        return np.array(sorted(slopes))

    def times(self, row: Row) -> Ints:
        """[signatures]: no stage is faster. FAR where a class has no option."""
        tables, capacity = self.tables, self.tables.problem.capacity_bytes
        multipliers = self.multipliers(row)
        ends = np.zeros_like(tables.time_ns[self.used])
        start = ends + (tables.send_back_ns[self.used] if row.sends_back else 0)
        finish = ends + (tables.send_next_ns[self.used] if row.sends_next else 0)
        value = multipliers[:, None, None] * self.memory(row) + tables.time_ns[self.used]
        result = np.full(self.found.num, np.inf)
        for low, high in self.spans:
            keep = self.allowed & (self.transient <= high)
            if not keep.any():
                continue
            inner = _least(value, keep)
            total = self.counts.astype(np.float64) @ np.where(np.isinf(inner), FAR, inner).T
            alone = self.found.length == 1
            both = np.where(alone[:, None], 0.0, 1.0)
            at_first = _minus(_least(value + start, keep), inner).T[self.first]
            at_last = _minus(_least(value + finish, keep), inner).T[self.last]
            at_once = _minus(_least(value + start + finish, keep), inner).T[self.first]
            total += both * (at_first + at_last) + (1 - both) * at_once
            reserve = np.maximum(self.reserve, low)
            total -= multipliers * (capacity - reserve)[:, None]
            total -= 1e-12 * (np.abs(total) + multipliers * (capacity + float(1 << 44)))
            result = np.minimum(result, total.max(axis=1))
        return np.asarray(np.ceil(np.clip(result, 0, FAR)).astype(np.int64))

    def smallest(self, row: Row) -> Ints:
        """[signatures]: the least capacity that would do, ties aside; FAR without options."""
        memory = self.memory(row)
        result = np.full(self.found.num, FAR)
        for peak in np.unique(self.transient[self.allowed]).tolist():
            keep = self.allowed & (self.transient <= peak)
            least = np.where(keep, memory, FAR).min(axis=1)
            possible = ~((self.counts > 0) & (least >= FAR)).any(axis=1)
            needed = self.counts @ np.where(least >= FAR, 0, least) + peak
            result = np.minimum(result, np.where(possible, needed, FAR))
        return result


def _least(value: Floats, keep: Bools) -> Floats:
    """[multipliers, classes] from [multipliers, classes, options]."""
    return np.asarray(np.where(keep, value, np.inf).min(axis=2))


def _minus(a: Floats, b: Floats) -> Floats:
    return np.where(np.isinf(a), 0.0, a - np.where(np.isinf(b), 0.0, b))


def quick_bound_ns(problem: PipelineProblem) -> int:
    """No plan of the family is faster, whatever its stages; cheap, so that most families end here.

    Every layer takes its fastest option, and the slowest group at least an equal share of the sum.
    """
    objective = Objective.of(problem.family)
    times = fastest_ns(problem)
    total = int(times.sum())
    slowest = max(-(-total // problem.family.pp), int(times.max()))
    return objective.total_ns(objective.value(total, slowest))


def fastest_ns(problem: PipelineProblem) -> Ints:
    """[layers]: the fastest allowed option of each, alone."""
    fastest = np.where(problem.costs.allowed, layer_ns(problem), FAR).min(axis=1)
    return np.asarray(fastest[list(problem.layers)])
