"""What the measured runs of one emulated cluster say about its predictions."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import Any

from rich.table import Table
from scipy.stats import spearmanr


@dataclass(frozen=True)
class Row:
    """One plan, predicted and measured. chosen: by the search.

    measured_ms: median over repetitions of the slowest rank's time of step, AdamW and zero_grad;
    low_ms, high_ms: quartiles. The bytes are of the rank that holds most.
    """

    name: str
    chosen: bool
    predicted_ms: float
    closed_form_ms: float
    measured_ms: float
    low_ms: float
    high_ms: float
    predicted_bytes: int
    measured_bytes: int

    @property
    def ratio(self) -> float:
        return self.predicted_ms / self.measured_ms

    @property
    def memory_ratio(self) -> float:
        return self.predicted_bytes / self.measured_bytes


@dataclass(frozen=True)
class Summary:
    """Of all plans at one link speed.

    regret: how much slower the chosen plan is than the fastest measured one, 0.02 for 2 %.
    ahead_of: kind of pure parallelism -> the best such plan's time over the chosen plan's.
    loss_difference: the largest relative difference between the plans' losses at any step, which
        tells that all train the same.
    """

    num_plans: int
    median_error: float
    largest_error: float
    bias: float
    rank_correlation: float
    regret: float
    ahead_of: dict[str, float]
    fastest: str
    chosen: str
    median_memory_error: float
    largest_memory_error: float
    loss_difference: float


def row(result: dict[str, Any], link: dict[str, Any]) -> Row:
    """result: of one plan, as emulated.worker.Bench writes it for each link."""
    steps = [rank["step_ms"] for rank in result["ranks"]]
    slowest = [max(times) for times in zip(*steps, strict=True)]
    low, middle, high = statistics.quantiles(slowest, n=4)
    predicted = result["predicted"]
    peaks = [group["peak_bytes"] for group in predicted["simulated"]["groups"]]
    return Row(
        name=result["name"],
        chosen=result["name"] == link["chosen"],
        predicted_ms=predicted["simulated_ms"],
        closed_form_ms=predicted["step_ms"],
        measured_ms=middle,
        low_ms=low,
        high_ms=high,
        predicted_bytes=max(peaks) - link["reserve_bytes"],
        measured_bytes=max(rank["peak_bytes"] for rank in result["ranks"]),
    )


def summarise(
    rows: list[Row], pure: dict[str, tuple[str, ...]], losses: dict[str, list[float]]
) -> Summary:
    """pure: kind of parallelism -> names of the rows that use nothing else."""
    by_name = {found.name: found for found in rows}
    chosen = next(found for found in rows if found.chosen)
    fastest = min(rows, key=lambda found: found.measured_ms)
    errors = [abs(found.ratio - 1) for found in rows]
    memory = [abs(found.memory_ratio - 1) for found in rows]
    best = {
        kind: min(by_name[name].measured_ms for name in names) / chosen.measured_ms
        for kind, names in pure.items()
        if all(name in by_name for name in names)
    }
    correlation = spearmanr(
        [found.predicted_ms for found in rows], [found.measured_ms for found in rows]
    ).statistic
    return Summary(
        num_plans=len(rows),
        median_error=statistics.median(errors),
        largest_error=max(errors),
        bias=statistics.median(found.ratio for found in rows) - 1,
        rank_correlation=float(correlation),
        regret=chosen.measured_ms / fastest.measured_ms - 1,
        ahead_of=best,
        fastest=fastest.name,
        chosen=chosen.name,
        median_memory_error=statistics.median(memory),
        largest_memory_error=max(memory),
        loss_difference=_spread(losses),
    )


def _spread(losses: dict[str, list[float]]) -> float:
    """Steps that all plans have made, each plan's loss against the first plan's."""
    first, *others = losses.values()
    pairs = [pair for other in others for pair in zip(first, other, strict=False)]
    return max((abs(a - b) / abs(a) for a, b in pairs), default=0.0)


def table(title: str, rows: list[Row]) -> Table:
    result = Table(title=title, title_justify="left")
    result.add_column("plan", overflow="fold")
    headings = ["predicted ms", "measured ms", "middle half", "ratio"]
    headings += ["predicted MiB", "measured MiB", "ratio"]
    for heading in headings:
        result.add_column(heading, justify="right")
    for found in sorted(rows, key=lambda found: found.measured_ms):
        result.add_row(
            f"{found.name}  (chosen)" if found.chosen else found.name,
            f"{found.predicted_ms:.0f}",
            f"{found.measured_ms:.0f}",
            f"{found.low_ms:.0f} to {found.high_ms:.0f}",
            f"{found.ratio:.2f}",
            f"{found.predicted_bytes / 2**20:.1f}",
            f"{found.measured_bytes / 2**20:.1f}",
            f"{found.memory_ratio:.2f}",
        )
    return result


def describe(summary: Summary) -> str:
    ahead = ", ".join(f"{kind} {ratio:.2f}" for kind, ratio in summary.ahead_of.items())
    return "\n".join(
        [
            f"step time of {summary.num_plans} plans: median error {summary.median_error:.1%}, "
            f"largest {summary.largest_error:.1%}, bias {summary.bias:+.1%}, rank correlation "
            f"{summary.rank_correlation:.3f}",
            f"chosen: {summary.chosen}; {summary.regret:.1%} slower than the fastest measured "
            f"({summary.fastest})",
            f"time of pure plans over the chosen one's: {ahead}",
            f"memory: median error {summary.median_memory_error:.1%}, largest "
            f"{summary.largest_memory_error:.1%}; losses differ by at most "
            f"{summary.loss_difference:.1e} of themselves",
        ]
    )
