"""What crosses the cuts of a pipeline, and what is made again behind them."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from galvatron_compile import notation
from galvatron_compile.compiler import understand
from galvatron_compile.graph import LayeredGraph, noted
from galvatron_compile.passes.cross import Cuts, ancestors, only, results
from galvatron_compile.passes.rewrite import make_mesh, rewrite
from galvatron_compile.passes.sharding.table import shard
from galvatron_compile.precision import Precision
from galvatron_compile.program import StageProgram

sys.path.insert(0, str(Path(__file__).parents[1] / "galvatron_compile"))
import pipeline_cases as cases

BATCH, LENGTH, WIDTH = cases.BATCH, cases.LENGTH, cases.WIDTH


@pytest.fixture(scope="module")
def layered() -> LayeredGraph:
    return understand(cases.both(), cases.batch(), None, Precision())


def cuts(layered: LayeredGraph, text: str, world_size: int) -> Cuts:
    names = [layer.name for layer in layered.layers]
    return Cuts(layered, notation.parse(text, names, world_size, BATCH))


def test_what_is_used_later_crosses_every_cut_until_then(layered: LayeredGraph) -> None:
    """The first embedding goes on to the head, the encoder's result (add_1) to the decoder."""
    found = cuts(layered, "dp1; pp=8; micro=8", 8)
    assert [layer.name for layer in layered.layers] == [
        "embedding", "encoder.0", "encoder.1", "bridge",
        "decoder.0", "decoder.1", "decoder.2", "head",
    ]  # fmt: skip
    noise = "unsqueeze_2"
    assert [set(found.received(stage)) for stage in range(8)] == [
        set(),
        {"embedding", noise},
        {"embedding", noise, "add"},
        {"embedding", noise, "add_1"},
        {"embedding", noise, "add_1", "tanh_2"},
        {"embedding", noise, "add_1", "add_2"},
        {"embedding", noise, "add_1", "add_3"},
        {"embedding", "add_4"},
    ]


def test_only_what_needs_neither_parameters_nor_chance_is_made_again(
    layered: LayeredGraph,
) -> None:
    found = cuts(layered, "dp1; pp=2; micro=2", 2)
    made = {name: found.remade(name) for layer in layered.layers for name in layer.outputs}
    assert {name for name, again in made.items() if again} == {"cos", "__and__"}  # table and mask
    assert all(found.remade(name) for name in ("ids", "labels", "denominator_0"))  # the batch
    assert found.sources("cos") == () and found.sources("__and__") == ("ids",)
    assert found.is_differentiable("add_1")
    assert not any(map(found.is_differentiable, ("cos", "__and__", "unsqueeze_2")))


def test_the_part_of_a_layer_that_makes_one_value(layered: LayeredGraph) -> None:
    """Of the first layer, which takes ids, the table and the rotary rates."""
    graph = layered.layer_class(layered.layers[0]).graph
    places = layered.layers[0].outputs
    assert places[1:3] == ("cos", "__and__")
    rotary, taken = only(graph, [1])
    assert taken == [2]  # the rates
    (cos,) = rotary(torch.tensor([1.0, 2.0, 3.0, 4.0]))
    assert cos.shape == (LENGTH, WIDTH)
    torch.testing.assert_close(cos[2], torch.tensor([2.0, 4.0, 6.0, 8.0], dtype=cos.dtype).cos())
    mask, taken = only(graph, [2])
    assert taken == [0]  # the ids
    (found,) = mask(torch.tensor([[0, 1, 1, 0, 1, 1]]))
    assert found[0, 4].tolist() == [False, True, True, False, True, False]
    assert "embedding" not in rotary.code + mask.code and "dropout" not in mask.code
    assert len(ancestors(results(graph)[1])) < len(graph.graph.nodes) / 2


def program_of(layered: LayeredGraph, text: str, rank: int, world_size: int = 4) -> StageProgram:
    plan = cuts(layered, text, world_size).plan
    mesh = make_mesh(layered, plan, world_size, rank, dry=True)
    shardings = shard(layered, set(plan.strategies))
    return rewrite(layered, plan, mesh, shardings, Precision(), torch.device("cpu"))


@pytest.mark.parametrize(
    ("text", "rows", "length"),
    [
        ("dp2; stages=4,4; micro=2", 2, LENGTH),
        ("all: dp2; 0-3: tp2; stages=4,4; micro=2", 4, LENGTH),
        ("all: dp2; 0-3: tp2.sp; stages=4,4; micro=2", 4, LENGTH // 2),
        ("all: tp2.sp; 0-3: dp2.zero3; stages=4,4; micro=2", 2, LENGTH),
        ("all: tp2; 1: dp2; stages=4,4; micro=2", 4, LENGTH),
    ],
)
def test_both_sides_of_a_cut_agree_on_what_crosses(
    layered: LayeredGraph, text: str, rows: int, length: int
) -> None:
    """Values cross as the layer that made them left them; the stage behind converts them."""
    for position in range(2):
        (before,) = program_of(layered, text, position).stages
        (behind,) = program_of(layered, text, 2 + position).stages
        assert before.sent == behind.received and before.received == behind.sent == ()
        found = {crossing.name: crossing for crossing in before.sent}
        assert found.keys() == {"embedding", "unsqueeze_2", "add_1", "tanh_2"}
        assert found["add_1"].shape[0] == rows and found["add_1"].shape[2] == WIDTH
        assert found["tanh_2"].shape in {(rows, length, WIDTH), (rows, LENGTH, WIDTH)}
        assert {found[name].differentiable for name in ("embedding", "add_1", "tanh_2")} == {True}
        assert not found["unsqueeze_2"].differentiable
        assert before.sent_as == tuple(n.name for n in before.module.graph.output_node().args[0])
        assert len(behind.received_as) == len(behind.received)


def test_stages_make_masks_and_tables_again(layered: LayeredGraph) -> None:
    """Where they are used, once, from the stage's own share of the batch."""
    text = "dp1; stages=1,1,3,3; micro=4"
    remade = [
        [noted(node, "remade") for node in stage.module.graph.nodes if noted(node, "remade")]
        for rank in range(4)
        for stage in program_of(layered, text, rank).stages
    ]
    assert remade == [
        [],
        ["cos of embedding"],
        ["cos of embedding", "__and__ of embedding"],
        ["__and__ of embedding"],
    ]
