"""Conversions that move nothing, and what is refused before anything moves."""

from __future__ import annotations

import pytest
import torch
from torch import fx
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from galvatron_compile import collectives
from galvatron_compile.errors import ShapeError
from galvatron_compile.mesh import Axis
from galvatron_compile.placement import P, Placement, R, S, V


def test_symbolic_sizes_and_outers_flow_through_a_dry_axis() -> None:
    axis = Axis.dry_run("tp2", 2)
    mode = FakeTensorMode(shape_env=ShapeEnv(), static_shapes=False)
    x = mode.from_tensor(torch.randn(5, 8, 6))
    batch = x.shape[0]
    assert isinstance(batch, torch.SymInt)
    flat = x.reshape(-1, 6)  # merged batch and sequence: outer is the batch
    local = collectives.shard(flat, 0, batch, axis)
    assert local.shape[0] == batch * 4
    assert collectives.all_gather(local, 0, batch, axis).shape == flat.shape
    assert collectives.reduce_scatter(flat, 0, batch, axis).shape == local.shape
    assert collectives.all_to_all(local, 0, batch, 1, 1, axis).shape[1] == 3


def test_axis_of_one_rank_is_the_identity() -> None:
    axis = Axis("tp1", (0,), 0)
    x = torch.randn(3, 5, requires_grad=True)
    for source, target in [(R, V), (P, R), (S(0), V), (S(0), S(1)), (P, S(1)), (R, P), (V, R)]:
        found = collectives.conversion(source, target)
        assert found is not None
        assert found.function(x, *found.arguments, axis) is x
        assert found.forward_bytes(x.nbytes, 1) == 0


def test_conversions_are_targets_of_fx_nodes() -> None:
    root = torch.nn.Module()
    root.axis_tp2 = Axis.dry_run("tp2", 2, 1)  # type: ignore[assignment]
    graph = fx.Graph(root)
    x = graph.placeholder("x")
    axis = graph.create_node("get_attr", "axis_tp2")  # get_attr() warns of plain objects
    graph.output(graph.call_function(collectives.shard, (x, 1, 1, axis)))
    graph.lint()
    value = torch.arange(12.0).view(3, 4)
    assert torch.equal(fx.GraphModule(root, graph)(value), value[:, 2:])


@pytest.mark.parametrize(("source", "target"), [(V, P), (P, V), (S(0), P)])
def test_two_step_conversions_are_not_in_the_table(source: Placement, target: Placement) -> None:
    assert collectives.conversion(source, target) is None


def test_equal_placements_convert_for_free() -> None:
    found = collectives.conversion(S(0, 2), S(0, 2))
    assert found is not None
    assert (found.forward, found.backward, found.arguments) == ("none", "none", ())
    assert found.forward_bytes(64, 4) == found.backward_bytes(64, 4) == 0


def test_indivisible_dim_is_refused() -> None:
    with pytest.raises(ShapeError, match="dim 1 of size 6 cannot be cut into 2 pieces of 2"):
        collectives.shard(torch.randn(4, 6), 1, 2, Axis.dry_run("tp2", 2))


def test_second_derivatives_are_refused_rather_than_wrong() -> None:
    x = torch.randn(4, requires_grad=True)
    y = collectives.all_reduce_gradient(x, Axis.dry_run("tp2", 2)).square().sum()
    (gradient,) = torch.autograd.grad(y, x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()
