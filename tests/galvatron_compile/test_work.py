"""Works: what they refuse, how phases divide, and the way through JSON."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from typing import Any

import example_plans
import pytest

from galvatron_compile import work_json
from galvatron_compile.actions import LayerOutline, Outline, UnitOutline
from galvatron_compile.errors import PlanError
from galvatron_compile.plans import Plan
from galvatron_compile.timeline import simulate
from galvatron_compile.work import Cores, LayerWork, Phase, SendWork, UnitWork, Work


def test_a_phase_is_computation_and_its_own_collectives() -> None:
    phase = Phase(8.0, 1.0, 2.0, 3.0, 4.0)
    assert (phase.inner_ms, phase.alone_ms) == (10.0, 18.0)


def test_the_halves_of_backward_make_the_whole() -> None:
    work = LayerWork(Phase(1), Phase(8.0, 2.0), Phase(1), weight_share=0.25)
    inputs, weights = work.phase("backward_input"), work.phase("backward_weight")
    assert inputs == Phase(6.0, 2.0)  # collectives go with the gradients of inputs
    assert weights == Phase(2.0)
    assert work.phase("backward") == Phase(8.0, 2.0)
    assert work.phase("recompute") == work.phase("forward") == Phase(1)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Phase(-1.0), "compute_ms must be finite and not negative, got -1.0"),
        (lambda: Phase(float("nan")), "compute_ms must be finite"),
        (lambda: UnitWork(reduce_ms=float("inf")), "reduce_ms must be finite"),
        (lambda: SendWork(gradients_bytes=-3), "gradients_bytes .* got -3"),
        (lambda: LayerWork(Phase(), Phase(), weight_share=1.5), "weight_share must be at most 1"),
        (lambda: Work({}, compute_slowdown=0.5), "compute_slowdown must be at least 1, got 0.5"),
        (
            lambda: Work({}, node_communication_slowdown=0.5),
            "node_communication_slowdown must be at least 1, got 0.5",
        ),
    ],
)
def test_what_cannot_be_is_refused(make: Any, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        make()


# Through a plan's JSON.


def with_work() -> Plan:
    """Two groups of an eight-layer plan, with every kind of number somewhere."""
    plan = example_plans.bare(6, 2, 4, mixed=False)
    outlines, works = [], []
    for group in (0, 1):
        numbers = plan.group_layers(group)
        units = (UnitOutline("own", 3, varying=True), UnitOutline("wte", gathers=False, tied=True))
        layers = {i: LayerOutline(plan.layers[i], (0, 1), recompute=i == 3) for i in numbers}
        outlines.append(Outline((numbers,), layers, units, 4, "1f1b", 2, group))
        layer = LayerWork(Phase(1.5, 0.25), Phase(3.0), Phase(1.5), 0.4, 70, 30, 5)
        works.append(
            Work(
                dict.fromkeys(numbers, layer),
                (UnitWork(0.5, 0.75, 0.1, 0.0, 10, 20, 40, 40, 10), UnitWork(tied_ms=0.5)),
                (SendWork(0.3 * (group == 0), 0.2 * (group == 1), 8, 8),),
                2.0, 100, 1.1, 1.2, True, False, Cores(0, 2, 1),
            )
        )  # fmt: skip
    return replace(plan, predicted={work_json.KEY: work_json.dump(outlines, works)})


def test_a_saved_plan_brings_its_work_back() -> None:
    plan = with_work()
    again = Plan.from_json(plan.to_json())
    assert work_json.of_plan(again) == work_json.of_plan(plan)
    groups = work_json.of_plan(plan)
    assert groups is not None
    expected = LayerWork(Phase(1.5, 0.25), Phase(3.0), Phase(1.5), 0.4, 70, 30, 5)
    assert groups[1][0].layers[3] == expected
    assert groups[0][1].layers[4].name == plan.layers[4]
    assert simulate(again).total_ms == simulate(plan).total_ms > 4 * 4 * 4.5
    assert simulate(again).memory


def test_defaults_are_not_written() -> None:
    group = with_work().predicted[work_json.KEY][0]
    assert group["outline"]["units"][1] == {"name": "wte", "gathers": False, "tied": True}
    assert "messages_share_wire" not in group["work"]


def _changed(path: list[Any], value: Any) -> Plan:
    plan = with_work()
    found = json.loads(json.dumps(plan.predicted[work_json.KEY]))
    inner = found
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    return replace(plan, predicted={work_json.KEY: found})


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ([0], None),
        ([0], {"outline": {}}),
        ([0, "outline"], {}),
        ([0, "outline", "chunks"], [[0, 1, 2]]),  # the plan's stages were edited
        ([0, "outline", "num_micro_batches"], 8),
        ([0, "outline", "schedule"], "gpipe"),
        ([0, "outline", "group"], 1),
        ([0, "outline", "units"], []),
        ([0, "work", "layers", "1"], {"forward": {}}),
        ([0, "work", "layers", "one"], {}),
        ([0, "work", "layers", "1", "saved_bytes"], "much"),
        ([0, "work", "layers", "1", "saved_bytes"], 0.5),
        ([0, "work", "layers", "1", "saved_kb"], 3),
        ([0, "work", "compute_slowdown"], 0.3),
        ([0, "work", "inner_shares_wire"], 1),
        ([0, "work", "sends"], {}),
    ],
)
def test_what_was_edited_until_it_fits_no_more_counts_as_nothing(
    path: list[Any], value: Any
) -> None:
    assert work_json.of_plan(_changed(path, value)) is None


def test_what_was_edited_and_fits_counts() -> None:
    plan = _changed([1, "work", "optimizer_ms"], 7)
    assert simulate(plan).total_ms == pytest.approx(simulate(with_work()).total_ms + 5)


def test_other_than_a_list_counts_as_nothing() -> None:
    plan = with_work()
    for value in (None, 7, {}, [], copy.deepcopy(plan.predicted[work_json.KEY])[:1]):
        assert work_json.of_plan(replace(plan, predicted={work_json.KEY: value})) is None
