"""What a search found and what it turned down."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
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

    @property
    def is_simulated(self) -> bool:
        return "simulated_ms" in self.predicted

    def judged(self, best: Plan) -> Candidate:
        """With a verdict by simulation, where there is one; else it says that it is not."""
        if self.plan is None:
            return self
        if not self.is_simulated:
            slower = " slower, not simulated, in the closed form:"
            return replace(self, verdict=self.verdict.replace(" slower:", slower))
        if self.plan == best:
            return replace(self, verdict="is the best plan")
        reason = self.verdict.partition(": ")[2]
        text = behind(self.plan, best) + (f"; closed form: {reason}" if reason else "")
        return replace(self, verdict=text)


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
    pipelines: tuple[Plan, ...] = ()

    def ranked(
        self, simulated: Callable[[Plan], Plan], pipelines: Sequence[Plan], few: int = 6
    ) -> SearchReport:
        """The best few of the closed form in the order in which the simulator sees them.

        simulated: gives a plan with ``simulated_ms``; pipelines have it already.
        """
        best = simulated(self.best)
        candidates = [
            replace(candidate, plan=simulated(candidate.plan))
            if place < few and candidate.plan is not None and candidate.fits
            else candidate
            for place, candidate in enumerate(self.candidates)
        ]
        uniform = [c.plan for c in candidates if c.plan is not None and c.is_simulated]
        staged = tuple(sorted(pipelines, key=step_ms))
        best = min([best, *uniform, *staged], key=step_ms)  # ties go to the closed form's best
        candidates.sort(key=_simulated_first)
        judged = tuple(candidate.judged(best) for candidate in candidates)
        return replace(self, best=best, candidates=judged, pipelines=staged)

    @staticmethod
    def of_pipelines(
        costs: CostTable, memory_limit_bytes: int, pipelines: Sequence[Plan]
    ) -> SearchReport:
        """Where no plan of one stage fits in memory."""
        ranked = tuple(sorted(pipelines, key=step_ms))
        return SearchReport(ranked[0], memory_limit_bytes, (), costs, 0, ranked)

    def __str__(self) -> str:
        known = "simulated_ms" in self.best.predicted
        why = "the fastest in simulation" if known else "the optimum over all assignments"
        name = f"best plan ({_pipeline_name(self.best)})" if self.best.pp > 1 else "best plan"
        rows = [[name, *_numbers(self.best), "yes", why]]
        rows += [_pipeline_row(plan, self.best) for plan in self.pipelines if plan != self.best]
        rows += [_row(candidate) for candidate in self.candidates]
        header = ["strategy", "micro-batches", "simulated ms", "closed form ms", "MiB"]
        header += ["fits", "verdict"]
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


def _simulated_first(candidate: Candidate) -> tuple[bool, float]:
    """Those behind keep their order."""
    if candidate.plan is None or not candidate.is_simulated:
        return True, 0.0
    return False, step_ms(candidate.plan)


def step_ms(plan: Plan) -> float:
    """Of a step as it was simulated, or else by the closed form."""
    predicted = plan.predicted
    return float(predicted.get("simulated_ms", predicted["step_ms"]))


def behind(plan: Plan, best: Plan) -> str:
    """By how much a plan is slower than the best, both simulated."""
    return f"{100 * (step_ms(plan) / step_ms(best) - 1):.1f} % slower in simulation"


def _numbers(plan: Plan) -> list[str]:
    predicted = plan.predicted
    simulated = ms(predicted["simulated_ms"]) if "simulated_ms" in predicted else "-"
    closed, memory = ms(predicted["step_ms"]), mib(predicted["memory_bytes"])
    return [str(plan.num_micro_batches), simulated, closed, memory]


def _pipeline_row(plan: Plan, best: Plan) -> list[str]:
    return [_pipeline_name(plan), *_numbers(plan), "yes", behind(plan, best)]


def _pipeline_name(plan: Plan) -> str:
    """A plan of several stages in brief: its stages, and what most of its layers use."""
    usual = Counter(plan.strategies).most_common(1)[0][0]
    mixed = "" if len(set(plan.strategies)) == 1 else ", mixed"
    return f"pp{plan.pp} {plan.schedule}, {usual}{mixed}"


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
        return [name, "-", "-", "-", "-", "-", candidate.verdict]
    fits = "yes" if candidate.fits else "no"
    return [name, *_numbers(candidate.plan), fits, candidate.verdict]
