"""Tracing records what a layer runs, its collectives and random operators included."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import piece_cases as cases
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, fx, nn

from galvatron_compile import collectives
from galvatron_compile.errors import UnsupportedError
from galvatron_compile.lowered_piece import LoweredPiece
from galvatron_compile.mesh import Axis
from galvatron_compile.passes.lower import bound, cut_in_two
from galvatron_compile.passes.trace import trace
from galvatron_compile.pieces import EagerPiece
from galvatron_compile.random_operators import seeded
from galvatron_compile.torch_private import as_fake
from galvatron_compile.transport import OPS

Call = tuple[Any, tuple[Any, ...]]

# From a value (4, 8) to a value, along one axis; the shapes fit axes of 2 and of 4.
CONVERSIONS: dict[str, Call] = {
    "all_reduce_gradient": (collectives.all_reduce_gradient, ()),
    "all_reduce": (collectives.all_reduce, ()),
    "all_gather": (collectives.all_gather, (1, 2)),
    "all_gather_replicated": (collectives.all_gather_replicated, (0, 1)),
    "shard": (collectives.shard, (1, 2)),
    "shard_varying": (collectives.shard_varying, (0, 1)),
    "reduce_scatter": (collectives.reduce_scatter, (1, 1)),
    "all_to_all": (collectives.all_to_all, (0, 1, 1, 1)),
    "all_to_all_same_dim": (collectives.all_to_all, (1, 1, 1, 2)),
    "split_sum": (collectives.split_sum, ()),
    "average_gradient": (collectives.average_gradient, ()),
}


def converted(name: str, axis: Axis, rank: int) -> cases.Layer:
    """``tanh(conversion(x @ w))``, with values of this rank's own."""
    function, arguments = CONVERSIONS[name]
    root = nn.Module()
    root.axis = axis
    graph = fx.Graph()
    x, w, _ = (graph.placeholder(place) for place in ("x", "w", "seed"))
    y = graph.call_function(torch.mm, (x, w))
    place = graph.create_node("get_attr", "axis")
    y = graph.call_function(function, (y, *arguments, place))
    graph.output((graph.call_function(torch.tanh, (y,)),))
    generator = torch.Generator().manual_seed(rank)
    values = [
        torch.randn(shape, dtype=torch.float64, generator=generator).requires_grad_()
        for shape in ((4, 8), (8, 8))
    ]
    return cases.layer(fx.GraphModule(root, graph), values[:1], values[1:])


def check(case: cases.Layer, axis: Axis) -> list[str]:
    """Both ways give the same; the collectives that run, forward and backward."""
    recorded, cut = cut_in_two(case.graph, as_fake(case.arguments), case.wanted)
    graphs = bound(recorded, cut, {axis.name: axis})
    piece = LoweredPiece(case.graph, graphs)
    eager, tangents = EagerPiece(case.graph), None
    outputs, kept = eager.forward(case.values, case.parameters, 0)
    tangents = cases.tangents([output.requires_grad_() for output in outputs])
    wanted = eager.backward(kept, case.parameters, tangents)
    for way in (cases.whole, cases.in_halves):
        got = way(piece, case, tangents)
        cases.close(got, ([o.detach() for o in outputs], [*wanted[0], *wanted[1]]))
    nodes = [*graphs.forward.graph.nodes, *graphs.backward.module.graph.nodes]
    found = [n.target for n in nodes if getattr(n.target, "__module__", "").endswith("transport")]
    assert not any(str(n.target).startswith("galvatron.") for n in nodes)
    return [target.__name__ for target in found]


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("name", CONVERSIONS)
def test_traced_collectives_have_the_right_shapes(name: str, size: int) -> None:
    axis = Axis.dry_run("tp", size, index=1)
    check(converted(name, axis, 1), axis)


def on_ranks() -> dict[str, list[str]]:
    rank = dist.get_rank()
    axis = Axis("tp", (0, 1), rank, dist.new_group([0, 1]))
    return {name: check(converted(name, axis, rank), axis) for name in CONVERSIONS}


def test_traced_collectives_move_what_eager_ones_move(ranks: Any) -> None:
    found = ranks(2).run(on_ranks)
    assert found[0] == found[1]
    assert {name: calls for name, calls in found[0].items() if "split" not in name} == {
        "all_reduce_gradient": ["all_reduce"],
        "all_reduce": ["all_reduce"],
        "all_gather": ["all_gather", "reduce_scatter"],
        "all_gather_replicated": ["all_gather"],
        "shard": ["all_gather"],
        "shard_varying": [],
        "reduce_scatter": ["reduce_scatter", "all_gather"],
        "all_to_all": ["all_to_all", "all_to_all"],
        "all_to_all_same_dim": ["all_to_all", "all_to_all"],
        "average_gradient": [],
    }


def test_random_operators_keep_their_place_in_the_layer() -> None:
    """Two masks differ, a seed repeats them, another seed does not."""

    def layer(x: Tensor, seed: int) -> tuple[Tensor, ...]:
        op = torch.ops.aten.dropout.default
        return (
            seeded(op, seed, 0, 0, x.exp(), 0.5, True),
            seeded(op, seed, 1, 0, x.exp(), 0.5, True),
        )

    case = cases.written(layer, [torch.zeros(64, dtype=torch.float64, requires_grad=True)])
    piece = case.lowered()

    def masks(seed: int) -> Sequence[Tensor]:
        return [output > 0 for output in piece.forward(case.values, (), seed)[0]]

    first, second = masks(3)
    assert not torch.equal(first, second)
    assert all(map(torch.equal, masks(3), (first, second)))
    assert not torch.equal(masks(4)[0], first)


def test_what_cannot_be_traced_is_refused_with_the_layer_s_name() -> None:
    def layer(x: Tensor, seed: int) -> tuple[Tensor, ...]:
        return (x * torch.ops.aten.item(x.sum()),)

    case = cases.written(layer, [torch.ones(3, dtype=torch.float64, requires_grad=True)])
    with pytest.raises(UnsupportedError, match=r"'layer' cannot be traced.*_local_scalar_dense"):
        trace(case.graph, as_fake(case.arguments), case.wanted)


def test_operators_that_stand_for_collectives_have_no_kernel() -> None:
    """A recorded graph that was not bound to axes must not run."""
    with pytest.raises(NotImplementedError, match="galvatron::all_reduce"):
        OPS.all_reduce(torch.ones(2), "sum", 2, "tp")
