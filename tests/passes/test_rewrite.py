"""rewrite obeys the plan: the printed program is the golden one, its pieces are what was asked."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from galvatron_compile import notation
from galvatron_compile.compiler import understand
from galvatron_compile.graph import LayeredGraph
from galvatron_compile.interpret import run_graph
from galvatron_compile.passes.rewrite import make_mesh, mesh_degrees, rewrite
from galvatron_compile.passes.sharding.table import shard
from galvatron_compile.plans import Plan
from galvatron_compile.precision import Precision
from galvatron_compile.program import StageProgram

GOLDEN = Path(__file__).parents[1] / "golden"
MIXED = "all: dp2; 1: tp2; 2: dp2.zero3.recompute"


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4)
        self.up, self.down = nn.Linear(4, 8), nn.Linear(8, 4, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.relu(self.up(self.norm(x))))


class Net(nn.Module):
    """An embedding, two blocks without attention, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(6, 4)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(4, 6, bias=False)

    def forward(self, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        x = self.table(ids)
        for block in self.blocks:
            x = block(x)
        return F.cross_entropy(self.head(x).flatten(0, 1), labels.flatten())


def batch() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 6, (4, 2), generator=generator)
    return {"ids": ids, "labels": ids.roll(1, 1)}


@pytest.fixture(scope="module")
def layered() -> LayeredGraph:
    torch.manual_seed(0)
    return understand(Net().double(), batch(), None, Precision())


def plan_of(layered: LayeredGraph, text: str, world_size: int) -> Plan:
    return notation.parse(text, [layer.name for layer in layered.layers], world_size, 4)


def program_of(
    layered: LayeredGraph, text: str, world_size: int = 2, rank: int = 0
) -> StageProgram:
    """The program of a rank that is only played: on dry axes nothing is sent."""
    plan = plan_of(layered, text, world_size)
    mesh = make_mesh(layered, plan, world_size, rank, dry=True)
    shardings = shard(layered, tuple(dict.fromkeys(plan.strategies)))
    return rewrite(layered, plan, mesh, shardings, Precision(), torch.device("cpu"))


def test_the_graph_before_rewriting_is_the_golden_one(layered: LayeredGraph) -> None:
    assert f"{layered.graph}\n" == (GOLDEN / "program_before.txt").read_text(encoding="utf-8")


def test_the_printed_program_is_the_golden_one(layered: LayeredGraph) -> None:
    text = str(program_of(layered, MIXED))
    assert f"{text}\n" == (GOLDEN / "program_mixed.txt").read_text(encoding="utf-8")


def test_every_rank_has_the_same_program(layered: LayeredGraph) -> None:
    texts = []
    for rank in range(4):
        text = str(program_of(layered, "all: dp4; 1: tp2.dp2; 2: tp4", 4, rank))
        title, rest = text.split("\n", 1)
        assert f"rank {rank} of 4" in title
        # A rank's place on the data axis is a constant: it decides what dropout draws.
        texts.append(re.sub(r"layer_seed\((seed, \d+), \d+\)", r"layer_seed(\1)", rest))
    assert texts == texts[:1] * 4


def test_a_program_for_one_rank_computes_the_model(layered: LayeredGraph) -> None:
    expected = run_graph(layered.graph, batch())
    model = program_of(layered, "all: dp1; 2: dp1.recompute", 1)
    assert model.denominators is not None
    leaves = [batch()[name] for name in model.inputs.names]
    (stage,) = model.stages
    for module in (stage.module, stage.evaluation):
        (loss,) = module(*leaves, *model.denominators(*leaves), 0)
        torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)


def test_layers_of_one_class_and_strategy_share_a_graph(layered: LayeredGraph) -> None:
    assert len(program_of(layered, "dp2").layer_graphs) == 3
    assert len(program_of(layered, "all: dp2; 1: dp2.zero3.recompute").layer_graphs) == 3
    assert len(program_of(layered, MIXED).layer_graphs) == 4


def test_parameters_lie_as_the_strategies_say(layered: LayeredGraph) -> None:
    units = program_of(layered, MIXED).units
    stages = {unit.layouts[0].name: unit.zero for unit in units}
    assert [stages[name] for name in ("table.weight", "blocks.0.norm.weight")] == [0, 0]
    assert stages["blocks.1.norm.weight"] == 3
    layouts = {layout.name: layout for unit in units for layout in unit.layouts}
    assert layouts["blocks.0.up.weight"].tp == 2
    assert str(layouts["blocks.0.up.weight"].tensor) == "S(0)"
    assert str(layouts["blocks.0.down.weight"].tensor) == "S(1)"
    assert not layouts["blocks.0.norm.weight"].tensor.is_shard
    assert layouts["blocks.1.up.weight"].dp == 2


@pytest.mark.parametrize(
    ("text", "world_size", "degrees"),
    [
        ("dp2", 2, [1]),
        ("all: dp2; 1: tp2", 2, [1, 2]),
        ("all: tp2.dp2; 1: tp4", 4, [2, 4]),
        ("all: tp2.dp6; 1: tp3.dp4", 12, [2, 3, 6]),
    ],
)
def test_axes_are_made_for_the_degrees_and_what_lies_between(
    layered: LayeredGraph, text: str, world_size: int, degrees: list[int]
) -> None:
    plan = notation.parse(text, [layer.name for layer in layered.layers], world_size, 12)
    assert mesh_degrees(plan) == degrees
