"""The cost table says what the runtime will hold and do."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from galvatron_compile import notation
from galvatron_compile.cluster import ClusterProfile
from galvatron_compile.compiler import understand
from galvatron_compile.costs import CostTable
from galvatron_compile.graph import LayeredGraph, noted
from galvatron_compile.layer_timing import LayerTiming
from galvatron_compile.mesh import Mesh
from galvatron_compile.passes.annotate import Workload, annotate
from galvatron_compile.passes.rewrite import mesh_degrees, rewrite
from galvatron_compile.passes.sharding.table import ShardingTable, shard
from galvatron_compile.passes.strategies import enumerate_strategies
from galvatron_compile.precision import Precision
from galvatron_compile.printer import fingerprint
from galvatron_compile.strategy import Strategy

WIDTH, SEQ, VOCAB, BATCH, WORLD = 32, 8, 64, 8, 2
CLUSTER = ClusterProfile.preset("2xA100-80GB")
STRATEGIES = enumerate_strategies(WORLD, global_batch_size=BATCH)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, 4 * WIDTH)
        self.down = nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(F.gelu(self.up(self.norm(x))))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(VOCAB, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.head = nn.Linear(WIDTH, VOCAB)

    def forward(self, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        x = self.table(ids)
        for block in self.blocks:
            x = block(x)
        return F.cross_entropy(self.head(x).flatten(0, 1), labels.flatten())


@pytest.fixture(scope="module")
def layered() -> LayeredGraph:
    ids = torch.randint(0, VOCAB, (4, SEQ))
    return understand(Net(), {"ids": ids, "labels": ids.clone()}, None, Precision())


@pytest.fixture(scope="module")
def shardings(layered: LayeredGraph) -> ShardingTable:
    return shard(layered, STRATEGIES)


def table_of(
    layered: LayeredGraph, shardings: ShardingTable, precision: str | None = None
) -> CostTable:
    workload = Workload(WORLD, BATCH, (1, 2), Precision.parse(precision))
    return annotate(layered, shardings, CLUSTER, STRATEGIES, workload, {})


@pytest.fixture(scope="module")
def table(layered: LayeredGraph, shardings: ShardingTable) -> CostTable:
    return table_of(layered, shardings)


def block_class(layered: LayeredGraph) -> int:
    return layered.layers[1].class_index


def test_every_legal_choice_is_priced_and_says_from_what(
    layered: LayeredGraph, table: CostTable
) -> None:
    for index in range(len(layered.classes)):
        for strategy in STRATEGIES:
            for count in (1, 2):
                priced = (index, strategy, count) in table.entries
                assert priced != ((index, strategy) in table.illegal)
    assert {cost.source for cost in table.entries.values()} == {"analytic"}


def test_measured_times_take_the_place_of_estimates(
    layered: LayeredGraph, shardings: ShardingTable
) -> None:
    index = block_class(layered)
    timings = {(index, 1, False, 4): LayerTiming(3.0, 7.0)}
    workload = Workload(WORLD, BATCH, (1,), Precision())
    found = annotate(layered, shardings, CLUSTER, STRATEGIES, workload, timings)
    plain = found.entries[index, Strategy(dp=2), 1]
    again = found.entries[index, Strategy(dp=2, recompute="full"), 1]
    assert (plain.source, plain.forward_ms, plain.backward_ms) == ("measured", 3.0, 7.0)
    assert again.backward_ms == 10.0  # recompute runs forward once more
    assert found.entries[index, Strategy(tp=2), 1].source == "analytic"


@pytest.mark.parametrize("precision", [None, "bf16"])
@pytest.mark.parametrize("text", ["dp2", "dp2.zero1", "dp2.zero2", "dp2.zero3", "tp2", "tp2.sp"])
def test_parameter_bytes_are_what_the_units_hold(
    layered: LayeredGraph, shardings: ShardingTable, text: str, precision: str | None
) -> None:
    table = table_of(layered, shardings, precision)
    plan = notation.parse(text, [layer.name for layer in layered.layers], WORLD, BATCH)
    predicted = sum(
        table.entries[layer.class_index, strategy, 1].parameter_bytes
        for layer, strategy in zip(layered.layers, plan.strategies, strict=True)
    )
    mesh = Mesh.create(WORLD, 0, mesh_degrees(plan), dry=True)
    policy = Precision.parse(precision)
    program = rewrite(layered, plan, mesh, shardings, policy, torch.device("cpu"))
    held = 0
    for unit in program.units:
        for bucket in unit.buckets:
            held += bucket.master.untyped_storage().nbytes()
            if not bucket.is_alias:
                held += bucket.buffer.untyped_storage().nbytes()
    assert predicted == pytest.approx(held, rel=0.05)  # buckets are padded to 64 bytes


def test_zero_divides_states_and_recompute_saves_only_inputs(
    layered: LayeredGraph, table: CostTable
) -> None:
    index = block_class(layered)
    cost = {
        zero: table.entries[index, Strategy(dp=2, zero=zero), 1] for zero in (0, 1, 2, 3)
    }
    assert cost[1].optimizer_bytes == cost[0].optimizer_bytes / 2
    assert cost[3].parameter_bytes == cost[0].parameter_bytes / 2
    assert cost[2].gradient_bytes == cost[0].gradient_bytes / 2
    assert cost[3].forward_gather_ms > 0 == cost[2].forward_gather_ms
    assert cost[2].micro_reduce_ms > 0 == cost[1].micro_reduce_ms
    again = table.entries[index, Strategy(dp=2, recompute="full"), 1]
    hidden = BATCH // 2 * SEQ * WIDTH * 4
    assert again.saved_bytes == hidden < cost[0].saved_bytes


def test_tensor_parallel_work_is_halved_and_its_collectives_are_priced(
    layered: LayeredGraph, shardings: ShardingTable, table: CostTable
) -> None:
    index = block_class(layered)
    sharded = shardings.get(index, Strategy(tp=2))
    cost = table.entries[index, Strategy(tp=2), 1]
    expected = sum(
        CLUSTER.collective_ms(item.kind, item.bytes(BATCH), (0, 1))
        for item in sharded.collectives
        if item.direction == "forward"
    )
    assert cost.forward_comm_ms == pytest.approx(expected) and expected > 0
    whole = table.entries[index, Strategy(dp=2), 1].parameter_bytes
    assert cost.parameter_bytes < 0.6 * whole


def test_every_working_node_carries_its_cost(layered: LayeredGraph, table: CostTable) -> None:
    graph = layered.classes[block_class(layered)].graph
    costs = {
        str(node.target): noted(node, "cost") for node in graph.graph.nodes if noted(node, "cost")
    }
    linear = costs["aten.linear.default"]
    assert linear.flops == 2 * SEQ * WIDTH * 4 * WIDTH
    assert "FLOP" in str(linear) and "µs a sample" in str(linear)
    assert table.entries


def test_costs_do_not_change_what_the_model_is(
    layered: LayeredGraph, shardings: ShardingTable
) -> None:
    before = fingerprint(layered)
    slower = replace(CLUSTER, memory=replace(CLUSTER.memory, value=1e9))
    annotate(layered, shardings, slower, STRATEGIES, Workload(2, 8, (1,), Precision()), {})
    assert fingerprint(layered) == before


def test_changing_degree_between_layers_is_priced_both_ways(table: CostTable) -> None:
    narrow, wide = Strategy(dp=2), Strategy(tp=2)
    assert table.resharding_ms[1, narrow, wide, 1] > 0
    assert table.resharding_ms[1, wide, narrow, 1] > 0
    assert (1, narrow, Strategy(dp=2, zero=3), 1) not in table.resharding_ms
