"""What people use without a planner, priced under the same model, so that the answer never loses.

Each baseline is a family of uniform plans, of which the best that fits is taken: that is what a
person would find by trying them all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from galvatron_compile.passes.pipeline.closed_form import Evaluation, evaluate, even_boundaries
from galvatron_compile.passes.pipeline.problem import Family, PipelineProblem
from galvatron_compile.strategy import Strategy


@dataclass(frozen=True)
class Baseline:
    """name and what it means; ``takes(strategy, pp, schedule)``: whether a uniform plan is one."""

    name: str
    takes: Callable[[Strategy, int, str], bool]


def _only_data(strategy: Strategy) -> bool:
    return strategy.tp == strategy.ulysses == strategy.cp == strategy.ep == 1


BASELINES = (
    Baseline("DDP", lambda s, pp, schedule: pp == 1 and _only_data(s) and s.zero == 0),
    Baseline("FSDP (ZeRO-3)", lambda s, pp, schedule: pp == 1 and _only_data(s) and s.zero == 3),
    Baseline(
        "Megatron 3D (tp.sp × pp × dp, ZeRO-1, 1F1B)",
        lambda s, pp, schedule: (
            s.tp <= 8
            and s.sequence_parallel == (s.tp > 1)
            and s.ulysses == s.cp == s.ep == 1
            and s.zero == (1 if s.dp > 1 else 0)
            and schedule == "1f1b"
        ),
    ),
)


@dataclass(frozen=True)
class Priced:
    """A uniform plan of a problem: its option, stage boundaries, and price."""

    problem: PipelineProblem
    option: int
    boundaries: tuple[int, ...]
    evaluation: Evaluation

    @property
    def memory_bytes(self) -> int:
        return max(self.evaluation.group_bytes)

    @property
    def fits(self) -> bool:
        return self.memory_bytes <= self.problem.capacity_bytes


def uniform_plans(
    problem: PipelineProblem, wanted: Callable[[Strategy], bool]
) -> Iterator[tuple[Strategy, Priced]]:
    """Strategies that are wanted and that all layers can have, in stages of equally many layers."""
    costs, layers = problem.costs, problem.layers
    boundaries = even_boundaries(len(layers), problem.family.num_stages)
    if not problem.uncut.isdisjoint(boundaries):  # the caller keeps these layers together
        return
    for option, strategy in enumerate(costs.strategies):
        if wanted(strategy) and costs.allowed[list(set(layers)), option].all():
            found = evaluate(problem, boundaries, [option] * len(layers))
            yield strategy, Priced(problem, option, boundaries, found)


def price_baselines(
    problems: list[PipelineProblem],
) -> dict[str, tuple[Priced | None, Priced | None]]:
    """Name -> (the fastest that fits, the smallest if none fits)."""
    fastest: dict[str, Priced] = {}
    smallest: dict[str, Priced] = {}
    for problem in problems:
        family = problem.family
        for baseline in BASELINES:
            name = baseline.name

            def takes(strategy: Strategy, b: Baseline = baseline, f: Family = family) -> bool:
                return b.takes(strategy, f.pp, f.schedule)

            for _, priced in uniform_plans(problem, takes):
                best, least = fastest.get(name), smallest.get(name)
                if priced.fits:
                    if best is None or priced.evaluation.total_ns < best.evaluation.total_ns:
                        fastest[name] = priced
                elif least is None or priced.memory_bytes < least.memory_bytes:
                    smallest[name] = priced
    return {
        baseline.name: (
            fastest.get(baseline.name),
            None if baseline.name in fastest else smallest.get(baseline.name),
        )
        for baseline in BASELINES
    }
