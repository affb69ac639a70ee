"""Costs of strategies that divide sequences and experts, each against the formula it stands for."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest
import torch

from galvatron_compile.cluster import ClusterProfile
from galvatron_compile.compiler import understand
from galvatron_compile.costs import LayerCost
from galvatron_compile.models import DecoderShape, load_shape
from galvatron_compile.passes.layer_costs import LayerCosts, Workload
from galvatron_compile.passes.parameter_sizes import ParameterBytes
from galvatron_compile.passes.pricing import overlapped_ms
from galvatron_compile.passes.sharding.table import shard
from galvatron_compile.passes.state_costs import state_bytes, state_times
from galvatron_compile.passes.tally import ATTENTION
from galvatron_compile.precision import Precision
from galvatron_compile.strategy import Strategy

CLUSTER = ClusterProfile.preset("2x4xA100-40GB")
SEQ, HIDDEN, HEADS, KV, BATCH = 512, 256, 8, 4, 8
TOKEN = HIDDEN * 2  # bytes of a token's hidden state in bf16
KV_TOKEN = 2 * HIDDEN // HEADS * KV * 2  # … of its keys and values
FORMS = [Strategy(1, 8), Strategy(2, 4), Strategy(2, 4, True)]


@cache
def costs(experts: int = 0) -> LayerCosts:
    shape = DecoderShape(
        hidden=HIDDEN, layers=2, heads=HEADS, kv_heads=KV, ffn=512, vocab=512, max_positions=SEQ,
        experts=experts, experts_per_token=2 if experts else 0,
    )  # fmt: skip
    model = load_shape("small", shape, SEQ, torch.bfloat16)
    layered = understand(model.module, model.example_inputs, model.loss_fn, Precision.parse("bf16"))
    workload = Workload(8, BATCH, (1,), Precision.parse("bf16"))
    return LayerCosts.of(layered, shard(layered, FORMS), CLUSTER, workload, {})


def block(strategy: Strategy, experts: int = 0) -> LayerCost:
    return costs(experts).cost(costs(experts).layered.layers[1].class_index, strategy, 1)


def test_facts_of_attention_and_experts_are_read_from_the_graph() -> None:
    found = costs(4).messages.facts[costs(4).layered.layers[1].class_index]
    (attention,) = found.attentions
    assert (attention.heads, attention.kv_heads, attention.length) == (HEADS, KV, SEQ)
    assert attention.query_bytes == SEQ * TOKEN
    assert attention.key_value_bytes == SEQ * KV_TOKEN
    assert found.experts is not None and found.experts.num_experts == 4
    assert found.experts.sent_bytes == found.experts.returned_bytes == 2 * SEQ * TOKEN
    assert costs().messages.facts[costs().layered.layers[1].class_index].experts is None


def test_ulysses_sends_queries_keys_values_and_results_both_ways() -> None:
    cost = block(Strategy(1, 4, ulysses=2))
    local = BATCH / 8 * SEQ  # tokens on one rank
    queries = CLUSTER.group_ms("all_to_all", local * TOKEN, 2)
    keys = CLUSTER.group_ms("all_to_all", local * KV_TOKEN / 2, 2)
    assert cost.forward_context_ms == pytest.approx(2 * queries + 2 * keys)
    assert cost.backward_context_ms == pytest.approx(cost.forward_context_ms)
    plain = block(Strategy(1, 8))
    # The same tokens on every rank: computing, keeping and synchronising them is the same.
    for name in ("forward_ms", "saved_bytes", "optimizer_bytes", "step_reduce_ms"):
        assert getattr(cost, name) == pytest.approx(getattr(plain, name))
    again = block(Strategy(1, 4, ulysses=2, recompute="full"))
    assert again.backward_context_ms == pytest.approx(2 * cost.forward_context_ms)


def test_a_ring_hides_behind_attention() -> None:
    strategy = Strategy(1, 2, cp=4)
    cost = block(strategy)
    hop = CLUSTER.group_ms("p2p", BATCH / 8 * SEQ * KV_TOKEN, 2)
    index = costs().layered.layers[1].class_index
    attention = costs().estimator.part(index, strategy, BATCH / 8, ATTENTION)
    slowdown = CLUSTER.overlap_slowdown
    expected = overlapped_ms(3 * hop, attention.forward_ms, slowdown) - attention.forward_ms
    assert cost.forward_context_ms == pytest.approx(expected)
    across = block(Strategy(1, 1, cp=8))  # through both nodes: the slow link counts
    assert across.forward_context_ms > 2 * cost.forward_context_ms


def test_heads_and_lengths_that_do_not_divide_are_refused_with_the_reason() -> None:
    index = costs().layered.layers[1].class_index
    reason = costs().why_not(index, Strategy(1, 1, ulysses=8))
    assert reason is not None and "4 key-value heads" in reason
    assert costs().why_not(index, Strategy(1, 2, ulysses=4)) is None
    reason = costs().why_not(index, Strategy(1, 1, cp=3 * 8))
    assert reason is not None and "sequence of 512 does not divide" in reason
    mixture = costs(4).layered.layers[1].class_index
    assert costs(4).why_not(mixture, Strategy(1, 8, ep=4)) is None
    reason = costs(4).why_not(mixture, Strategy(1, 8, ep=8))
    assert reason == "ep8 does not divide 4 experts"


def test_experts_are_sent_their_tokens_and_keep_a_share_of_the_states() -> None:
    whole, parts = block(Strategy(1, 8), 4), block(Strategy(1, 8, ep=4), 4)
    sent = CLUSTER.group_ms("all_to_all", BATCH / 8 * 2 * SEQ * TOKEN, 4)
    assert whole.forward_expert_ms == 0
    assert parts.forward_expert_ms == pytest.approx(2 * sent)
    expert_bytes = 4 * 3 * HIDDEN * 512 * 4  # fp32 masters of four experts' three matrices
    assert whole.optimizer_bytes - parts.optimizer_bytes == pytest.approx(
        2 * expert_bytes * 3 / 4
    )
    assert parts.step_reduce_ms < whole.step_reduce_ms


def test_zero_divides_over_all_ranks_that_hold_the_same_parameters() -> None:
    shared, experts = ParameterBytes(200, 400, 400), ParameterBytes(800, 1600, 1600)
    estimate = costs().estimator.estimate(0, FORMS[0], 1)
    found = state_bytes((shared, experts), Strategy(1, 4, zero=1, ulysses=2, ep=4), estimate)
    # 8 data ranks share the common states; each expert quarter has 2 copies.
    assert found["optimizer_bytes"] == 2 * (400 // 8 + 1600 // 4 // 2)
    assert found["parameter_bytes"] == 400 // 8 + 200 + 1600 // 4 // 2 + 800 // 4
    times = state_times(CLUSTER, (shared, experts), Strategy(1, 8, zero=3, ep=4))
    gathers = CLUSTER.group_ms("all_gather", 200, 8), CLUSTER.group_ms("all_gather", 200, 2, 4)
    assert times["forward_gather_ms"] == pytest.approx(sum(gathers))


def test_stages_pay_for_what_crosses_between_them() -> None:
    base = costs()
    index = base.layered.layers[1].class_index
    two = base.for_workload(Workload(4, BATCH, (1,), Precision.parse("bf16"), pp=2))
    cost = two.cost(index, Strategy(1, 4), 1)
    hidden = CLUSTER.group_ms("p2p", BATCH / 4 * SEQ * TOKEN, 2, 4)
    assert cost.forward_send_ms == pytest.approx(hidden) == cost.backward_send_ms
    assert block(Strategy(1, 8)).forward_send_ms == 0


def test_tied_parameters_are_held_once_on_one_stage_and_summed_between_two() -> None:
    shape = DecoderShape(
        hidden=HIDDEN, layers=2, heads=HEADS, kv_heads=KV, ffn=512, vocab=512, max_positions=SEQ,
        tied=True,
    )  # fmt: skip
    model = load_shape("tied", shape, SEQ, torch.bfloat16)
    precision = Precision.parse("bf16")
    layered = understand(model.module, model.example_inputs, model.loss_fn, precision)
    workload = Workload(8, BATCH, (1,), precision)
    found = LayerCosts.of(layered, shard(layered, FORMS), CLUSTER, workload, {})
    per_layer = [found.cost(layer.class_index, Strategy(1, 8), 1) for layer in layered.layers]
    assert sum(cost.optimizer_bytes for cost in per_layer) == 8 * model.num_parameters
    two = found.for_workload(Workload(4, BATCH, (1,), precision, pp=2))
    ends = [two.cost(layered.layers[i].class_index, Strategy(1, 4), 1) for i in (0, -1)]
    table = 512 * HIDDEN * 4
    assert [cost.gradient_bytes >= table for cost in ends] == [True, True]
    summed = CLUSTER.group_ms("all_reduce", table, 2, 4)
    alone = CLUSTER.group_ms("all_reduce", ends[0].gradient_bytes, 4)
    assert ends[0].step_reduce_ms == pytest.approx(alone + summed)


def test_selective_recompute_repeats_the_messages_whose_results_it_does_not_keep() -> None:
    for strategy in (Strategy(2, 4, True), Strategy(1, 4, ulysses=2)):
        none, some, full = (
            block(replace(strategy, recompute=word)) for word in ("none", "selective", "full")
        )
        ours = [c.backward_comm_ms + c.backward_context_ms for c in (none, some, full)]
        assert ours[0] < ours[1] < ours[2]
