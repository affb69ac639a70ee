"""Random operators depend on their three numbers and on nothing else; a graph can do without."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, fx
from torch._subclasses import FakeTensorMode

from galvatron_compile.mesh import Axis, Mesh
from galvatron_compile.random_operators import is_random, seeded, without_dropout

aten = torch.ops.aten


def tensor_axis(size: int) -> Axis:
    return Mesh.create(dist.get_world_size(), dist.get_rank(), [size]).tensor(size)


X = torch.ones(64, 64)
DROPOUT = (aten.dropout.default, 11, 2)


def test_equal_triples_draw_equal_masks_and_every_number_matters() -> None:
    def draw(seed: int, offset: int, coordinate: int | Axis) -> Tensor:
        return seeded(aten.dropout.default, seed, offset, coordinate, X, 0.5, True)

    first = draw(7, 1, 0)
    assert torch.equal(first, draw(7, 1, 0))
    for other in [(8, 1, 0), (7, 2, 0), (7, 1, 1), (1, 7, 0), (0, 7, 1)]:
        agree = (first == draw(*other)).float().mean()
        assert 0.4 < agree < 0.6, "not independent"
    assert torch.equal(draw(7, 1, 3), draw(7, 1, Axis.dry_run("tp4", 4, 3)))


def test_the_default_generator_is_left_as_it_was_even_after_an_error() -> None:
    torch.manual_seed(5)
    state = torch.get_rng_state()
    seeded(*DROPOUT, 0, X, 0.5, True)
    with pytest.raises(RuntimeError):
        seeded(*DROPOUT, 0, X, 1.5, True)
    assert torch.equal(torch.get_rng_state(), state)


def test_gradient_uses_the_mask_of_forward() -> None:
    x = X.clone().requires_grad_()
    y = seeded(*DROPOUT, 0, x, 0.25, True)
    y.sum().backward()
    assert torch.equal(x.grad, y.detach())
    assert y.unique().tolist() == pytest.approx([0.0, 4 / 3])


def test_recompute_repeats_its_masks() -> None:
    def layer(x: Tensor) -> Tensor:
        y = seeded(*DROPOUT, 0, x, 0.5, True)
        return seeded(*DROPOUT[:2], 3, 0, y.sin(), 0.5, True)

    gradients = []
    for recompute in (False, True):
        x = X.clone().requires_grad_()
        y = (
            torch.utils.checkpoint.checkpoint(
                layer, x, use_reentrant=False, preserve_rng_state=False
            )
            if recompute
            else layer(x)
        )
        torch.rand(17)  # other draws between forward and backward change nothing
        y.sum().backward()
        gradients.append(x.grad)
    assert torch.equal(*gradients)


def test_ranks_draw_different_masks_by_coordinate_and_equal_ones_without(ranks) -> None:
    def one_rank() -> tuple[Tensor, Tensor]:
        torch.manual_seed(dist.get_rank())  # the default streams are not in step
        axis = tensor_axis(2)
        masks = [seeded(torch.bernoulli, 1, 2, where, 0.5 * X) for where in (axis, 0)]
        return masks[0], masks[1]

    (sharded, replicated), (other_sharded, other_replicated) = ranks(2).run(one_rank)
    assert torch.equal(replicated, other_replicated)
    assert 0.4 < (sharded == other_sharded).float().mean() < 0.6


def test_attention_dropout_and_factories_are_seeded() -> None:
    q = torch.randn(1, 2, 8, 4)
    attention = aten.scaled_dot_product_attention.default
    draws = [seeded(attention, 1, 1, c, q, q, q, dropout_p=0.5) for c in (0, 0, 1)]
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])
    numbers = [seeded(aten.rand.default, 1, 1, c, [4], device="cpu") for c in (0, 0, 1)]
    assert torch.equal(numbers[0], numbers[1]) and not torch.equal(numbers[0], numbers[2])


def test_fake_and_meta_tensors_just_run() -> None:
    with FakeTensorMode():
        x = torch.empty(3, 4, device="cuda")  # no such generator on this machine
        assert seeded(*DROPOUT, 0, x, 0.5, True).shape == (3, 4)
    assert seeded(*DROPOUT, 0, torch.empty(3, 4, device="meta"), 0.5, True).is_meta


def test_is_random_looks_at_tag_training_and_probability() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    attention = aten.scaled_dot_product_attention.default
    lstm = aten.lstm.input
    rest = ([x], [x], True, 2)  # hidden state, weights, has_biases, num_layers
    random_calls = [
        (aten.dropout.default, (x, 0.1, True), {}),
        (aten.native_dropout.default, (x, 0.1, None), {}),
        (attention, (x, x, x, None, 0.1), {}),
        (attention, (x, x, x), {"dropout_p": 0.1}),
        (aten.bernoulli.p, (x, 0.0), {}),
        (aten.rand_like.default, (x,), {}),
        (lstm, (x, *rest, 0.5, True, False, False), {}),
        (seeded, (aten.dropout.default, 1, 2, 0, x, 0.1, True), {}),
    ]
    quiet_calls = [
        (aten.dropout.default, (x, 0.0, True), {}),
        (aten.dropout.default, (x, 0.1, False), {}),
        (attention, (x, x, x), {}),
        (attention, (x, x, x), {"dropout_p": 0.0}),
        (aten.rrelu.default, (x,), {}),
        (lstm, (x, *rest, 0.0, True, False, False), {}),
        (aten.linear.default, (x, x), {}),
        (torch.relu, (x,), {}),
        (seeded, (aten.dropout.default, 1, 2, 0, x, 0.1, False), {}),
    ]
    assert not is_random(x)
    for expected, calls in ((True, random_calls), (False, quiet_calls)):
        for op, args, kwargs in calls:
            assert is_random(graph.call_function(op, args, kwargs)) is expected, (op, args)


def test_without_dropout_is_the_evaluation_version_and_leaves_the_graph_alone() -> None:
    root = torch.nn.Module()
    root.weight = torch.nn.Parameter(torch.randn(4, 4))
    root.axis_tp2 = Axis.dry_run("tp2", 2, 1)  # type: ignore[assignment]
    graph = fx.Graph(root)
    x, seed = graph.placeholder("x"), graph.placeholder("seed")
    axis = graph.create_node("get_attr", "axis_tp2")
    weight = graph.get_attr("weight")
    y = graph.call_function(aten.matmul.default, (x, weight))
    y = graph.call_function(seeded, (aten.dropout.default, seed, 1, axis, y, 0.5, True))
    pair = graph.call_function(seeded, (aten.native_dropout.default, seed, 2, 0, y, 0.5, True))
    y = graph.call_function(lambda v: v[0], (pair,))
    attention = (aten.scaled_dot_product_attention.default, seed, 3, axis, y, y, y)
    y = graph.call_function(seeded, attention, {"dropout_p": 0.5, "is_causal": True})
    graph.output(graph.call_function(aten.dropout.default, (y, 0.5, True)))
    module = fx.GraphModule(root, graph)

    quiet = without_dropout(module)
    x_value = torch.randn(2, 3, 4)
    hidden = x_value @ root.weight
    expected = F.scaled_dot_product_attention(hidden, hidden, hidden, is_causal=True)
    torch.testing.assert_close(quiet(x_value, 9), expected)
    assert quiet.weight is root.weight and quiet.axis_tp2 is root.axis_tp2
    assert not any(is_random(node) for node in quiet.graph.nodes)
    assert sum(is_random(node) for node in module.graph.nodes) == 4
    assert not torch.equal(module(x_value, 9), module(x_value, 10))
