"""Plans and profiles that do not fit are refused on every rank at once, with what to do."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from refused import Tiny, alike, compiled, refused, tokens

import galvatron_compile as gc
from galvatron_compile.errors import (
    NotationError,
    PlanError,
    ProfileError,
    UnsupportedError,
)

# --- plans --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def plan(ranks: Any) -> gc.Plan:
    return ranks(2).run(lambda: compiled(plan="dp2").plan)[0]


def other_model(plan: gc.Plan, **sizes: int) -> None:
    compiled(Tiny(**sizes), plan=plan)


@pytest.mark.parametrize("sizes", [{"depth": 3}, {"hidden": 32}], ids=str)
def test_a_plan_for_another_model_is_refused(ranks: Any, plan: Any, sizes: dict[str, int]) -> None:
    message = f"plan is for another model .fingerprint {plan.model}, .*search a new plan"
    alike(refused(ranks, other_model, plan, **sizes), PlanError, message)


def test_a_plan_for_another_world_size_or_batch_is_refused(ranks: Any, plan: Any) -> None:
    wide = replace(plan, world_size=4, strategies=(gc.Strategy(dp=4),) * len(plan.layers))
    message = "plan is for another world size: 4 ranks, but there are 2; launch 4 processes"
    alike(refused(ranks, compiled, plan=wide), PlanError, message)
    message = "plan is for another global batch size: 8, but it is 16; pass global_batch_size=8"
    alike(refused(ranks, compiled, plan=plan, global_batch_size=16), PlanError, message)


def broken_plans(plan: gc.Plan) -> dict[str, tuple[str, str]]:
    """Texts of plan files by name, each with what its refusal must say."""
    good = json.loads(plan.to_json())
    layer = {**good["layers"][1], "zero": 7}
    typo = {("num_microbatches" if key == "num_micro_batches" else key): good[key] for key in good}
    return {
        "cut.json": (plan.to_json()[:40], "cut.json: plan is not valid JSON: .* line 3 column"),
        "zero7.json": (
            json.dumps(good | {"layers": [good["layers"][0], layer, *good["layers"][2:]]}),
            r"layers\[1\]: ZeRO stage must be 0, 1, 2 or 3, got 7",
        ),
        "typo.json": (json.dumps(typo), "plan lacks the field 'num_micro_batches'"),
        "newer.json": (json.dumps(good | {"version": 99}), "schema version 99, this version reads"),
        "list.json": ("[]", "plan must be an object"),
    }


def test_malformed_plan_files_are_refused(ranks: Any, plan: Any, tmp_path: Path) -> None:
    for name, (text, message) in broken_plans(plan).items():
        (tmp_path / name).write_text(text)
        errors = refused(ranks, compiled, plan=tmp_path / name)
        alike(errors, PlanError, re.escape(str(tmp_path / name)), message)
    gone = str(tmp_path / "gone.json")
    alike(refused(ranks, compiled, plan=gone), PlanError, f"no plan at {gone}; save one")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("ulysses2", "Ulysses sequence parallel is not executed by this version"),
        ("cp2", "leave cp2 out"),
        ("dp2.ep2", "expert parallel is not executed by this version"),
        ("dp2.selective", "selective recompute is not executed by this version"),
    ],
)
def test_what_the_planner_knows_and_the_runtime_does_not_is_refused(
    ranks: Any, text: str, message: str
) -> None:
    alike(refused(ranks, compiled, plan=text), UnsupportedError, message)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("dp1; pp=2", "1f1b over 2 groups needs at least 2 micro-batches, got 1; use gpipe"),
        (
            "dp1; stages=1,1,1,1; virtual=2; schedule=interleaved",
            "interleaved over 2 groups needs at least 2 micro-batches, got 1; use gpipe",
        ),
    ],
)
def test_schedules_that_do_not_fit_the_batch_are_refused(
    ranks: Any, text: str, message: str
) -> None:
    alike(refused(ranks, compiled, plan=text), PlanError, message)


@pytest.mark.parametrize(
    ("text", "kind", "message", "at"),
    [
        ("all: dp2; blocks: tp2.zreo3", NotationError, "did you mean 'zero3'?", "zreo3"),
        ("tp4", NotationError, "tp4 does not divide 2 ranks; use a divisor of 2", "tp4"),
        ("all: dp2; 9: tp2", NotationError, "layer 9 does not exist; layers are 0-3", "9"),
        ("dp2; micro=x", NotationError, "expected a whole number from 1 on, got 'x'", "x"),
        ("tp2.pp2", NotationError, "write '; pp=2' after the strategies", "pp2"),
    ],
)
def test_malformed_notation_is_refused_with_a_caret_under_it(
    ranks: Any, text: str, kind: type[Exception], message: str, at: str
) -> None:
    errors = refused(ranks, compiled, plan=text)
    alike(errors, kind, re.escape(message))
    for error in errors:
        _, line, caret = str(error).splitlines()
        assert line.strip() == text
        assert line[caret.index("^") :].startswith(at)


def tied_apart() -> None:
    compiled(Tiny(tied=True), plan="all: dp2; head: tp2")


def test_tied_layers_with_different_strategies_are_refused(ranks: Any) -> None:
    alike(
        refused(ranks, tied_apart),
        PlanError,
        "layers with tied parameters need one strategy, got embedding: dp2, head: tp2",
    )


def heads_apart() -> None:
    compiled(Tiny(15, 3, 21), example_inputs=tokens(4, 5), plan="tp2")


def test_a_plan_that_the_model_cannot_be_split_by_is_refused(ranks: Any) -> None:
    message = "strategy tp2 is not possible.*: tp2 splits no parameter of this model"
    alike(refused(ranks, heads_apart), UnsupportedError, message)


# --- profiles -----------------------------------------------------------------------------------


def with_profile(path: Path) -> None:
    compiled(profile=gc.ClusterProfile.load(path))


def test_malformed_profiles_are_refused(ranks: Any, tmp_path: Path) -> None:
    good = tmp_path / "good.json"
    gc.ClusterProfile.preset("2xH100").save(good)
    fields = json.loads(good.read_text())
    for number, (changes, message) in enumerate(
        [
            ({"name": 3}, "name must be a text, got 3"),
            ({"schema": 99}, "schema is 99, this version reads"),
            ({"memory": {"value": -1, "source": "measured"}}, "it must be positive"),
            ({"colour": "red"}, "colour is not a field"),
        ]
    ):
        path = tmp_path / f"bad{number}.json"
        path.write_text(json.dumps(fields | changes))
        alike(refused(ranks, with_profile, path), ProfileError, re.escape(str(path)), message)
    cut = tmp_path / "cut.json"
    cut.write_text(good.read_text()[:50])
    alike(refused(ranks, with_profile, cut), ProfileError, "cut.json: not JSON: .* line 4")
    alike(
        refused(ranks, with_profile, tmp_path / "gone.json"),
        ProfileError,
        "cannot read the cluster profile .*gone.json",
        "make one with galvatron-compile profile",
    )


def test_a_profile_of_fewer_ranks_is_refused(ranks: Any) -> None:
    profile = gc.ClusterProfile.preset("1xH100")
    message = "describes 1 x 1 ranks, but rank 1 was asked for; profile the cluster that will train"
    alike(refused(ranks, compiled, profile=profile), ProfileError, message)
