"""The report of a validation: one line per source and over all, outliers and failures named."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from galvatron_compile.errors import GalvatronError
from galvatron_compile.text import columns
from galvatron_compile.validation.metrics import LEAST_RANKED, Errors, Metrics, Pair
from galvatron_compile.validation.outliers import Outlier, outliers
from galvatron_compile.validation.run import Prediction, Run

Predict = Callable[[Run], Prediction]
ALL, WITHOUT, CALIBRATION = "all", "all without outliers", "calibration rows (not in all)"
_WORST = 5


@dataclass(frozen=True)
class Report:
    """metrics: by line of the report, in order: every source, then over all.

    pairs: of the rows reported. calibration: of rows that constants were calibrated on, which
    say nothing about how good a prediction is. failures: rows without a prediction, with why.
    """

    pairs: tuple[Pair, ...]
    calibration: tuple[Pair, ...]
    metrics: Mapping[str, Metrics]
    outliers: tuple[Outlier, ...]
    failures: tuple[tuple[int, str], ...]

    def to_dict(self) -> dict[str, Any]:
        """JSON-able; times in ms, memory in bytes, errors as shares."""
        return {
            "metrics": {name: asdict(metrics) for name, metrics in self.metrics.items()},
            "outliers": [asdict(outlier) for outlier in self.outliers],
            "failures": [{"row": row, "why": why} for row, why in self.failures],
            "runs": [
                _as_dict(pair, counted)
                for pairs, counted in ((self.pairs, True), (self.calibration, False))
                for pair in pairs
            ],
        }

    def __str__(self) -> str:
        error_header = (
            "time and memory", "runs", "median", "mean", "bias", "worst",
            "with memory", "median", "mean", "bias",
        )  # fmt: skip
        rank_header = (
            "within workloads", "ranked", "mean", "median", "least",
            "compared", "mean regret", "most",
        )  # fmt: skip
        items = self.metrics.items()
        lines = [
            columns(error_header, [_error_line(*item) for item in items]),
            "errors are predicted / measured - 1, their sizes but for the bias\n",
            columns(rank_header, [_rank_line(*item) for item in items]),
            f"Spearman's rank correlation of workloads with at least {LEAST_RANKED} runs, and the "
            "measured time lost by running\nwhat is predicted best, of workloads with at least 2",
        ]
        worst = sorted(self.pairs, key=lambda pair: -abs(pair.error))[:_WORST]
        lines.append("\nfarthest off")
        lines += [f"  row {p.run.row}: {p.error:+.1%}  {p.run}" for p in worst]
        lines.append(f"\noutliers by what was measured: {len(self.outliers) or 'none'}")
        lines += [f"  row {outlier.row}: {outlier.why}" for outlier in self.outliers]
        if self.failures:
            lines.append(f"\nnot predicted: {len(self.failures)}")
            lines += [f"  row {row}: {why}" for row, why in self.failures]
        return "\n".join(lines)


def report(
    runs: Sequence[Run], predict: Predict, calibrated_on: Callable[[Run], bool] | None = None
) -> Report:
    """Predict every run and measure how good that is.

    calibrated_on: tells the runs that constants of ``predict`` were calibrated on; they are
        reported apart. A run that ``predict`` refuses with a GalvatronError is listed with why.
    """
    counted: list[Pair] = []
    calibration: list[Pair] = []
    failures = []
    for run in runs:
        try:
            pair = Pair(run, predict(run))
        except GalvatronError as error:
            failures.append((run.row, str(error)))
            continue
        known = calibrated_on is not None and calibrated_on(run)
        (calibration if known else counted).append(pair)
    odd = outliers(runs)
    return Report(
        tuple(counted), tuple(calibration), _metrics(counted, calibration, odd), odd,
        tuple(failures),
    )  # fmt: skip


def _metrics(
    counted: Sequence[Pair], calibration: Sequence[Pair], odd: Sequence[Outlier]
) -> dict[str, Metrics]:
    sources = dict.fromkeys(pair.run.source for pair in counted)
    found = {
        source: Metrics.of([pair for pair in counted if pair.run.source == source])
        for source in sources
    }
    found[ALL] = Metrics.of(counted)
    rows = {outlier.row for outlier in odd}
    believed = [pair for pair in counted if pair.run.row not in rows]
    if len(believed) < len(counted):
        found[WITHOUT] = Metrics.of(believed)
    if calibration:
        found[CALIBRATION] = Metrics.of(calibration)
    return found


def _error_line(name: str, metrics: Metrics) -> tuple[str, ...]:
    time, memory = metrics.time, metrics.memory
    return (
        name,
        str(time.number if time else 0), *_errors(time), f"{time.worst:.1%}" if time else "-",
        str(memory.number if memory else 0), *_errors(memory),
    )  # fmt: skip


def _rank_line(name: str, metrics: Metrics) -> tuple[str, ...]:
    rank, regret = metrics.rank, metrics.regret
    numbers = ("-",) * 3 if rank is None else (rank.mean, rank.median, rank.least)
    losses = ("-",) * 2 if regret is None else (regret.mean, regret.most)
    return (
        name,
        str(rank.number if rank else 0),
        *(n if isinstance(n, str) else f"{n:.3f}" for n in numbers),
        str(regret.number if regret else 0),
        *(n if isinstance(n, str) else f"{n:.1%}" for n in losses),
    )


def _errors(errors: Errors | None) -> tuple[str, str, str]:
    if errors is None:
        return "-", "-", "-"
    return f"{errors.median:.1%}", f"{errors.mean:.1%}", f"{errors.bias:+.1%}"


def _as_dict(pair: Pair, counted: bool) -> dict[str, Any]:
    return {
        "row": pair.run.row,
        "source": pair.run.source,
        "counted": counted,
        "measured_ms": pair.run.step_ms,
        "predicted_ms": pair.predicted.step_ms,
        "measured_memory_bytes": pair.run.memory_bytes,
        "predicted_memory_bytes": pair.predicted.memory_bytes,
    }
