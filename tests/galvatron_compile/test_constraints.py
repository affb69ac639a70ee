"""What a caller fixes or forbids, as text and as rules."""

from __future__ import annotations

import pytest

from galvatron_compile.constraints import Constraints
from galvatron_compile.errors import PlanError
from galvatron_compile.strategy import Strategy


def test_text_becomes_rules_and_text_again() -> None:
    text = "pp=4; tp<=8; zero!=3; recompute=none,selective; together=0-3"
    assert str(Constraints.parse(text)) == text
    assert str(Constraints.parse("  TP <= 8 ;; ")) == "tp<=8"
    assert Constraints.parse("") == Constraints()


def test_strategies_are_allowed_or_not() -> None:
    found = Constraints.parse("tp<=4; zero=1,2; recompute!=full; sp=no; cp=1; dp>=2")
    assert found.allows_strategy(Strategy(4, 2, zero=1, recompute="selective"))
    refused = [
        Strategy(8, 2, zero=1),
        Strategy(4, 2, zero=3),
        Strategy(4, 2, zero=1, recompute="full"),
        Strategy(4, 2, True, 1),
        Strategy(1, 2, zero=1, cp=2),
        Strategy(4, 1),
    ]
    assert not any(map(found.allows_strategy, refused))
    # One data rank has no ZeRO stage to speak of.
    assert Constraints.parse("zero=3").allows_strategy(Strategy(8, 1))


def test_layers_stay_together() -> None:
    found = Constraints.parse("together=2-4; together=6-7")
    assert [layer for layer in range(9) if not found.allows_cut(layer)] == [2, 3, 6]
    with pytest.raises(PlanError, match="the model has layers 0-5 only"):
        found.check(6)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("pp", "is not understood; write for example pp=4"),
        ("zreo=1", "did you mean 'zero'"),
        ("recompute=al", "expected one of none, selective, full"),
        ("schedule<=1f1b", "schedule takes = or !="),
        ("tp<=2,4", "<= takes one number"),
        ("tp=x", "expected whole numbers after tp="),
        ("together=3-1", "for example together=0-3"),
    ],
)
def test_errors_say_what_to_write(text: str, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        Constraints.parse(text)
