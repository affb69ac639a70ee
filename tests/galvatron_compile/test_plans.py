"""The plan: what it refuses, its JSON, its printed table."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from galvatron_compile.errors import PlanError
from galvatron_compile.plans import Plan, Stage
from galvatron_compile.strategy import Strategy

A, B = Strategy(2, 2, True, 3), Strategy(1, 4, zero=2, recompute="full")
GOLDEN = Path(__file__).parents[1] / "golden"


def make_plan(**changed: Any) -> Plan:
    layers = [
        {"step_ms": 1.5 + i, "resharding_ms": 0.25, "state_bytes": 3 << 20}
        | {"saved_bytes": 1 << 19, "transient_bytes": i << 20}
        for i in range(5)
    ]
    plan = Plan(
        model="abc123",
        world_size=4,
        global_batch_size=32,
        num_micro_batches=2,
        layers=("embed", "h.0", "h.1", "h.2", "head"),
        strategies=(A, B, B, B, A),
        predicted={"step_ms": 18.75, "memory_bytes": 21 << 20, "layers": layers},
        classes=("embed", "h", "h", "h", "head"),
    )
    return replace(plan, **changed)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"world_size": 8}, "uses 4 ranks, but the plan is for 8; make tp times dp equal 8"),
        ({"world_size": 0}, "world_size must be at least 1, got 0"),
        ({"global_batch_size": 36}, "does not split into 2 micro-batches over dp 4 of layer 'h.0'"),
        ({"global_batch_size": 36}, "use a multiple of 8, for example 32"),
        ({"num_micro_batches": 3}, "does not split into 3 micro-batches"),
        ({"strategies": (A, B)}, "got 2 strategies for 5 layers"),
        ({"classes": ("x",)}, "got 1 for 5 layers"),
        ({"layers": (), "strategies": ()}, "at least one layer"),
        ({"stages": (Stage(0, 4),)}, "stages must cover layers 0-5"),
        ({"stages": (Stage(0, 3), Stage(2, 5))}, "in order without gaps"),
        ({"stages": (Stage(0, 0), Stage(0, 5))}, "stage 0 has no layers"),
        ({"stages": (Stage(0, 2), Stage(2, 5))}, "4 ranks in each of 2 stages"),
    ],
)
def test_parts_that_do_not_fit_together_are_refused(changed: Any, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        make_plan(**changed)


def test_ranks_are_those_of_all_stages() -> None:
    plan = make_plan(world_size=8, stages=(Stage(0, 2), Stage(2, 5)))
    assert plan.num_stages == 2
    assert "2 stages (1f1b)" in str(plan)


def test_data_size_is_what_all_layers_can_load() -> None:
    assert make_plan().data_size == 2
    assert make_plan(strategies=(B,) * 5).data_size == 4


def test_json_keeps_everything() -> None:
    plan = make_plan(stages=(Stage(0, 5),))
    again = Plan.from_json(plan.to_json())
    assert again == plan
    assert again.predicted == plan.predicted
    assert again.classes == plan.classes


def test_a_saved_plan_loads(tmp_path: Path) -> None:
    make_plan().save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == make_plan()


def edited(change: Any) -> str:
    document = json.loads(make_plan().to_json())
    change(document)
    return json.dumps(document)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.pop("world_size"), "plan lacks the field 'world_size'"),
        (lambda d: d.update(version=9), "schema version 9, this version reads 2"),
        (lambda d: d["layers"][3].update(tp="2"), r'layers\[3\]\.tp must be an integer, got "2"'),
        (lambda d: d["layers"][3].update(zero=True), r"layers\[3\]\.zero must be an integer"),
        (lambda d: d["layers"][1].update(tp=1, dp=0), r"layers\[1\]: dp must be at least 1"),
        (lambda d: d["layers"][1].update(zeor=2), "unknown field 'zeor'; did you mean 'zero'"),
        (lambda d: d["layers"].append(7), r"layers\[5\] must be an object, got 7"),
        (lambda d: d.update(layers={}), "plan.layers must be a list, got {}"),
        (lambda d: d.update(world_size=None), "plan.world_size must be an integer, got null"),
        (lambda d: d.update(stages=[{"first": 0}]), r"stages\[0\] lacks the field 'last'"),
        (lambda d: d.update(num_micro_batches=64), "does not split into 64 micro-batches"),
    ],
)
def test_a_broken_field_is_named(change: Any, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        Plan.from_json(edited(change))


def test_broken_json_names_file_line_and_column(tmp_path: Path) -> None:
    path = tmp_path / "cut.json"
    path.write_text(make_plan().to_json()[:60])
    with pytest.raises(PlanError, match=r"cut\.json: plan is not valid JSON: .* line 5 column 2"):
        Plan.load(path)
    with pytest.raises(PlanError, match="there is no plan at"):
        Plan.load(tmp_path / "none.json")
    path.write_bytes(b"\xff\xfe{")
    with pytest.raises(PlanError, match="not UTF-8"):
        Plan.load(path)
    with pytest.raises(PlanError, match="plan must be an object"):
        Plan.from_json("[1]")


@pytest.mark.parametrize(
    ("found", "message"),
    [
        (("other", 5, 4, 32), r"another model \(fingerprint abc123, this one is other\)"),
        (("abc123", 6, 4, 32), "another model: it has 5 layers, this one has 6"),
        (("abc123", 5, 8, 32), "another world size: 4 ranks, but there are 8; launch 4"),
        (("abc123", 5, 4, 64), "another global batch size: 32, but it is 64; pass"),
    ],
)
def test_a_plan_for_something_else_is_refused(found: Any, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        make_plan().check_model(*found)


def test_a_plan_without_fingerprint_fits_any_model_of_its_size() -> None:
    make_plan().check_model("abc123", 5, 4, 32)
    make_plan(model="").check_model("other", 5, 4, 32)


def test_printed_plan_is_the_golden_one() -> None:
    assert str(make_plan()) + "\n" == (GOLDEN / "plan.txt").read_text(encoding="utf-8")


def test_a_plan_without_prediction_prints_its_strategies() -> None:
    text = str(make_plan(predicted={}, classes=()))
    assert "predicted" not in text
    assert text.splitlines()[4].split() == ["1-3", "h.0", "…", "h.2", "dp4.zero2.recompute"]
