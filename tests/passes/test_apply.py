"""Localised graphs against the whole graph: real gloo ranks, float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from sharding_cases import BATCH, SEQ, block, largest_error, values_of, whole_class
from torch import fx

from galvatron_compile.graph import LayerClass, note
from galvatron_compile.mesh import Axis
from galvatron_compile.operators import seeded
from galvatron_compile.passes.sharding import gather_batch, localise, shard_layer


def errors_on_rank(name: str, size: int) -> dict[str, float]:
    """Whole model on tp, its block on tp and on tp with sequence parallel; from one capture."""
    import torch.distributed as dist

    axis = Axis("tp", tuple(range(size)), dist.get_rank(), dist.group.WORLD)
    whole, values = whole_class(name)
    part = block(whole)
    part_values = values_of(part, whole, values)
    return {
        "whole": largest_error(shard_layer(whole, size, False), axis, values),
        "block": largest_error(shard_layer(part, size, False), axis, part_values),
        "block.sp": largest_error(shard_layer(part, size, True), axis, part_values),
    }


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("hidden", 2),
        ("llama 2 kv heads", 2),
        pytest.param("gpt2", 2, marks=pytest.mark.slow),  # also in tests/equivalence
        ("one head", 4),
        ("llama 1 kv head, tied", 4),
    ],
)
def test_output_and_gradients_equal_one_device(ranks: Any, name: str, size: int) -> None:
    for errors in ranks(size).run(errors_on_rank, name, size):
        assert max(errors.values()) < 1e-9, errors


@pytest.fixture(scope="module")
def dropout() -> tuple[LayerClass, list[torch.Tensor]]:
    whole, values = whole_class("dropout")
    part = block(whole)
    return part, values_of(part, whole, values)


def seeded_nodes(module: fx.GraphModule) -> list[fx.Node]:
    return [node for node in module.graph.nodes if node.target is seeded]


def test_axis_of_one_rank_runs_the_same_operators(dropout: Any) -> None:
    layer_class, values = dropout
    module = localise(shard_layer(layer_class, 1, False), Axis("tp1", (0,), 0))
    before = [n.target for n in layer_class.graph.graph.nodes if n.op == "call_function"]
    after = [
        n.args[0] if n.target is seeded else n.target
        for n in module.graph.nodes
        if n.op == "call_function"
    ]
    assert after == before
    first, second = module(*values, 3)[0], module(*values, 3)[0]
    assert torch.equal(first, second) and not torch.equal(first, module(*values, 4)[0])


def test_masks_differ_over_the_axis_only_where_the_value_is_sharded(dropout: Any) -> None:
    axis = Axis.dry_run("tp2", 2)
    plain = localise(shard_layer(dropout[0], 2, False), axis)
    sequence = localise(shard_layer(dropout[0], 2, True), axis)
    coordinates = [str(node.args[3]) for node in seeded_nodes(plain)]
    assert coordinates == ["0", "axis_tp2"]
    assert {str(node.args[3]) for node in seeded_nodes(sequence)} == {"axis_tp2"}
    offsets = [node.args[2] for node in seeded_nodes(plain)]
    assert offsets == list(range(len(offsets)))


def test_localised_graph_is_uniform_and_annotated(dropout: Any) -> None:
    sharded = shard_layer(dropout[0], 2, True)
    module = localise(sharded, Axis.dry_run("tp2", 2, 1))
    placeholders = module.graph.find_nodes(op="placeholder")
    assert placeholders[-1].name == "seed" and isinstance(module.axis_tp2, Axis)
    assert placeholders[0].meta["val"].shape[1] == SEQ // 2
    for node in module.graph.nodes:
        if node.op == "call_function":
            assert "val" in node.meta, node
    reduced = next(n for n in module.graph.nodes if "reduce_scatter" in n.name)
    assert reduced.meta["val"].shape[1] == SEQ // 2
    assert reduced.meta["custom"]["galvatron"]["conversion"] == "P→S(1)"


def test_conversions_are_shared_by_their_consumers(dropout: Any) -> None:
    module = localise(shard_layer(dropout[0], 2, True), Axis.dry_run("tp2", 2))
    gathers = [n for n in module.graph.nodes if getattr(n.target, "__name__", "") == "all_gather"]
    assert sorted(len(node.users) for node in gathers) == [1, 3]


def test_localise_refuses_an_axis_of_another_size(dropout: Any) -> None:
    with pytest.raises(ValueError, match="sharded over 2 ranks, tp4 has 4"):
        localise(shard_layer(dropout[0], 2, False), Axis.dry_run("tp4", 4))


def aten() -> Any:
    from torch import ops  # a function that mentions torch.ops does not pickle

    return ops.aten


def mixes_samples() -> fx.GraphModule:
    """``x - mean over the batch``, with the notes that the batch pass would leave."""
    from torch._subclasses import FakeTensorMode

    graph = fx.Graph()
    x = graph.placeholder("x")
    mean = graph.call_function(aten().mean.dim, (x, [0], True))
    difference = graph.call_function(aten().sub.Tensor, (x, mean))
    graph.output((difference,))
    with FakeTensorMode() as mode:
        x.meta["val"] = mode.from_tensor(torch.empty(BATCH, 3))
        mean.meta["val"] = mode.from_tensor(torch.empty(1, 3))
        difference.meta["val"] = x.meta["val"]
    note(x, data="S(0)", differentiable=True)
    note(mean, data="R", data_inputs=["R"], differentiable=True)
    note(difference, data="S(0)", data_inputs=["S(0)", "V"], differentiable=True)
    return fx.GraphModule({}, graph)


def centre_on_rank() -> float:
    import torch.distributed as dist

    axis = Axis("dp2", (0, 1), dist.get_rank(), dist.group.WORLD)
    whole = torch.arange(2 * BATCH * 3, dtype=torch.float64).reshape(2 * BATCH, 3).square()
    want = whole.clone().requires_grad_()
    (want - want.mean(0, keepdim=True)).square().sum().backward()
    block_rows = slice(axis.index * BATCH, (axis.index + 1) * BATCH)
    x = whole[block_rows].clone().requires_grad_()
    (result,) = gather_batch(mixes_samples(), axis)(x)
    result.square().sum().backward()
    assert x.grad is not None and want.grad is not None
    return float((x.grad - want.grad[block_rows]).abs().max() / want.grad.abs().max())


def test_operators_that_mix_samples_run_on_the_gathered_batch(ranks: Any) -> None:
    assert max(ranks(2).run(centre_on_rank)) < 1e-12


def test_nothing_to_gather_leaves_the_graph_alone() -> None:
    module = mixes_samples()
    assert gather_batch(module, Axis("dp1", (0,), 0)) is module
