"""Galvatron's plan files: read, written, refused."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from random import Random
from typing import Any

import pytest

from galvatron_compile import notation
from galvatron_compile.errors import PlanError, UnsupportedError
from galvatron_compile.galvatron import plans
from galvatron_compile.plans import Plan, Stage
from galvatron_compile.strategy import Strategy

SMALL: dict[str, Any] = {
    "pp_deg": 2,
    "tp_sizes_enc": "1,2,2,4",
    "tp_consecutive_flags": "1,1,1,1",
    "dp_types_enc": "0,1,0,0",
    "use_sp": "0,1,0,0",
    "checkpoint": "1,0,0,0",
    "global_bsz": 16,
    "chunks": 4,
    "pp_division": "1,3",
    "pipeline_type": "pipedream_flush",
    "default_dp_type": "zero2",
    "vtp": 2,
    "vsp": 0,
    "embed_sdp": 1,
}


def text(**changed: Any) -> str:
    return json.dumps({**SMALL, **changed}, indent=4)


def plan_of(words: str, num_layers: int = 2, gpus: int = 8, batch: int = 16) -> Plan:
    return notation.parse(words, plans.layer_names(num_layers), gpus, batch)


def test_every_field_is_read() -> None:
    plan = plans.loads(text(), 8)
    ends = Strategy(tp=2, dp=2, sequence_parallel=True, zero=3)
    assert plan.strategies == (
        ends,
        Strategy(dp=4, zero=2, recompute="full"),
        Strategy(ulysses=2, dp=2, zero=3),
        Strategy(tp=2, dp=2, sequence_parallel=True, zero=2),
        Strategy(tp=4, sequence_parallel=True),
        ends,
    )
    assert plan.stages == (Stage(0, 2), Stage(2, 6))
    assert (plan.global_batch_size, plan.num_micro_batches, plan.schedule) == (16, 4, "1f1b")


def test_zero3_without_data_ranks_divides_nothing() -> None:
    plan = plans.loads(text(dp_types_enc="0,1,0,1"), 8)
    assert plan.strategies[4] == Strategy(tp=4, sequence_parallel=True)


@pytest.mark.parametrize(
    "changed",
    [
        {},
        {"pipeline_type": "gpipe"},
        {"default_dp_type": "ddp", "vsp": 1, "embed_sdp": 0},
        {"cp_sizes_enc": "1,1,2,1", "vcp": 2},
        {"pp_deg": 1, "pp_division": "4", "chunks": 1},
    ],
)
def test_written_as_it_was_read(changed: dict[str, Any]) -> None:
    assert plans.dumps(plans.loads(text(**changed), 8)) == text(**changed)


@pytest.mark.parametrize("seed", range(50))
def test_our_plans_come_back(seed: int) -> None:
    random = Random(seed)
    pp = random.choice([1, 2, 4])
    ranks = 8 // pp

    def strategy(recompute: bool) -> Strategy:
        degree = random.choice([d for d in (1, 2, 4, 8) if d <= ranks])
        ulysses = random.random() < 0.5
        dp = ranks // degree
        zero = random.choice([2, 3]) if dp > 1 else 0
        return Strategy(
            tp=1 if ulysses else degree,
            dp=dp,
            sequence_parallel=degree > 1 and not ulysses,
            zero=zero,
            recompute="full" if recompute and random.random() < 0.5 else "none",
            ulysses=degree if ulysses else 1,
        )

    ends = strategy(recompute=False)
    edges = [0, *(3 * i for i in range(1, pp)), 14]
    stages = tuple(Stage(a, b) for a, b in pairwise(edges))
    plan = Plan(
        model="",
        world_size=8,
        global_batch_size=64,
        num_micro_batches=4,
        layers=plans.layer_names(12),
        strategies=(ends, *(strategy(recompute=True) for _ in range(12)), ends),
        stages=stages if pp > 1 else (),
        schedule=random.choice(["1f1b", "gpipe"]),
    )
    assert plans.loads(plans.dumps(plan), 8) == plan


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("dp8.zero2; 3: dp8.zero3", "different strategies of embedding"),
        ("dp8.zero2.recompute", "recomputation of embedding and head"),
        ("dp8.zero2; 1: dp8.zero1", "ZeRO-1; use zero2"),
        ("dp8.zero2; 1: dp8.zero2.selective", "selective recomputation"),
        ("dp8.zero2; 1: dp8.zero0", "zero0 and zero2 in one plan"),
        ("dp8.zero2; 1: tp2.dp4.zero2", "without sequence parallelism; write tp2.sp"),
        ("dp8.zero2; 1: tp2.sp.ulysses2.dp2.zero2", "together with Ulysses"),
        ("dp8.zero2; 1: ulysses8.zero2", "ZeRO-2 without data parallelism"),
        ("dp8.zero2; 1: ep2.dp8.zero2", "expert parallelism"),
        ("dp4.zero2; pp=2; micro=4; schedule=zero-bubble", "the schedule zero-bubble"),
        ("dp4.zero2; stages=1,3; micro=4", "at least one layer beside embedding"),
    ],
)
def test_what_the_format_cannot_hold_is_refused(words: str, message: str) -> None:
    with pytest.raises(UnsupportedError, match=message):
        plans.dumps(plan_of(words))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"pp_deg": 3}, "pp_deg is 3, which does not divide 8 GPUs"),
        ({"use_sp": "0,1"}, "use_sp has 2 entries, tp_sizes_enc has 4"),
        ({"checkpoint": "1,x,0,0"}, "checkpoint must be whole numbers"),
        ({"tp_sizes_enc": "1,2,2,8"}, "degree 8 and cp 1 do not divide the 4 GPUs"),
        ({"tp_consecutive_flags": "1,1,0,1"}, "only consecutive tp ranks"),
        ({"pp_division": "2,3"}, "2 numbers from 1 on that add up to 4 layers, got 2,3"),
        ({"pipeline_type": "zb"}, "pipeline_type must be one of pipedream_flush, gpipe"),
        ({"default_dp_type": "zero1"}, "default_dp_type must be one of zero2, ddp"),
        ({"vpt": 2}, "unknown field 'vpt'; did you mean 'vtp'"),
        ({"global_bsz": 6}, "global batch of 6 does not split"),
        ({"chunks": "4"}, "chunks must be an integer"),
    ],
)
def test_a_malformed_file_is_refused(tmp_path: Path, changed: Any, message: str) -> None:
    path = tmp_path / "galvatron_config.json"
    path.write_text(text(**changed))
    with pytest.raises(PlanError, match=message) as error:
        plans.load(path, 8)
    assert str(path) in str(error.value)


def test_other_files_are_told_apart(tmp_path: Path) -> None:
    assert plans.is_galvatron(text())
    assert not plans.is_galvatron(plan_of("dp8").to_json())
    assert not plans.is_galvatron("dp8.zero2")
    with pytest.raises(PlanError, match="not JSON"):
        plans.loads("{", 8)
    with pytest.raises(PlanError, match="cannot read the plan"):
        plans.load(tmp_path / "none.json", 8)


def test_the_plan_that_galvatron_ships_byte_for_byte(llama: Path, tmp_path: Path) -> None:
    (path,) = llama.glob("galvatron_config_*.json")
    plan = plans.load(path, 8)
    assert notation.format(plan) == (
        "all: dp8.zero3.recompute; 0,33: ulysses2.dp4.zero3; 21-32: dp8.zero3"
    )
    plans.save(plan, tmp_path / "again.json")
    assert (tmp_path / "again.json").read_bytes() == path.read_bytes()
    assert plans.load(tmp_path / "again.json", 8) == replace(plan, classes=())
