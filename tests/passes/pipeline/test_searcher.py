"""The pipeline search against trying everything, and what its outcome promises."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
from pipeline_instances import all_plans, medium_problem, small_problem

from galvatron_compile.errors import PlanError
from galvatron_compile.passes.pipeline.closed_form import evaluate
from galvatron_compile.passes.pipeline.family import Bounded, Infeasible, Solution
from galvatron_compile.passes.pipeline.problem import Family, PipelineProblem, StageCosts
from galvatron_compile.passes.pipeline.searcher import Outcome, search
from galvatron_compile.strategy import Strategy

NUM_BLOCKS, PER_BLOCK = 10, 50


def settled(problem: PipelineProblem) -> Solution | Infeasible:
    outcome = search([problem])
    assert not outcome.bounded
    [verdict] = [*outcome.solved, *outcome.infeasible]
    return verdict


@pytest.mark.parametrize("block", range(NUM_BLOCKS))
def test_equal_to_trying_everything(block: int) -> None:
    for seed in range(block * PER_BLOCK, (block + 1) * PER_BLOCK):
        problem = small_problem(seed)
        truth, verdict = all_plans(problem), settled(problem)
        if truth.total_ns is None:
            assert isinstance(verdict, Infeasible), seed
            assert verdict.smallest_bytes == truth.smallest_bytes, seed
            continue
        assert isinstance(verdict, Solution), (seed, verdict)
        assert verdict.total_ns == truth.total_ns, seed
        price = evaluate(problem, verdict.boundaries, verdict.options)
        assert price == (verdict.total_ns, verdict.group_ns, verdict.group_bytes), seed
        assert max(verdict.group_bytes) <= problem.capacity_bytes, seed


def test_the_instances_are_of_every_kind() -> None:
    """The test above means little if its instances are all alike."""
    problems = [small_problem(seed) for seed in range(NUM_BLOCKS * PER_BLOCK)]
    schedules = Counter(problem.family.schedule for problem in problems)
    assert min(schedules.values()) > 50 and len(schedules) == 4
    solutions = [v for v in map(settled, problems) if isinstance(v, Solution)]
    assert 0.5 < len(solutions) / len(problems) < 0.95
    sizes = [np.diff(solution.boundaries) for solution in solutions]
    assert sum(len(set(size.tolist())) > 1 for size in sizes) > 50  # uneven stages
    assert sum(solution.num_changes > 0 for solution in solutions) > 50
    assert sum(bool(problem.tied) for problem in problems) > 100


def families(seed: int) -> list[PipelineProblem]:
    """Problems of one model in different families, which compete with each other."""
    base = small_problem(seed)
    found = []
    for other in range(40):
        family = small_problem(1000 + other).family
        if family.num_stages <= len(base.layers):
            found.append(dataclasses.replace(base, family=family))
    return found


@pytest.mark.parametrize("seed", range(12))
def test_the_best_of_many_families_come_first_and_bounds_exclude_the_rest(seed: int) -> None:
    problems = families(seed)
    alone = {id(problem): settled(problem) for problem in problems}
    times = sorted(v.total_ns for v in alone.values() if isinstance(v, Solution))
    for top in (1, 3, 100):
        outcome = search(problems, top)
        number = len(outcome.solved) + len(outcome.bounded) + len(outcome.infeasible)
        assert number == len(problems)
        assert [s.total_ns for s in outcome.solved[:top]] == times[:top]
        for bounded in outcome.bounded:
            verdict = alone[id(bounded.problem)]
            assert len(times) >= top and bounded.lower_bound_ns >= times[top - 1]
            if isinstance(verdict, Solution):
                assert bounded.lower_bound_ns <= verdict.total_ns
        for infeasible in outcome.infeasible:
            assert infeasible == alone[id(infeasible.problem)]
    assert isinstance(search(problems, 100), Outcome) and not search(problems, 100).bounded


def test_ties_go_to_fewer_stages() -> None:
    """Free communication and as many micro-batches as one could wish: only the bubble differs."""
    zeros = np.zeros((1, 1), dtype=np.int64)
    costs = StageCosts((Strategy(),), zeros == 0, *[zeros] * 7, zeros[0], {})
    layers = (0,) * 8
    problems = [PipelineProblem(Family(pp, 8, "1f1b"), layers, costs, (), 0) for pp in (4, 2, 1, 8)]
    outcome = search(problems, top=4)
    assert [solution.problem.family.pp for solution in outcome.solved] == [1, 2, 4, 8]
    assert search(problems).solved[0].problem.family.pp == 1


def test_ties_go_to_fewer_changes() -> None:
    """Two classes that cannot share an option, and two that can; all costs are zero."""
    zeros = np.zeros((2, 2), dtype=np.int64)
    two, layout = (Strategy(), Strategy(dp=2)), np.zeros(2, dtype=np.int64)
    apart = StageCosts(two, np.eye(2, dtype=np.bool_), *[zeros] * 7, layout, {})
    alike = dataclasses.replace(apart, allowed=np.ones((2, 2), dtype=np.bool_))
    changing, steady = (
        PipelineProblem(Family(1, 1, "1f1b"), (0, 1), costs, (), 0) for costs in (apart, alike)
    )
    for given in ([changing, steady], [steady, changing]):
        best = search(given).best
        assert best is not None and best.problem is steady and best.num_changes == 0


def test_infeasible_families_say_why() -> None:
    problem = small_problem(3)
    none = dataclasses.replace(problem.costs, allowed=np.zeros_like(problem.costs.allowed))
    [verdict] = search([dataclasses.replace(problem, costs=none)]).infeasible
    assert verdict.smallest_bytes is None
    assert "no option is allowed for layer class" in verdict.reason
    outcome = search([dataclasses.replace(problem, capacity_bytes=0)])
    [tight] = outcome.infeasible
    assert outcome.best is None and tight.smallest_bytes is not None
    assert tight.reason == f"needs {tight.smallest_bytes} bytes a rank, 0 are there"
    wide = dataclasses.replace(problem, capacity_bytes=tight.smallest_bytes)
    assert search([wide]).best is not None


def test_tied_layers_without_a_common_option_are_infeasible() -> None:
    zeros = np.zeros((2, 2), dtype=np.int64)
    allowed = np.eye(2, dtype=np.bool_)
    two = (Strategy(), Strategy(dp=2))
    costs = StageCosts(two, allowed, *[zeros] * 7, np.zeros(2, dtype=np.int64), {})
    problem = PipelineProblem(Family(1, 1, "1f1b"), (0, 1), costs, ((0, 1),), 0)
    [verdict] = search([problem]).infeasible
    assert verdict.reason == "tied layers have no option in common"
    apart = dataclasses.replace(problem, family=Family(2, 2, "1f1b"))
    assert search([apart]).best is not None


@pytest.mark.parametrize("num_layers", [100, 1000])
@pytest.mark.parametrize("pp", [1, 32])
def test_work_does_not_grow_with_depth(
    num_layers: int, pp: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counted in knapsacks, not in seconds: as many for 1,000 layers as for 100, within a few."""
    from galvatron_compile.passes.pipeline import stage

    calls = 0
    fill = stage.fill

    def counted(*args: object, **kwargs: object) -> object:
        nonlocal calls
        calls += 1
        return fill(*args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(stage, "fill", counted)
    family = Family(pp, 64, "zero-bubble" if pp > 1 else "1f1b")
    deep = medium_problem(1, family, "dense", 5.0, num_layers)
    assert search([deep]).best is not None
    assert 0 < calls < 400


def test_needs_neither_torch_nor_scipy() -> None:
    code = (
        "import sys, galvatron_compile.passes.pipeline.searcher, "
        "galvatron_compile.passes.pipeline.certify; "
        "assert not {'torch', 'scipy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_top_must_be_positive() -> None:
    with pytest.raises(PlanError, match="top must be at least 1, got 0"):
        search([small_problem(0)], 0)


def test_bounds_are_verdicts_too() -> None:
    slow, fast = small_problem(1), small_problem(1)
    costs = slow.costs
    slower = dataclasses.replace(costs, micro_ns=costs.micro_ns + 10**6)
    outcome = search([dataclasses.replace(slow, costs=slower), fast])
    if outcome.best is not None:
        [bounded] = outcome.bounded
        assert isinstance(bounded, Bounded) and bounded.problem.costs is slower
