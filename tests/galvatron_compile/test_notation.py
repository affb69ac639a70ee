"""The compact notation: what it means, what it refuses and how, and its inverse."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from galvatron_compile.errors import NotationError, PlanError
from galvatron_compile.notation import format, layer_roles, parse
from galvatron_compile.passes.strategies import enumerate_strategies
from galvatron_compile.plans import Plan, Stage
from galvatron_compile.strategy import Strategy

NAMES = ("tokens", "h.0", "h.1", "h.2", "h.3", "ln", "out")


def strategies(text: str, names: tuple[str, ...] = NAMES, world_size: int = 4) -> list[str]:
    return [str(strategy) for strategy in parse(text, names, world_size, 64).strategies]


def test_one_strategy_is_for_all_layers() -> None:
    plan = parse("tp2.dp2.zero3", NAMES, 4, 64, "finger")
    assert set(plan.strategies) == {Strategy(2, 2, False, 3)}
    assert (plan.num_micro_batches, plan.model, plan.layers) == (1, "finger", NAMES)


def test_a_later_clause_overrides_an_earlier_one() -> None:
    some = "dp4.zero2.recompute"
    assert strategies("all: dp4.zero2; 0-3: dp4.zero2.recompute") == [some] * 4 + ["dp4.zero2"] * 3
    assert strategies("0-3: tp4; all: dp4") == ["dp4"] * 7


def test_layers_are_selected_by_place_index_and_name() -> None:
    text = "blocks: tp2.sp.dp2; embedding: dp4; norm, head: tp4; 2 , 4: tp2; micro=2"
    expected = ["dp4", "tp2.sp.dp2", "tp2.dp2", "tp2.sp.dp2", "tp2.dp2", "tp4", "tp4"]
    assert strategies(text) == expected
    assert parse(text, NAMES, 4, 64).num_micro_batches == 2
    assert strategies("dp4; h.1, out: tp4")[2::4] == ["tp4", "tp4"]


def test_a_layer_called_like_a_place_is_meant() -> None:
    names = ("head", "h.0", "h.1", "last")
    assert strategies("dp4; head: tp4", names) == ["tp4", "dp4", "dp4", "dp4"]
    assert strategies("dp4; 0: tp4", ("x", "0")) == ["tp4", "dp4"]


def test_missing_dp_is_the_rest_of_the_ranks() -> None:
    assert strategies("tp2", world_size=8)[0] == "tp2.dp4"
    assert strategies("recompute", world_size=1)[0] == "dp1.recompute"


def test_places_of_a_model_with_one_layer_after_the_blocks() -> None:
    roles = layer_roles(("emb", "block0", "block1", "head_and_loss"))
    assert [list(roles[role]) for role in ("embedding", "blocks", "norm", "head")] == [
        [0],
        [1, 2],
        [],
        [3],
    ]


@pytest.mark.parametrize(
    ("text", "at", "message"),
    [
        ("tp2.dpp2.zero3", "dpp2", r"expected a word of a strategy .* did you mean 'dp2'\?"),
        ("tp2.recompte", "recompte", "did you mean 'recompute'"),
        ("tp2..dp2", ".dp2", "got nothing"),
        ("tp.dp2", "tp", "tp needs a degree of at least 1, for example tp2"),
        ("tp0", "tp0", "tp needs a degree of at least 1"),
        ("zero4", "zero4", "zero0 to zero3"),
        ("tp2.dp4", "tp2", "uses 8 ranks, but there are 4; write dp2 or leave dp out"),
        ("tp3", "tp3", "tp3 does not divide 4 ranks"),
        ("dp4.sp", "dp4", "sequence parallel needs tp of at least 2"),
        ("dp4; all: tp4.zero1", "tp4", "zero1 needs dp of at least 2"),
        ("tp2.tp2", "tp2", "tp is given twice"),
        ("dp4; blcks: tp4", "blcks", "did you mean 'blocks'"),
        ("dp4; h.7: tp4", "h.7", "did you mean 'h."),
        ("dp4; 5-9: tp4", "5-9", "layer 9 does not exist; layers are 0-6"),
        ("dp4; 3-1: tp4", "3-1", "runs backwards; write 1-3"),
        ("dp4; : tp4", ": tp4", "expected layers"),
        ("dp4; 1: 2: tp4", "tp4", "one ':' between"),
        ("dp4; micro=0", "0", "whole number from 1 on, got '0'"),
        ("dp4; mikro=2", "mikro", "did you mean 'micro'"),
        ("dp4; micro=2; micro=4", "micro=4", "micro is given twice"),
        ("dp4;", None, "expected a clause"),
    ],
)
def test_errors_say_what_was_expected_and_point_at_it(
    text: str, at: str | None, message: str
) -> None:
    with pytest.raises(NotationError, match=message) as error:
        parse(text, NAMES, 4, 64)
    shown, caret = str(error.value).splitlines()[-2:]
    assert shown.strip() == text
    position = len(text) if at is None else text.rindex(at)
    assert caret.index("^") - 2 == position


def test_every_kind_of_parallelism_has_a_word() -> None:
    plan = parse("ulysses2.cp2.ep4.zero3.selective; pp=2; schedule=gpipe; micro=4", NAMES, 16, 64)
    assert plan.strategies[0] == Strategy(1, 2, False, 3, "selective", ulysses=2, cp=2, ep=4)
    assert plan.stages == (Stage(0, 3), Stage(3, 7)) and plan.schedule == "gpipe"
    assert format(plan) == (
        "ulysses2.cp2.ep4.dp2.zero3.selective; micro=4; stages=3,4; schedule=gpipe"
    )


def test_virtual_stages() -> None:
    plan = parse("dp2; pp=2; virtual=2; schedule=interleaved; micro=4", NAMES, 4, 64)
    assert (plan.pp, plan.num_stages, plan.virtual) == (2, 4, 2)
    assert plan.group_layers(0) == (0, 3, 4) and plan.group_layers(1) == (1, 2, 5, 6)
    assert parse(format(plan), NAMES, 4, 64) == plan


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("tp2.pp2", "write '; pp=2' after"),
        ("dp4; pp=3", "3 stages do not divide 4 ranks"),
        ("dp4; pp=8", "7 layers do not fill 8 stages"),
        ("dp2; stages=3,3", "the stages have 6 layers, the model 7"),
        ("dp2; pp=2; stages=3,4", "both given"),
        ("dp2; pp=2; schedule=1f1c", "did you mean '1f1b'"),
        ("dp4.recompute.selective", "given twice"),
        ("ulysses3", "ulysses3 does not divide 4 ranks"),
    ],
)
def test_pipeline_errors(text: str, message: str) -> None:
    with pytest.raises(NotationError, match=message):
        parse(text, NAMES, 4, 64)


def test_layers_without_strategy_are_listed() -> None:
    with pytest.raises(NotationError, match=r"no strategy for layers 0,5-6 \('tokens' .*all: dp4"):
        parse("blocks: tp4", NAMES, 4, 64)


def test_a_batch_that_does_not_split_is_the_plans_error() -> None:
    with pytest.raises(PlanError, match="a multiple of 12"):
        parse("dp4; micro=3", NAMES, 4, 64)


def test_a_place_that_the_model_lacks_is_refused() -> None:
    with pytest.raises(NotationError, match="no layers known as 'embedding'"):
        parse("dp4; embedding: tp4", ("h.0", "h.1"), 4, 64)


plans = st.integers(1, 8).flatmap(
    lambda world_size: st.builds(
        lambda names, pool, micro: Plan(
            "m", world_size, world_size * micro * 12, micro, tuple(names), tuple(pool[: len(names)])
        ),
        st.lists(st.sampled_from(["a", "0", "all", "h.1", "x;y", "p:q", "head"]), min_size=1),
        st.lists(st.sampled_from(enumerate_strategies(world_size)[:5]), min_size=60, max_size=60),
        st.integers(1, 6),
    )
)


@given(plans.filter(lambda plan: len(plan.layers) <= 60))
def test_format_is_the_inverse_of_parse(plan: Plan) -> None:
    text = format(plan)
    again = parse(text, plan.layers, plan.world_size, plan.global_batch_size, plan.model)
    assert again == plan
    assert format(again) == text


def test_format_is_short() -> None:
    assert format(parse("tp2.dp2", NAMES, 4, 64)) == "tp2.dp2"
    text = "0-1,6: tp4; all: dp4.zero1; 0-1,6: tp4; micro=2"
    assert format(parse(text, NAMES, 4, 64)) == "all: dp4.zero1; 0-1,6: tp4; micro=2"
