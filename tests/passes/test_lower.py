"""A lowered program gives the numbers of the rewritten graphs, which are its oracle.

On dry axes nothing is sent, and both sides compute with what they hold, so that shapes and
arithmetic of every conversion can be compared in one process, for any number of ranks.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from galvatron_compile import notation
from galvatron_compile.compiler import understand
from galvatron_compile.executor import Executor
from galvatron_compile.graph import LayeredGraph
from galvatron_compile.lowered import LoweredProgram
from galvatron_compile.lowered_piece import LoweredPiece
from galvatron_compile.parallel_model import ParallelModel
from galvatron_compile.passes.lower import Traced, lower
from galvatron_compile.passes.rewrite import make_mesh, rewrite
from galvatron_compile.passes.sharding.table import ShardingTable, shard
from galvatron_compile.pieces import EagerPiece
from galvatron_compile.precision import Precision
from galvatron_compile.program import StageProgram

TESTS = Path(__file__).parents[1]
BATCH = 8
PLANS = [
    "dp4", "tp4", "tp4.sp", "tp2.sp.dp2.recompute",
    "all: tp2.dp2; 1: dp4; 2: tp4.recompute; micro=2",
    "all: dp4; 1: tp4.sp; 2: tp2.sp.dp2; micro=2",
]  # fmt: skip


class Odd:
    """The equivalence matrix's GPT with dropout, and forms of its layers for all plans."""

    def __init__(self) -> None:
        folder = str(TESTS / "equivalence")
        if folder not in sys.path:
            sys.path.insert(0, folder)
        import models

        torch.manual_seed(0)
        self.batch = models.odd_gpt().batch
        model = models.OddGPT(width=16, heads=4, depth=2, dropout=0.3).double()
        self.layered = understand(model, self.batch, None, Precision())
        self.names = [layer.name for layer in self.layered.layers]
        plans = [self.plan(text) for text in PLANS]
        self.shardings = shard(self.layered, {s for plan in plans for s in plan.strategies})

    def plan(self, text: str) -> Any:
        return notation.parse(text, self.names, 4, BATCH)

    def program(self, text: str) -> StageProgram:
        return program_of(self.layered, self.shardings, self.plan(text), rank=1)


def program_of(
    layered: LayeredGraph, shardings: ShardingTable, plan: Any, rank: int
) -> StageProgram:
    mesh = make_mesh(layered, plan, plan.world_size, rank, dry=True)
    device = torch.device("cpu")
    return rewrite(layered, plan, mesh, shardings, Precision(), device)


@pytest.fixture(scope="module")
def odd() -> Odd:
    return Odd()


def train(lowered: LoweredProgram, batch: dict[str, torch.Tensor]) -> tuple[list, list]:
    """Losses of a step with this rank's first rows of the batch, and all gradients."""
    program = lowered.program
    count = program.plan.num_micro_batches
    rows = BATCH // program.plan.data_size // count
    inputs = []
    for number in range(count):
        leaves = [batch[n][number * rows : (number + 1) * rows] for n in program.inputs.names]
        assert program.denominators is not None
        weights = program.denominators(*leaves)
        named = dict(zip(program.inputs.names, leaves, strict=True))
        inputs.append(named | {f"denominator_{k}": w for k, w in enumerate(weights)})
    executor = Executor(program, lowered.pieces)
    losses = executor.train(lowered.training, inputs, list(range(count)))
    gradients = [bucket.reduced for unit in program.units for bucket in unit.buckets]
    for unit in program.units:
        unit.drop()
    return losses, gradients


@pytest.mark.parametrize("text", PLANS)
def test_a_lowered_program_gives_the_numbers_of_the_eager_one(odd: Odd, text: str) -> None:
    program = odd.program(text)
    eager, traced = lower(program, eager=True), lower(program)
    assert traced.remarks == ()
    assert all(isinstance(piece, LoweredPiece) for piece in traced.pieces.values())
    assert all(isinstance(piece, EagerPiece) for piece in eager.pieces.values())
    wanted, got = train(eager, odd.batch), train(traced, odd.batch)
    torch.testing.assert_close(got[0], wanted[0], rtol=1e-12, atol=0)
    for one, other in zip(got[1], wanted[1], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)
    assert len(got[1]) >= 4
    assert any(gradient.abs().max() > 1e-3 for gradient in got[1])


def test_layers_of_one_class_and_strategy_share_their_graphs(odd: Odd) -> None:
    traced = Traced()
    found = lower(odd.program("all: tp2.dp2; 1: dp4"), traced=traced)
    first, second = found.pieces[1], found.pieces[2]
    assert isinstance(first, LoweredPiece) and isinstance(second, LoweredPiece)
    assert first.graphs is not second.graphs
    alike = lower(odd.program("tp4"), traced=traced)
    one, other = alike.pieces[1], alike.pieces[2]
    assert isinstance(one, LoweredPiece) and isinstance(other, LoweredPiece)
    assert one.graphs is other.graphs
    assert one.graph.parameters != other.graph.parameters
    count = len(traced.found)
    again = lower(odd.program("all: tp4; 1-2: tp4.recompute"), traced=traced)
    assert len(traced.found) == count, "recompute needs no trace of its own"
    assert again.outline.layers[1].recompute


def test_a_program_is_traced_once_for_all_that_share_what_was_traced(
    odd: Odd, monkeypatch: pytest.MonkeyPatch
) -> None:
    traced = Traced()
    lower(odd.program("tp4"), traced=traced)

    def refuse(*arguments: object) -> None:
        raise AssertionError("traced again")

    monkeypatch.setattr("galvatron_compile.passes.lower.cut_in_two", refuse)
    lower(odd.program("tp4"), traced=traced)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4)
        self.up, self.down = nn.Linear(4, 8), nn.Linear(8, 4, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.relu(self.up(self.norm(x))))


class Net(nn.Module):
    """An embedding, two blocks, a head with the embedding's weight."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(6, 4)
        self.blocks = nn.ModuleList([Block(), Block()])

    def forward(self, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        x = self.table(ids)
        for block in self.blocks:
            x = block(x)
        logits = F.linear(x, self.table.weight)
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten())


@pytest.fixture(scope="module")
def net() -> LayeredGraph:
    torch.manual_seed(0)
    ids = torch.randint(0, 6, (4, 2))
    batch = {"ids": ids, "labels": ids.roll(1, 1)}
    return understand(Net().double(), batch, None, Precision())


def pipeline(net: LayeredGraph, rank: int) -> LoweredProgram:
    names = [layer.name for layer in net.layers]
    plan = notation.parse("dp2.zero3; pp=2; micro=2", names, 4, BATCH)
    shardings = shard(net, set(plan.strategies))
    return lower(program_of(net, shardings, plan, rank))


def test_the_printed_pipeline_is_the_golden_one(net: LayeredGraph) -> None:
    """What each group of ranks runs, with its list of actions."""
    text = "\n".join(str(pipeline(net, rank)) for rank in (0, 2))
    assert text == (TESTS / "golden" / "lowered_pipeline.txt").read_text(encoding="utf-8")


def test_ranks_of_a_group_follow_one_list(net: LayeredGraph) -> None:
    lists = [pipeline(net, rank).training for rank in range(4)]
    assert lists[0] == lists[1] and lists[2] == lists[3] and lists[0] != lists[2]


def test_a_backward_graph_is_what_a_person_would_write(net: LayeredGraph) -> None:
    """A block's: no autograd, no parameter kept, two matrix products a weight."""
    piece = pipeline(net, 0).pieces[1]
    assert isinstance(piece, LoweredPiece)
    nodes = piece.graphs.backward.module.graph.nodes
    targets = [str(node.target) for node in nodes if node.op == "call_function"]
    assert sum("mm" in target for target in targets) == 4
    assert not any("detach" in target or "alias" in target for target in targets)
    assert piece.graphs.value_gradients == (True,)
    assert piece.graphs.parameter_gradients == (True,) * 5


class _Looks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        assert gradient.sum().item() < 1e9
        return gradient


class Stubborn(nn.Module):
    """A layer whose backward looks at a number."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Any, *others: Any) -> Any:
        return self.layer(_Looks.apply(x), *others)


def test_a_layer_that_cannot_be_traced_runs_eagerly_and_is_named(net: LayeredGraph) -> None:
    plan = notation.parse("dp1; micro=2", [layer.name for layer in net.layers], 1, BATCH)
    program = program_of(net, shard(net, set(plan.strategies)), plan, rank=0)
    ids = torch.arange(2 * BATCH).reshape(BATCH, 2) % 6
    batch = {"ids": ids, "labels": ids.roll(1, 1)}
    wanted = train(lower(program), batch)
    layers = program.stages[0].module.get_submodule("layers")
    layers.add_module("1", Stubborn(layers.get_submodule("1")))
    lowered = lower(program)
    kinds = {layer: type(piece) for layer, piece in lowered.pieces.items()}
    assert kinds == {0: LoweredPiece, 1: EagerPiece, 2: LoweredPiece, 3: LoweredPiece}
    (remark,) = lowered.remarks
    assert "layer 'blocks.0' cannot be traced" in remark
    assert "_local_scalar_dense" in remark
    assert remark.endswith("it runs under eager autograd")
    assert "\n" not in remark and len(remark) < 200
    got = train(lowered, batch)
    torch.testing.assert_close(got[0], wanted[0], rtol=1e-12, atol=0)
    for one, other in zip(got[1], wanted[1], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)
    assert "layer 'blocks.0'" in ParallelModel(lowered, Precision()).report()
