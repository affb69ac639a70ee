"""Two plans side by side: the printed comparison, its sentences, and what it refuses."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import example_plans
import pytest

from galvatron_compile.comparison import Comparison
from galvatron_compile.errors import PlanError
from galvatron_compile.plans import Plan

GOLDEN = Path(__file__).parents[1] / "golden"
A = example_plans.planned(30, 4, 16)


def with_predicted(plan: Plan, **changed: Any) -> Plan:
    return replace(plan, predicted={**plan.predicted, **changed})


def test_printed_comparison() -> None:
    b = example_plans.planned(30, 4, 16, schedule="zero-bubble", mixed=False)
    assert str(Comparison(A, b)) + "\n" == (GOLDEN / "comparison.txt").read_text()


def test_changes_of_time_and_memory_are_differences_of_the_predictions() -> None:
    b = example_plans.planned(30, 4, 16, recompute="full", mixed=False)
    comparison = Comparison(A, b)
    gib = 2**30
    saved = [
        (y["saved_bytes"] - x["saved_bytes"]) / gib
        for x, y in zip(A.predicted["groups"], b.predicted["groups"], strict=True)
    ]
    step = b.predicted["step_ms"] / A.predicted["step_ms"] - 1
    assert f"B is {100 * step:.1f} % slower" in comparison.verdict
    compute = [plan.predicted["causes"]["compute_ms"] for plan in (A, b)]
    assert f". Computation +{(compute[1] - compute[0]) / 1e3:.2f} s, " in comparison.verdict
    assert f"B needs {-min(saved):.1f} GiB less on stage 1: saved activations −" in str(comparison)
    assert "recompute none → full, more work, fewer activations kept" in str(comparison)


def test_same_plans_are_called_so() -> None:
    comparison = Comparison(A, A)
    assert comparison.verdict == "The plans are the same."
    assert comparison.sections == () and comparison.reasons == ()


def test_other_micro_batches_change_the_bubble() -> None:
    b = replace(example_plans.planned(30, 4, 32), global_batch_size=A.global_batch_size)
    (first, *_) = Comparison(A, b).reasons
    assert first == (
        "micro-batches 16 → 32: equal stages would idle 15.8 % of the step in A, 8.6 % in B."
    )


def test_other_cuts_name_the_slowest_stage() -> None:
    stages = tuple(
        replace(stage, first=stage.first + (i > 0), last=stage.last + (i < 3))
        for i, stage in enumerate(A.stages)
    )
    b = example_plans.predicted(replace(A, stages=stages))
    (first, *_) = Comparison(A, b).reasons
    assert first == (
        "Stages are cut at other layers; the slowest is stage 0 (8 layers, 522 ms a micro-batch) "
        "in A, stage 0 (9 layers, 580 ms a micro-batch) in B."
    )
    assert "layers a group" in str(Comparison(A, b))


def test_groups_of_another_number_are_compared_where_most_is_needed() -> None:
    text = str(Comparison(A, example_plans.planned(30, 8, 16, tp=4)))
    assert "pp 4 → 8" in text
    assert "where most is needed (57.3 GiB against 31.5 GiB)" in text
    assert "tp 8 → 4, less communication in every layer, more bytes a rank" in text


def test_states_that_one_plan_does_not_divide_are_joined() -> None:
    groups = []
    for group in A.predicted["groups"]:
        names = ("parameter_bytes", "gradient_bytes", "optimizer_bytes")
        rest = {key: value for key, value in group.items() if key not in names}
        rest["memory_bytes"] += 2**30
        groups.append({**rest, "state_bytes": sum(group[name] for name in names) + 2**30})
    (sentence,) = Comparison(A, with_predicted(A, groups=groups)).reasons
    assert sentence == (
        "B needs 1.00 GiB more on stage 0: parameters, gradients and optimizer states +1.00 GiB."
    )


def test_other_work_is_compared_by_rate() -> None:
    b = with_predicted(replace(A, global_batch_size=2 * A.global_batch_size))
    assert "B trains 100.0 % more tokens a second (421,598 against 210,799)" in str(
        Comparison(A, b)
    )
    b = with_predicted(b, seq=None)
    assert "B trains 100.0 % more sequences a second (51 against 26)" in str(Comparison(A, b))


def test_without_predictions_only_shapes_are_compared() -> None:
    b = example_plans.bare(30, 4, 16, schedule="gpipe")
    comparison = Comparison(A, b)
    assert comparison.verdict.startswith("B predicts no step time, so only shapes are compared")
    assert [section.title for section in comparison.sections] == ["Shape"]
    assert "A and B predict no step time" in Comparison(example_plans.bare(), b).verdict


def test_what_the_numbers_rest_on_is_noted() -> None:
    b = with_predicted(A, hardware="8 × A100", warnings=["NOT MEASURED"], memory_limit_bytes=2**34)
    notes = Comparison(A, b).notes
    assert "A's of 128 × 8 × H100 SXM 80 GB, B's of 8 × A100." in notes[0]
    assert notes[1:] == ("B does not fit: it needs 31.5 GiB of 16.0 GiB a rank.", "B: NOT MEASURED")


def test_a_warning_of_both_is_given_once() -> None:
    a, b = (with_predicted(A, warnings=[*own, "NOT MEASURED"]) for own in ([], ["old"]))
    assert Comparison(a, b).notes == ("A and B: NOT MEASURED", "B: old")


def test_plans_of_other_models_are_refused() -> None:
    b = replace(A, model="another", layers=tuple(f"h.{i}" for i in range(32)))
    with pytest.raises(PlanError, match=r"of different models: A has 32 layers .* and 0 names"):
        Comparison(A, b)
    with pytest.raises(PlanError, match="compare plans of one model"):
        Comparison(A, replace(example_plans.bare(60), model=""))


def test_another_fingerprint_with_the_same_layers_is_said() -> None:
    (note,) = Comparison(A, replace(A, model="another")).notes
    assert "fingerprints (5f3a9c1e77b0 and another), but name 32 layers alike" in note


def test_a_layer_more_is_said_and_the_others_are_compared_by_name() -> None:
    b = replace(example_plans.bare(31, 1, 4, mixed=False), model="")
    comparison = Comparison(example_plans.bare(30, 1, 4, mixed=False), b)
    assert comparison.notes == ("A has 32 layers and B 33; the 32 of the same name were compared.",)
    assert comparison.matched[-1] == (31, 32)
    assert comparison.changed_strategies == {}
