"""The assignment: known patterns come out, and it is the optimum."""

from __future__ import annotations

import re
from functools import cache
from itertools import product
from typing import Any

import pytest
import torch
from sharding_cases import block, whole_class
from torch import fx
from torch._subclasses import FakeTensorMode

from galvatron_compile.errors import ShapeError, UnsupportedError
from galvatron_compile.graph import LayerClass
from galvatron_compile.passes.sharding import ShardedLayer, shard_layer
from galvatron_compile.passes.sharding.assignment import solve, total_price
from galvatron_compile.passes.sharding.problem import build_problem
from galvatron_compile.placement import R, S, V


@cache
def whole(name: str) -> LayerClass:
    return whole_class(name)[0]


def parameters(sharded: ShardedLayer) -> dict[str, str]:
    nodes = sharded.layer_class.graph.graph.find_nodes(op="placeholder")
    named = [n.name for n, k in zip(nodes, sharded.layer_class.kinds, strict=True)
             if k == "parameter"]  # fmt: skip
    return dict(zip(named, map(str, sharded.parameters), strict=True))


def traffic(sharded: ShardedLayer) -> list[str]:
    return [f"{c.direction} {c.kind}" for c in sharded.collectives]


COLUMN_THEN_ROW = ["S(0)", "S(0)", "S(0)", "S(1)", "S(0)", "S(1)"]


def matrices(sharded: ShardedLayer) -> list[str]:
    nodes = sharded.layer_class.graph.graph.find_nodes(op="placeholder")
    found = dict(zip([n.name for n in nodes], nodes, strict=True))
    return [p for n, p in parameters(sharded).items() if found[n].meta["val"].dim() == 2]


@pytest.mark.parametrize("tp", [2, 4])
def test_megatron_column_then_row(tp: int) -> None:
    sharded = shard_layer(block(whole("hidden")), tp, False)
    assert matrices(sharded) == COLUMN_THEN_ROW
    assert traffic(sharded) == ["backward all_reduce", "forward all_reduce"] * 2
    assert all(c.bytes(3) == 3 * 8 * 16 * 8 for c in sharded.collectives)
    assert sharded.inputs[0] == R and sharded.outputs == (R,) and sharded.remarks == ()


def test_megatron_sequence_parallel_gathers_once_for_query_key_and_value() -> None:
    sharded = shard_layer(block(whole("hidden")), 2, True)
    assert matrices(sharded) == COLUMN_THEN_ROW
    there, back = ["forward all_gather", "backward reduce_scatter"], [
        "forward reduce_scatter",
        "backward all_gather",
    ]
    assert traffic(sharded) == (there + back) * 2
    assert sharded.inputs[0] == S(1) and sharded.outputs == (S(1),)
    norms = [p for n, p in parameters(sharded).items() if "fig" in n or "ivy" in n]
    assert norms == ["V"] * 4  # their gradients are sums over the tokens of this rank


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_llama_block_splits_every_matrix(sequence_parallel: bool) -> None:
    sharded = shard_layer(block(whole("llama 2 kv heads")), 2, sequence_parallel)
    rows = [name for name, placement in parameters(sharded).items() if placement == "S(1)"]
    assert sum("o_proj" in name or "down_proj" in name for name in rows) == len(rows) == 2
    assert sorted(matrices(sharded)) == ["S(0)"] * 5 + ["S(1)"] * 2
    assert len(sharded.collectives) == (8 if sequence_parallel else 4)


def test_key_and_value_heads_fewer_than_ranks_still_split_the_weights() -> None:
    sharded = shard_layer(block(whole("llama 1 kv head, tied")), 4, False)
    assert all(placement.startswith("S") for placement in matrices(sharded))
    assert sharded.remarks == ()


def test_gpt2_fused_weight_is_cut_in_three_pieces() -> None:
    sharded = shard_layer(block(whole("gpt2")), 2, False)
    assert matrices(sharded) == ["S(1,3)", "S(0)", "S(1)", "S(0)"]
    assert "S(0,3)" in parameters(sharded).values()
    assert traffic(sharded) == ["backward all_reduce", "forward all_reduce"] * 2


def test_heads_that_do_not_divide_are_legal_and_said() -> None:
    sharded = shard_layer(block(whole("one head")), 2, False)
    assert any("scaled_dot_product_attention" in remark for remark in sharded.remarks)


def test_same_answer_every_time_and_readable() -> None:
    first, second = (shard_layer(block(whole("gpt2")), 2, True) for _ in range(2))
    assert str(first) == str(second)
    text = str(first)
    assert text.startswith("block on tp2.sp: (S(1), ")
    assert "16x48  S(1,3)" in text
    assert re.search(r"^  forward all_gather of \w+: 1024 B/sample$", text, re.MULTILINE)


def test_fixed_parameter_keeps_its_placement_and_costs_at_least_as_much() -> None:
    layer_class = block(whole("hidden"))
    free = shard_layer(layer_class, 2, False)
    for fixed in (R, V, S(1)):
        pinned = shard_layer(layer_class, 2, False, {2: fixed})
        assert pinned.parameters[2] == fixed
        assert pinned.objective >= free.objective
    with pytest.raises(UnsupportedError, match="fixed placements"):
        shard_layer(layer_class, 2, False, {2: S(1, 7)})


def test_sequence_parallel_refusals_say_why() -> None:
    with pytest.raises(UnsupportedError, match="no hidden states"):
        shard_layer(whole("hidden"), 2, True)
    with pytest.raises(ShapeError, match="divisible by 3"):
        shard_layer(block(whole("hidden")), 3, True)
    with pytest.raises(UnsupportedError, match="tp of at least 2"):
        shard_layer(block(whole("hidden")), 1, True)


def random_class(seed: int) -> LayerClass:
    """Up to five operators on 4 x 4 matrices: products with parameters, sums, an activation."""
    generator = torch.Generator().manual_seed(seed)

    def draw(n: int) -> int:
        return int(torch.randint(n, (1,), generator=generator))

    graph = fx.Graph()
    aten = torch.ops.aten
    values = [graph.placeholder(name) for name in ("x", "w0", "w1")]
    made = [values[0]]
    for step in range(2 + draw(2)):
        a, b = made[draw(len(made))], made[draw(len(made))]
        options: list[tuple[Any, tuple[fx.Node, ...]]] = [
            (aten.mm.default, (a, values[1 + step % 2])),
            (aten.linear.default, (a, values[1 + step % 2])),
            (aten.add.Tensor, (a, b)),
            (aten.relu.default, (a,)),
        ]
        made.append(graph.call_function(*options[draw(4) if step else 0]))
    graph.output((made[-1],))
    with FakeTensorMode() as mode:
        for node in values + made[1:]:
            node.meta["val"] = mode.from_tensor(torch.empty(4, 4))
    kinds = ("activation", "parameter", "parameter")
    return LayerClass("tiny", fx.GraphModule({}, graph), kinds, (S(0),), (S(0),))


def brute_force(problem: Any) -> float:
    nodes = list(problem.rules)
    best = float("inf")
    for rules in product(*(problem.rules[node] for node in nodes)):
        price = total_price(problem, dict(zip(nodes, rules, strict=True)))
        best = best if price is None else min(best, price)
    return best


@pytest.mark.parametrize("seed", range(12))
def test_the_optimum_equals_brute_force(seed: int) -> None:
    problem = build_problem(random_class(seed), 2, False, {})
    chosen, objective = solve(problem)
    assert total_price(problem, chosen) == pytest.approx(objective, abs=1e-6)
    assert objective == pytest.approx(brute_force(problem), abs=1e-6)
