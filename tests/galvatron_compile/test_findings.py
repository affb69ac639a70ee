"""How the best few are ranked, and what is said of it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast

import example_plans
import pytest
import torch

from galvatron_compile import findings, planning, work_json
from galvatron_compile.cluster import ClusterProfile
from galvatron_compile.findings import Candidate, behind_percent, over_bytes, ranked
from galvatron_compile.models import DecoderShape, Workable, load_shape
from galvatron_compile.plans import Plan

LIMIT = 1000 * 2**20


def candidate(
    step_ms: float, simulated_ms: float | None, peak: float = 0.5, name: str = ""
) -> Candidate:
    numbers: dict[str, Any] = {"step_ms": step_ms, "memory_limit_bytes": LIMIT}
    if simulated_ms is None:
        numbers["not_simulated"] = "too many"
    else:
        groups = [{"peak_bytes": 7}, {"peak_bytes": int(peak * LIMIT)}]
        numbers |= {"simulated_ms": simulated_ms, "simulated": {"groups": groups}}
    plan = replace(example_plans.bare(), predicted=numbers)
    return Candidate(cast(Any, None), plan, name)


def times(found: list[Candidate]) -> list[float]:
    return [one.plan.predicted["step_ms"] for one in found]


def test_the_simulator_ranks_what_the_closed_form_chose() -> None:
    found, text = ranked([candidate(10, 12), candidate(11, 11.5), candidate(12, 13)])
    assert times(found) == [11, 10, 12]
    assert text == (
        "ranked by simulation: the best 3 of the closed form, and the baselines; number 2 of the "
        "closed form is the best there"
    )
    found, text = ranked([candidate(10, 11), candidate(11, 11)])
    assert times(found) == [10, 11] and "number" not in text


def test_a_baseline_may_win() -> None:
    found, text = ranked([candidate(10, 12), candidate(11, 11.5, name="FSDP")])
    assert times(found) == [11, 10]
    assert text.endswith("and the baselines; the baseline FSDP is the best there")


def test_who_exceeds_the_limit_comes_last_and_is_said_to() -> None:
    found, text = ranked([candidate(10, 10, peak=1.01), candidate(11, 12, peak=1.0)])
    assert times(found) == [11, 10] and "exceed" not in text
    assert found[1].over_bytes == over_bytes(found[1].plan) == int(1.01 * LIMIT) - LIMIT
    _, text = ranked([candidate(10, 10, peak=1.5)])
    assert text.endswith("all exceed the limit for a moment, this by 0.49 GiB")


def test_what_is_too_large_to_simulate_keeps_its_place() -> None:
    found, text = ranked([candidate(10, 12), candidate(11, None), candidate(12, 3)])
    assert times(found) == [10, 11, 12]
    assert text == "ranked by the closed form alone, not simulated: too many"


def test_behind_is_by_simulation_where_both_were_simulated() -> None:
    given = candidate(10, 20), candidate(11, 30), candidate(15, None)
    one, other, third = (each.plan for each in given)
    assert behind_percent(other, one) == pytest.approx(50)
    assert behind_percent(third, one) == pytest.approx(50)


# A small model through plan().


def small() -> Workable:
    shape = DecoderShape(
        hidden=256, layers=2, heads=4, kv_heads=4, ffn=512, vocab=512, max_positions=128
    )
    return load_shape("small", shape, 128, torch.bfloat16)


@pytest.fixture(scope="module")
def priced() -> Plan:
    cluster = ClusterProfile.preset("1x2xL4")
    return planning.price("dp1; pp=2; micro=4", small(), cluster, global_batch_size=8)


def test_a_priced_plan_brings_its_simulation(priced: Plan) -> None:
    numbers = priced.predicted
    assert "not_simulated" not in numbers
    assert numbers["simulated_ms"] == numbers["simulated"]["step_ms"]
    assert len(numbers["simulated"]["groups"]) == 2
    assert work_json.of_plan(Plan.from_json(priced.to_json())) is not None


def test_a_large_plan_is_not_simulated_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(findings, "SIMULATED_ACTIONS", 7)
    cluster = ClusterProfile.preset("1x2xL4")
    found = planning.plan(small(), cluster, global_batch_size=8, constraints="micro=4")
    numbers = found.plan.predicted
    size = len(found.plan.layers)
    assert numbers["not_simulated"].startswith(f"{size} layers × 4 micro-batches, of which 7")
    assert "simulated_ms" not in numbers and work_json.KEY not in numbers
    assert numbers["ranking"].startswith("ranked by the closed form alone")
    steps = [other.plan.predicted["step_ms"] for other in found.alternatives]
    assert [numbers["step_ms"], *steps] == sorted([numbers["step_ms"], *steps])
