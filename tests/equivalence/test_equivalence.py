"""The matrix: every plan gives the single process's loss and gradients (float64, 1e-9 relative)."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
TOLERANCE = 1e-9

TWO = [
    "dp2", "dp2.zero1", "dp2.zero2", "dp2.zero3", "tp2", "tp2.sp",
    "dp2; micro=2", "dp2.zero1; micro=2", "dp2.zero2; micro=4", "dp2.zero3; micro=2",
    "dp2.zero3.recompute", "tp2.recompute", "tp2.sp.recompute; micro=2",
    "all: dp2; blocks: tp2; 1: dp2.zero3; 2: tp2.sp.recompute; micro=2",
]
FOUR = [
    "dp4", "dp4.zero2; micro=2", "dp4.zero3", "tp4", "tp4.recompute; micro=2", "tp4.sp",
    "tp2.dp2", "tp2.dp2.zero1; micro=2", "tp2.dp2.zero2; micro=4", "tp2.dp2.zero3",
    "tp2.sp.dp2.zero3.recompute; micro=2", "tp2.sp.dp2",
    "all: tp2.dp2.zero2; 1: dp4.zero3.recompute; 2: tp4; micro=2",
    "all: dp4.zero1; 1-2: tp2.sp.dp2; 3: tp4.recompute",
]
EIGHT = [
    "dp8.zero3", "tp2.dp4.zero2", "tp4.dp2.zero3.recompute",
    "all: tp2.dp4.zero3; 1: dp8; 2: tp4.sp.dp2.recompute",
    "dp8.zero1", "tp2.dp4.zero1; micro=2", "tp4.dp2.zero2; micro=4", "tp2.dp4.zero3; micro=2",
    "tp2.sp.dp4", "tp2.sp.dp4.zero1.recompute; micro=2", "tp4.sp.dp2; micro=4",
    "all: tp4.dp2.zero1; 1: tp2.sp.dp4.zero3.recompute; micro=2",
]
# In stages "*" stands for the rest of the layers.
PIPELINES = {
    2: [
        "dp1; pp=2; micro=2", "dp1; pp=2; micro=4; schedule=gpipe",
        "dp1; stages=2,*; micro=4; schedule=zero-bubble", "dp1; stages=4,*; micro=8",
        "recompute; pp=2; micro=4", "recompute; pp=2; micro=2; schedule=zero-bubble",
        "dp1; stages=1,1,2,*; virtual=2; schedule=interleaved; micro=4",
        "all: dp1; 1: recompute; 4: recompute; stages=3,*; micro=2; schedule=gpipe",
    ],
    4: [
        "dp1; pp=4; micro=4", "dp1; stages=1,2,1,*; micro=8; schedule=zero-bubble",
        "recompute; pp=4; micro=2; schedule=gpipe",
        "dp2; pp=2; micro=2", "dp2.zero1; pp=2; micro=4; schedule=gpipe",
        "dp2.zero2; stages=2,*; micro=4; schedule=zero-bubble", "dp2.zero3; pp=2; micro=2",
        "dp2.zero3.recompute; pp=2; micro=4; schedule=zero-bubble",
        "tp2; pp=2; micro=4", "tp2.sp; stages=2,*; micro=2; schedule=zero-bubble",
        "tp2.sp.recompute; stages=4,*; micro=2; schedule=gpipe",
        "all: dp2.zero3; 1: tp2; 2: tp2.sp.recompute; pp=2; micro=4",
        "all: tp2; 1: dp2.zero1; 4: dp2.zero3; stages=2,*; micro=2",
        "dp2.zero1; stages=1,1,2,*; virtual=2; schedule=interleaved; micro=4",
    ],
    8: [
        "tp2.dp2; pp=2; micro=4", "dp2.zero2; pp=4; micro=4; schedule=zero-bubble",
        "tp2; pp=4; micro=4; schedule=gpipe", "tp2.sp.dp2.zero3; stages=2,*; micro=2",
        "tp2.dp2.zero1; stages=1,1,2,*; virtual=2; schedule=interleaved; micro=2",
    ],
}  # fmt: skip
TRAINED = {
    "dp1; stages=2,*; micro=4; schedule=zero-bubble", "dp2.zero3; pp=2; micro=2",
    "all: tp2; 1: dp2.zero1; 4: dp2.zero3; stages=2,*; micro=2",
    "tp2.sp.dp2.zero3; stages=2,*; micro=2",
    "dp2.zero3; micro=2", "tp2.sp.recompute; micro=2", "dp2.zero1; micro=2", "tp2.dp2.zero3",
    "all: tp2.dp2.zero2; 1: dp4.zero3.recompute; 2: tp4; micro=2", "tp4",
    "tp2.dp4.zero1; micro=2", "tp2.sp.dp4.zero1.recompute; micro=2",
    "fused dp2.zero3; micro=2", "fused tp2.sp.dp2.zero3",
}
# With every fused operator that can be put in (where no kernel runs they compute in PyTorch).
FUSED = {
    2: ["fused dp2.zero3; micro=2", "fused tp2", "fused tp2.sp.recompute; micro=2",
        "fused dp1; stages=2,*; micro=4; schedule=zero-bubble"],
    4: ["fused tp2.sp.dp2.zero3", "fused tp4", "fused tp2.sp; stages=2,*; micro=2"],
    8: ["fused tp4.sp.dp2.zero3"],
}  # fmt: skip
# T5's encoder (layers 1 and 2) and its decoder (the larger family of blocks) run differently.
ENCODER_DECODER = {
    2: ["all: dp2; 1-2: tp2.sp; micro=2"],
    4: [
        "all: tp2.dp2; 1-2: dp4.zero3; blocks: tp4.sp; micro=2",
        "all: dp4.zero1; 1-2: tp2.sp.dp2; 4: tp4.recompute",
    ],
    8: ["all: dp8; 1-2: tp4.dp2.zero3; blocks: tp2.sp.dp4.zero2.recompute"],
}
# Ten tokens (nine patches and the class token) do not divide over four ranks. T5's layer 3 has the
# embedding of layer 0 and the head, and layers with tied parameters need one strategy.
IMPOSSIBLE = {
    ("t5", "all: dp4.zero1; 1-2: tp2.sp.dp2; 3: tp4.recompute"),
    ("vit", "tp4.sp"),
    ("vit", "fused tp4.sp.dp2.zero3"),
    ("vit", "tp4.sp.dp2; micro=4"),
    ("vit", "all: tp2.dp4.zero3; 1: dp8; 2: tp4.sp.dp2.recompute"),
}
MODELS = ["odd_gpt", "llama", "gpt2", "bert", "vit", "t5"]


def on_ranks(folder: str, model: str, plans: list[str], train: list[str]) -> Any:
    if folder not in sys.path:
        sys.path.insert(0, folder)
    import harness

    return harness.compare(model, plans, train)


@pytest.fixture(scope="module")
def outcomes(ranks: Callable[[int], Any]) -> Callable[[str, int], dict[str, Any]]:
    """All plans of one model at one world size, run once: capture is the slow part."""
    known: dict[tuple[str, int], dict[str, Any]] = {}

    def get(model: str, world_size: int) -> dict[str, Any]:
        if (model, world_size) not in known:
            plans = plans_of(model, world_size)
            train = [plan for plan in plans if plan in TRAINED]
            results = ranks(world_size).run(
                on_ranks, str(HERE), model, plans, train, timeout_s=600.0
            )
            known[model, world_size] = results[0]
        return known[model, world_size]

    return get


def plans_of(model: str, world_size: int) -> list[str]:
    plans = {2: TWO, 4: FOUR, 8: EIGHT}[world_size] + PIPELINES[world_size] + FUSED[world_size]
    special = ENCODER_DECODER[world_size] if model == "t5" else []
    return [*(plan for plan in plans if (model, plan) not in IMPOSSIBLE), *special]


def cases(world_size: int) -> list[tuple[str, str]]:
    return [(model, plan) for model in MODELS for plan in plans_of(model, world_size)]


def check(outcome: dict[str, Any]) -> None:
    assert outcome["loss"] < TOLERANCE, outcome
    assert outcome["gradient"] < TOLERANCE, outcome
    assert outcome["trained"] < TOLERANCE, outcome


@pytest.mark.parametrize(("model", "plan"), cases(2))
def test_two_ranks_equal_one(outcomes: Any, model: str, plan: str) -> None:
    check(outcomes(model, 2)[plan])


@pytest.mark.parametrize(("model", "plan"), cases(4))
def test_four_ranks_equal_one(outcomes: Any, model: str, plan: str) -> None:
    check(outcomes(model, 4)[plan])


@pytest.mark.slow
@pytest.mark.parametrize(("model", "plan"), cases(8))
def test_eight_ranks_equal_one(outcomes: Any, model: str, plan: str) -> None:
    check(outcomes(model, 8)[plan])
