"""Actions and outlines: what they name, what they refuse, and how a list prints."""

from __future__ import annotations

from dataclasses import replace
from typing import get_args

import pytest

from galvatron_compile import actions
from galvatron_compile.actions import Action, LayerOutline, Outline, UnitOutline, format_actions
from galvatron_compile.errors import PlanError

OUTLINE = Outline(
    chunks=((2,), (6,)),
    layers={2: LayerOutline("block", (0,)), 6: LayerOutline("head", (1, 0))},
    units=(UnitOutline("block", zero=3), UnitOutline("head")),
    num_micro_batches=4,
    schedule="interleaved",
    pp=2,
    group=1,
)


def test_every_kind_is_about_a_layer_a_unit_or_a_stage() -> None:
    kinds = (actions.COMPUTE, actions.UNIT, actions.STAGE)
    assert set().union(*kinds) == set(get_args(actions.Kind))
    assert sum(map(len, kinds)) == len(get_args(actions.Kind))


def test_chunks_are_every_other_stage() -> None:
    assert OUTLINE.num_stages == 4
    assert [OUTLINE.stage_of(chunk) for chunk in (0, 1)] == [1, 3]


def test_a_list_prints_names_and_micro_batches() -> None:
    listed = [
        Action("gather", 1), Action("wait_activations", 3, 0), Action("forward", 6, 0),
        Action("reduce", 0),
    ]  # fmt: skip
    assert format_actions(OUTLINE, listed).splitlines() == [
        "   0  gather              parameters of head",
        "   1  wait_activations    stage 3 @0",
        "   2  forward             head @0",
        "   3  reduce              parameters of block",
    ]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"num_micro_batches": 0}, "needs micro-batches and a group below pp=2, got 0 and 1"),
        ({"group": 2}, "a group below pp=2, got 4 and 2"),
        ({"group": -1}, "got 4 and -1"),
        ({"units": (UnitOutline("block"),)}, "layer 'head' uses a unit that is not in the outline"),
    ],
)
def test_what_does_not_fit_together_is_refused(changed: dict[str, object], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        replace(OUTLINE, **changed)  # type: ignore[arg-type]
