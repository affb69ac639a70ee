"""What a search found and what it turned down."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from galvatron_compile.costs import CostTable
from galvatron_compile.plans import Plan
from galvatron_compile.runnable import NOT_RUN
from galvatron_compile.strategy import Strategy
from galvatron_compile.text import columns, mib, ms


@dataclass(frozen=True)
class Candidate:
    """A strategy for all layers, in its best number of micro-batches.

    plan: None if some layer cannot run with the strategy; ``verdict`` then says which and why.
    fits: whether its memory is within the limit. verdict: why it is not the best plan.
    """

    strategy: Strategy
    plan: Plan | None
    fits: bool
    verdict: str

    @property
    def predicted(self) -> Mapping[str, Any]:
        return self.plan.predicted if self.plan else {}


@dataclass(frozen=True)
class SearchReport:
    """The best plan and what the strategies would do if all layers used them.

    candidates: those that fit, fastest first; then those too large, smallest first; then those
    that some layer cannot run. ``num_left_out`` more were considered and are not listed.
    costs: what every layer class costs under every strategy; print it to see why.
    """

    best: Plan
    memory_limit_bytes: int
    candidates: tuple[Candidate, ...]
    costs: CostTable = field(repr=False, compare=False)
    num_left_out: int = 0

    def __str__(self) -> str:
        best, count = self.best.predicted, str(self.best.num_micro_batches)
        numbers = [ms(best["step_ms"]), mib(best["memory_bytes"])]
        rows = [["best plan", count, *numbers, "yes", "the optimum over all assignments"]]
        rows += [_row(candidate) for candidate in self.candidates]
        header = ["strategy", "micro-batches", "step ms", "MiB", "fits", "verdict"]
        # The verdict is prose: flush left behind columns of numbers.
        table = columns(header[:-1], [row[:-1] for row in rows]).split("\n")
        width = max(map(len, table))
        verdicts = [header[-1], *(row[-1] for row in rows)]
        lines = [
            f"{line.ljust(width)}  {verdict}".rstrip()
            for line, verdict in zip(table, verdicts, strict=True)
        ]
        title = f"candidate strategies (memory limit {mib(self.memory_limit_bytes)} MiB a rank)"
        more = [f"… and {self.num_left_out} more"] if self.num_left_out else []
        about = [f"best plan: {sources(self.best)}", f"not searched: {NOT_RUN}"]
        return "\n".join([title, "", *lines, *more, "", *about])


def sources(plan: Plan) -> str:
    """Where a priced plan's times of computation come from, as a person reads it."""
    counts = plan.predicted["sources"]
    return (
        f"computation of {counts['measured']} layers timed on this device, of "
        f"{counts['analytic']} estimated from operations and bytes"
    )


def _row(candidate: Candidate) -> list[str]:
    name = str(candidate.strategy)
    if candidate.plan is None:
        return [name, "-", "-", "-", "-", candidate.verdict]
    predicted = candidate.plan.predicted
    numbers = [ms(predicted["step_ms"]), mib(predicted["memory_bytes"])]
    fits = "yes" if candidate.fits else "no"
    return [name, str(candidate.plan.num_micro_batches), *numbers, fits, candidate.verdict]
