"""The closed form, by hand."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from galvatron_compile.errors import PlanError
from galvatron_compile.passes.pipeline.closed_form import Objective, evaluate, even_boundaries
from galvatron_compile.passes.pipeline.problem import Family, PipelineProblem, StageCosts
from galvatron_compile.strategy import Strategy


def ints(*rows: list[int]) -> np.ndarray:
    return np.array(rows, dtype=np.int64)


COSTS = StageCosts(
    strategies=(Strategy(tp=2), Strategy(dp=2)),
    allowed=np.array([[True, True], [True, False]]),
    micro_ns=ints([100, 130], [40, 0]),
    step_ns=ints([30, 9], [50, 0]),
    state_bytes=ints([1000, 1500], [700, 0]),
    saved_bytes=ints([10, 7], [3, 0]),
    transient_bytes=ints([55, 66], [77, 0]),
    forward_send_ns=ints([5, 6], [7, 0]),
    backward_send_ns=ints([2, 3], [4, 0]),
    layout=np.array([0, 1], dtype=np.int64),
    switch_ns={(0, 0): ints([0, 11], [13, 0]), (0, 1): ints([0, 17], [19, 0])},
)


def problem(family: Family, layers: tuple[int, ...] = (0, 0, 0, 1)) -> PipelineProblem:
    return PipelineProblem(family, layers, COSTS, (), 10**6)


def test_one_stage_is_the_sum_of_its_layers() -> None:
    price = evaluate(problem(Family(1, 4, "1f1b")), [0, 4], [0, 1, 0, 0])
    micro = 100 + 130 + 100 + 40 + 11 + 13  # the last two layers share a layout
    assert price.total_ns == 4 * micro + 30 + 9 + 30 + 50
    assert price.group_ns == (price.total_ns,)
    held = 1000 + 1500 + 1000 + 700 + (10 + 7 + 10 + 3)
    assert price.group_bytes == (held + 77,)


def test_two_stages_of_1f1b() -> None:
    """m = 4, P = 2: gamma = 4/5; a cut switches for free and sends both ways."""
    price = evaluate(problem(Family(2, 4, "1f1b")), [0, 2, 4], [0, 1, 0, 0])
    first = 4 * (100 + 130 + 11 + 6) + 24 + 7  # 0.8 · 30, 0.8 · 9 = 7.2
    second = 4 * (100 + 40 + 2) + 24 + 40
    assert price.group_ns == (first, second)
    assert price.total_ns == -(-(first + second + 3 * first) // 4)
    assert price.group_bytes == (1000 + 1500 + 2 * 17 + 66, 1000 + 700 + 13 + 77)


def test_a_balanced_pipeline_pays_for_its_synchronisation_once() -> None:
    """Times of a layer alone: (m + phi (P - 1)) micro-batches and one step, for every schedule."""
    costs = dataclasses.replace(
        COSTS,
        step_ns=np.full_like(COSTS.step_ns, 48),
        forward_send_ns=np.zeros_like(COSTS.step_ns),
        backward_send_ns=np.zeros_like(COSTS.step_ns),
        switch_ns={},
    )
    for schedule, bubble in [("gpipe", 3.0), ("1f1b", 3.0), ("zero-bubble", 1.0)]:
        given = PipelineProblem(Family(4, 12, schedule), (0,) * 4, costs, (), 10**6)
        price = evaluate(given, [0, 1, 2, 3, 4], [0] * 4)
        assert price.total_ns == pytest.approx((12 + bubble) * 100 + 48, abs=1)
    given = PipelineProblem(Family(4, 12, "interleaved", 2), (0,) * 8, costs, (), 10**6)
    price = evaluate(given, range(9), [0] * 8)
    assert price.total_ns == pytest.approx((12 + 1.5) * 200 + 2 * 48, abs=1)


def test_interleaved_chunks_share_a_group() -> None:
    given = problem(Family(2, 2, "interleaved", 2))
    price = evaluate(given, [0, 1, 2, 3, 4], [0, 1, 0, 0])
    # phi = 1/2, m = 2, P = 2: gamma = 4/5. Group 0 runs layers 0 and 2, group 1 layers 1 and 3.
    assert price.group_ns[0] == 2 * (100 + 5 + 100 + 2 + 5) + 24 + 24
    assert price.group_ns[1] == 2 * (130 + 3 + 6 + 40 + 4) + 7 + 40
    # Group 0 holds 2 and 2 micro-batches at its peak, group 1 holds 2 and 1.
    assert price.group_bytes[0] == 2000 + 2 * 10 + 2 * 10 + 55
    assert price.group_bytes[1] == 2200 + 2 * 7 + 1 * 3 + 77
    assert price.total_ns == -(-(sum(price.group_ns) + 3 * max(price.group_ns)) // 4)


def test_objective_is_whole() -> None:
    objective = Objective.of(Family(4, 10, "zero-bubble"))
    assert (objective.sum_weight, objective.max_weight, objective.denominator) == (1, 29, 30)
    assert objective.total_ns(objective.value(400, 100)) == 110
    assert objective.total_ns(objective.value(400, 100) + 1) == 111  # rounded up


def test_even_boundaries() -> None:
    assert even_boundaries(8, 4) == (0, 2, 4, 6, 8)
    assert even_boundaries(10, 4) == (0, 2, 5, 7, 10)


@pytest.mark.parametrize(
    ("edges", "options", "message"),
    [
        ([0, 2, 2, 4], [0] * 4, "must rise from 0 to 4 over 2 stages"),
        ([0, 2, 3], [0] * 4, "must rise from 0 to 4"),
        ([0, 0, 4], [0] * 4, "must rise from 0 to 4"),
        ([0, 2, 4], [0, 0, 0, 1], "layer 3 cannot run with dp2"),
    ],
)
def test_what_cannot_be_priced_says_why(edges: list[int], options: list[int], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        evaluate(problem(Family(2, 4, "1f1b")), edges, options)
