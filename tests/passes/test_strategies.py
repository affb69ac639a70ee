"""The decision tree of strategies."""

from __future__ import annotations

from dataclasses import replace

import pytest

from galvatron_compile.errors import PlanError, ShapeError
from galvatron_compile.passes.strategies import (
    RULES,
    Limits,
    enumerate_strategies,
    enumerate_within,
)


def test_all_strategies_of_two_ranks() -> None:
    plain = ["dp2", "dp2.zero1", "dp2.zero2", "dp2.zero3", "tp2", "tp2.sp"]
    expected = [name + again for name in plain for again in ("", ".recompute")]
    assert [str(strategy) for strategy in enumerate_strategies(2)] == expected


def test_one_rank_only_recomputes_or_not() -> None:
    assert [str(strategy) for strategy in enumerate_strategies(1)] == ["dp1", "dp1.recompute"]


def test_every_strategy_uses_all_ranks_and_none_comes_twice() -> None:
    for world_size in range(1, 13):
        strategies = enumerate_strategies(world_size)
        assert len(set(strategies)) == len(strategies)
        assert all(strategy.num_ranks == world_size for strategy in strategies)
        tps = {strategy.tp for strategy in strategies}
        assert tps == {tp for tp in range(1, world_size + 1) if world_size % tp == 0}


def test_limits_cut_branches() -> None:
    strategies = enumerate_strategies(
        8, global_batch_size=4, max_tp=4, sequence_parallel=False, zero_stages=(3,), recompute=False
    )
    assert [str(strategy) for strategy in strategies] == ["tp2.dp4.zero3", "tp4.dp2.zero3"]
    only = enumerate_strategies(2, zero_stages=(3,), sequence_parallel=False, recompute=False)
    assert [str(strategy) for strategy in only] == ["dp2.zero3", "tp2"]


def test_a_batch_that_no_degree_divides_is_refused_with_the_remedy() -> None:
    with pytest.raises(ShapeError, match=r"global batch of 3 over 8 ranks.* use a multiple of 2"):
        enumerate_strategies(8, global_batch_size=3, max_tp=4)


def test_every_rule_says_why() -> None:
    assert len({rule.name for rule in RULES}) == len(RULES)
    assert all(len(rule.reason) > 20 for rule in RULES)


def test_sequences_are_divided_only_when_samples_run_out() -> None:
    limits = Limits(8, 8, 2, max_tp=1, max_ulysses=8, max_cp=8, zero_stages=(0,))
    names = {str(s) for s in enumerate_within(replace(limits, recompute=("none",)))}
    assert names == {"ulysses2.dp4", "cp2.dp4", "ulysses4.dp2", "ulysses2.cp2.dp2", "cp4.dp2"} | {
        "ulysses8", "ulysses4.cp2", "ulysses2.cp4", "cp8"
    }  # fmt: skip
    whole = enumerate_within(replace(limits, num_micro_batches=1))
    assert all(strategy.ulysses == strategy.cp == 1 for strategy in whole)


def test_rules_that_are_no_proofs_can_be_switched_off() -> None:
    limits = Limits(4, 8, 1, max_tp=1, max_cp=4, zero_stages=(0,), recompute=("none",))
    assert [str(s) for s in enumerate_within(limits)] == ["dp4"]
    kept = replace(limits, keep=("sequence-only-when-samples-run-out",))
    assert [str(s) for s in enumerate_within(kept)] == ["dp4", "cp2.dp2", "cp4"]
    with pytest.raises(PlanError, match=r"'zero-needs-dp' is no rule .* one-user-of-heads"):
        replace(limits, keep=("zero-needs-dp",))


def test_experts_and_heads() -> None:
    limits = Limits(4, max_ulysses=4, experts=(8,), zero_stages=(1,), recompute=("selective",))
    names = {str(s) for s in enumerate_within(limits)}
    assert {"ep4.dp4.zero1.selective", "tp2.ep2.dp2.zero1.selective"} <= names
    assert not any("tp2.ulysses2" in name for name in names)
    mixed = enumerate_within(replace(limits, keep=("one-user-of-heads",)))
    assert any("tp2.ulysses2" in str(strategy) for strategy in mixed)
    assert all(strategy.ep in (1, 2, 4) for strategy in mixed)
