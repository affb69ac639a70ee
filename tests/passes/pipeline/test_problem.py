"""A problem refuses what does not fit together, and says what."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
from pipeline_instances import small_problem

from galvatron_compile.errors import PlanError
from galvatron_compile.passes.pipeline.problem import Family

PROBLEM = small_problem(0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"capacity_bytes": -1}, "capacity_bytes must not be negative"),
        ({"layers": (99, *PROBLEM.layers)}, "layers must name classes 0 to"),
        ({"tied": ((0, 99),)}, r"tied layers \(0, 99\) must lie in 0 to"),
        ({"family": Family(64, 64, "1f1b")}, "cannot split . layers into 64 stages; lower pp"),
    ],
)
def test_wrong_problems(change: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        dataclasses.replace(PROBLEM, **change)


def test_wrong_costs() -> None:
    costs = PROBLEM.costs
    shape = costs.micro_ns.shape
    for name, numbers, message in [
        ("micro_ns", np.zeros(shape), "micro_ns must be int64 of shape"),
        ("step_ns", np.zeros((9, 9), dtype=np.int64), "step_ns must be int64 of shape"),
        ("saved_bytes", np.full(shape, -1, dtype=np.int64), "saved_bytes must lie between 0"),
        ("layout", np.zeros(99, dtype=np.int64), "layout must be int64 of shape"),
        ("allowed", np.ones((2, 99), dtype=np.bool_), "allowed must be"),
    ]:
        with pytest.raises(PlanError, match=message):
            dataclasses.replace(costs, **{name: numbers})
    square = np.ones((costs.num_layouts, costs.num_layouts), dtype=np.int64)
    with pytest.raises(PlanError, match="must be 0 between equal layouts"):
        dataclasses.replace(costs, switch_ns={(0, 0): square})
    with pytest.raises(PlanError, match=r"switch_ns\[0, 9\] must name classes"):
        dataclasses.replace(costs, switch_ns={(0, 9): square * 0})


def test_sums_that_would_overflow() -> None:
    costs = PROBLEM.costs
    huge = dataclasses.replace(costs, micro_ns=np.full_like(costs.micro_ns, 1 << 51))
    with pytest.raises(PlanError, match="too large to add up over"):
        dataclasses.replace(PROBLEM, costs=huge)


def test_families_are_legal_schedules() -> None:
    with pytest.raises(PlanError, match="needs at least 4 micro-batches"):
        Family(4, 2, "1f1b")
    with pytest.raises(PlanError, match="schedule 'v' is not known"):
        Family(4, 8, "v")
    assert str(Family(4, 8, "interleaved", 2)) == (
        "pp 4, 8 micro-batches, interleaved, 2 stages a group"
    )
    assert Family(4, 8, "interleaved", 2).num_stages == 8
