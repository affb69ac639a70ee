"""A stage's graph cut into one piece a layer, which together are the stage."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from galvatron_compile import notation
from galvatron_compile.compiler import understand
from galvatron_compile.graph import LayeredGraph
from galvatron_compile.passes.pieces import outline, pieces
from galvatron_compile.passes.rewrite import make_mesh, rewrite
from galvatron_compile.passes.sharding.table import shard
from galvatron_compile.pieces import EagerPiece, PieceGraph
from galvatron_compile.precision import Precision
from galvatron_compile.program import StageProgram
from galvatron_compile.seeds import layer_seed

sys.path.insert(0, str(Path(__file__).parents[1] / "galvatron_compile"))
import pipeline_cases as cases

MIXED = "all: dp2; 1: tp2.sp.recompute; 4: tp2; micro=2"


@pytest.fixture(scope="module")
def layered() -> LayeredGraph:
    model = cases.both()
    model.get_parameter("start.weight").requires_grad_(False)
    model.get_parameter("start.bias").requires_grad_(False)
    return understand(model, cases.batch(), None, Precision())


def program_of(layered: LayeredGraph, text: str, world_size: int, rank: int = 0) -> StageProgram:
    names = [layer.name for layer in layered.layers]
    plan = notation.parse(text, names, world_size, cases.BATCH)
    mesh = make_mesh(layered, plan, world_size, rank, dry=True)
    shardings = shard(layered, set(plan.strategies))
    return rewrite(layered, plan, mesh, shardings, Precision(), torch.device("cpu"))


def run(program: StageProgram, found: tuple[PieceGraph, ...], values: dict[str, Any]) -> Any:
    """The pieces one behind the other; every value is dropped when the pieces say so."""
    held = dict(values)
    for piece in found:
        given = [held[name] for name in piece.values]
        parameters = [program.units[u].working[k] for u, k in piece.parameters]
        seed = layer_seed(5, *piece.seed)
        outputs = piece.module(*given, *parameters, *piece.buffers, seed)
        held.update(zip(piece.outputs, outputs, strict=True))
        for name in piece.drops:
            del held[name]
    return held


@pytest.mark.parametrize("text", ["dp1", MIXED])
def test_the_pieces_one_after_another_are_the_stage(layered: LayeredGraph, text: str) -> None:
    """Conversions between layers belong to the piece behind them; on dry axes they run alone."""
    program = program_of(layered, text, 1 if text == "dp1" else 2)
    (stage,) = program.stages
    found = pieces(program, stage)
    assert [piece.name for piece in found] == list(program.plan.layers)
    rows = cases.BATCH // program.plan.num_micro_batches // program.plan.data_size
    batch = {name: value[:rows] for name, value in cases.batch().items()}
    leaves = [batch[name] for name in program.inputs.names]
    assert program.denominators is not None
    weights = program.denominators(*leaves)
    named = dict(zip(program.inputs.names, leaves, strict=True))
    named |= {f"denominator_{at}": value for at, value in enumerate(weights)}
    (wanted,) = stage.module(*leaves, *weights, 5)
    held = run(program, found, named)
    assert torch.equal(held.pop(found[-1].outputs[0]), wanted)
    assert held.keys() <= named.keys(), "only what no layer takes is left"


def test_pieces_say_what_has_a_gradient(layered: LayeredGraph) -> None:
    program = program_of(layered, "dp1", 1)
    found = {piece.name: piece for piece in pieces(program, program.stages[0])}
    first, bridge, decoder = found["embedding"], found["bridge"], found["decoder.0"]
    assert first.differentiable == (False,) * len(first.values)
    assert sorted(first.returns) == [False, False, False, True]  # of table, mask, noise: none
    assert first.has_trained and first.trains
    assert not bridge.has_trained and bridge.trains  # frozen, but its input has a gradient
    assert sorted(decoder.differentiable) == [False, False, True, True]
    assert found["head"].returns == (True,)
    assert {piece.seed for piece in found.values()} == {(number, 0) for number in range(8)}


def test_values_are_dropped_behind_their_last_use(layered: LayeredGraph) -> None:
    """Those that are sent stay: the encoder's result and the embedding go on to later stages."""
    program = program_of(layered, "dp1; stages=5,3; micro=2", 2)
    (stage,) = program.stages
    found = pieces(program, stage)
    dropped = [name for piece in found for name in piece.drops]
    assert len(dropped) == len(set(dropped))
    assert not set(dropped) & set(stage.sent_as)
    made = {name for piece in found for name in piece.outputs}
    assert made <= set(dropped) | set(stage.sent_as)
    last = {name: piece.name for piece in found for name in piece.values}
    for piece in found:
        assert all(last[name] == piece.name for name in piece.drops)


def test_the_outline_says_what_the_order_depends_on(layered: LayeredGraph) -> None:
    program = program_of(layered, "all: dp2.zero3.recompute; 4-7: tp2; stages=4,4; micro=2", 4, 2)
    graphs = {piece.layer: piece for stage in program.stages for piece in pieces(program, stage)}
    found = outline(program, {layer: EagerPiece(graph) for layer, graph in graphs.items()})
    assert (found.pp, found.group, found.num_stages) == (2, 1, 2)
    assert found.chunks == ((4, 5, 6, 7),) and found.num_micro_batches == 2
    assert [unit.name for unit in found.units] == ["decoder.0", "decoder.1", "decoder.2", "head"]
    assert {unit.zero for unit in found.units} == {0}
    assert not any(unit.gathers or unit.tied or unit.shared for unit in found.units)
    first = program_of(layered, "all: dp2.zero3.recompute; 4-7: tp2; stages=4,4; micro=2", 4, 1)
    graphs = {piece.layer: piece for stage in first.stages for piece in pieces(first, stage)}
    found = outline(first, {layer: EagerPiece(graph) for layer, graph in graphs.items()})
    assert [(unit.zero, unit.gathers) for unit in found.units] == [(3, True)] * 4
    assert all(layer.recompute for layer in found.layers.values())
    assert [unit.trainable for unit in found.units] == [True, True, True, False]
    assert [layer.units for layer in found.layers.values()] == [(0,), (1,), (2,), (3,)]
