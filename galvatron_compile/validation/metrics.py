"""How good predictions are: errors, ranks, and what trusting the predicted best costs.

An average error says little: one constant utilisation fitted to a whole table scores well. What a
planner is for is telling the ways of running one workload apart, so ranks and regret are counted
within workloads.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from galvatron_compile.validation.run import Prediction, Run, Workload

LEAST_RANKED = 3
"""Runs that a workload needs for a rank correlation; with two it is 1 or -1 by a coin's toss."""

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Pair:
    """A run with what was predicted for it."""

    run: Run
    predicted: Prediction

    @property
    def error(self) -> float:
        """Relative error of the step time: 0.1 where the prediction is a tenth too slow."""
        return self.predicted.step_ms / self.run.step_ms - 1

    @property
    def memory_error(self) -> float | None:
        """Relative error of the memory, None unless it is both measured and predicted."""
        if self.run.memory_bytes is None or self.predicted.memory_bytes is None:
            return None
        return self.predicted.memory_bytes / self.run.memory_bytes - 1


@dataclass(frozen=True)
class Errors:
    """Of relative errors e: mean and median of abs(e), bias = mean of e, worst = largest abs(e)."""

    number: int
    mean: float
    median: float
    bias: float
    worst: float

    @staticmethod
    def of(errors: Sequence[float]) -> Errors | None:
        if not errors:
            return None
        values = np.asarray(errors, dtype=float)
        sizes = np.abs(values)
        return Errors(
            len(errors), float(sizes.mean()), float(np.median(sizes)), float(values.mean()),
            float(sizes.max()),
        )  # fmt: skip


@dataclass(frozen=True)
class Spread:
    """Of one number per workload."""

    number: int
    mean: float
    median: float
    least: float
    most: float

    @staticmethod
    def of(found: Sequence[float]) -> Spread | None:
        if not found:
            return None
        values = np.asarray(found, dtype=float)
        return Spread(
            len(found), float(values.mean()), float(np.median(values)), float(values.min()),
            float(values.max()),
        )  # fmt: skip


@dataclass(frozen=True)
class Metrics:
    """rank: Spearman's correlation per workload of at least LEAST_RANKED runs.

    regret: per workload of at least 2 runs, how much slower the run predicted best was than the
    best, as a share. None where there is nothing to count.
    """

    time: Errors | None
    memory: Errors | None
    rank: Spread | None
    regret: Spread | None

    @staticmethod
    def of(pairs: Sequence[Pair]) -> Metrics:
        groups = by_workload(pairs)
        large = [group for group in groups.values() if len(group) >= LEAST_RANKED]
        return Metrics(
            Errors.of([pair.error for pair in pairs]),
            Errors.of([e for pair in pairs if (e := pair.memory_error) is not None]),
            Spread.of([rank for group in large if (rank := rank_of(group)) is not None]),
            Spread.of([regret(group) for group in groups.values() if len(group) >= 2]),
        )


def by_workload(pairs: Sequence[Pair]) -> dict[Workload, list[Pair]]:
    found: dict[Workload, list[Pair]] = defaultdict(list)
    for pair in pairs:
        found[pair.run.workload].append(pair)
    return dict(found)


def rank_of(group: Sequence[Pair]) -> float | None:
    """Predicted against measured; 0 if all runs are predicted alike, None if all are alike."""
    measured = [pair.run.step_ms for pair in group]
    if len(set(measured)) == 1:
        return None
    return spearman([pair.predicted.step_ms for pair in group], measured) or 0.0


def regret(group: Sequence[Pair]) -> float:
    """Measured time of the run predicted fastest over that of the fastest, minus 1.

    Of runs predicted equally fast the slowest counts: nothing would keep a user from it.
    """
    fastest = min(pair.predicted.step_ms for pair in group)
    chosen = max(pair.run.step_ms for pair in group if pair.predicted.step_ms == fastest)
    return chosen / min(pair.run.step_ms for pair in group) - 1


def spearman(a: ArrayLike, b: ArrayLike) -> float | None:
    """Correlation of the ranks, equal values sharing their mean rank; None if all are equal."""
    first, second = ranks(a), ranks(b)
    if np.ptp(first) == 0 or np.ptp(second) == 0:
        return None
    return float(np.corrcoef(first, second)[0, 1])


def ranks(values: ArrayLike) -> Floats:
    """Ranks from 1 on, equal values with the mean of theirs."""
    array = np.asarray(values, dtype=float)
    _, inverse, counts = np.unique(array, return_inverse=True, return_counts=True)
    last = np.cumsum(counts).astype(float)
    found: Floats = (last - (counts - 1) / 2)[inverse]
    return found
