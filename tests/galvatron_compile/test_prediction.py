"""Reading ``Plan.predicted``: nothing is taken for granted, nothing is made up."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import example_plans
import pytest

from galvatron_compile.plans import Plan
from galvatron_compile.prediction import Prediction

PLAN = example_plans.planned(30, 4, 16)


def predicting(plan: Plan = PLAN, **changed: Any) -> Prediction:
    return Prediction.of(replace(plan, predicted={**plan.predicted, **changed}))


def test_a_whole_prediction_is_read() -> None:
    found = Prediction.of(PLAN)
    assert found.step_ms == PLAN.predicted["step_ms"]
    assert sum(found.causes.values()) == pytest.approx(found.step_ms)
    assert [group.memory_bytes for group in found.groups] == [
        group["memory_bytes"] for group in PLAN.predicted["groups"]
    ]
    assert found.groups[0].in_flight == (4,)
    assert len(found.layers) == 32
    assert found.rejected[0][0] == "pp=1"


def test_nothing_predicted_is_nothing_known() -> None:
    found = Prediction.of(example_plans.bare())
    assert found.step_ms is found.mfu is found.memory_bytes is None
    assert found.causes == {} and found.groups == () and found.layers == ()


@pytest.mark.parametrize("value", [None, "1", True, [1], float("nan"), float("inf")])
def test_what_is_no_number_is_not_known(value: Any) -> None:
    assert predicting(step_ms=value).step_ms is None


def test_groups_and_layers_of_another_number_are_left_out() -> None:
    assert predicting(groups=PLAN.predicted["groups"][:3]).groups == ()
    assert predicting(layers=PLAN.predicted["layers"][:3]).layers == ()


def test_memory_that_no_part_explains_is_a_part() -> None:
    groups = [{"saved_bytes": 600, "memory_bytes": 1000}] * 4
    found = predicting(groups=groups).groups[0]
    assert found.parts == {"saved_bytes": 600, "other_bytes": 400}


def test_memory_is_the_sum_of_its_parts_if_not_said() -> None:
    found = predicting(groups=[{"saved_bytes": 600, "reserve_bytes": 50}] * 4, memory_bytes=None)
    assert found.groups[0].memory_bytes == found.memory_bytes == 650


def test_states_are_not_counted_twice() -> None:
    entry = {"state_bytes": 30, "parameter_bytes": 10, "gradient_bytes": 20, "memory_bytes": 30}
    assert sum(predicting(groups=[entry] * 4).groups[0].parts.values()) == 30


def test_a_plan_of_one_stage_is_its_own_group() -> None:
    plan = example_plans.of_one_stage()
    found = Prediction.of(plan)
    (group,) = found.groups
    assert group.memory_bytes == plan.predicted["memory_bytes"]
    assert sum(group.parts.values()) == group.memory_bytes
    assert found.causes["compute_ms"] == plan.predicted["compute_ms"]
    assert "other_ms" not in found.causes


def test_sources_may_have_names() -> None:
    assert predicting(sources={"matmul": "measured"}).sources == ("matmul: measured",)
    assert predicting(sources="data sheet").sources == ("data sheet",)


def test_tradeoff_is_in_order_of_memory() -> None:
    points = [
        {"memory_bytes": 3, "step_ms": 1.0},
        {"memory_bytes": 2, "step_ms": 2},
        {"step_ms": 1},
    ]
    assert [point.memory_bytes for point in predicting(tradeoff=points).tradeoff] == [2, 3]
