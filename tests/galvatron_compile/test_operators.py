"""Sharded operators equal torch's; random ones depend on their three numbers and nothing else."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, fx
from torch._subclasses import FakeTensorMode

from galvatron_compile.errors import UnsupportedError
from galvatron_compile.mesh import Axis, Mesh
from galvatron_compile.operators import (
    cross_entropy_sum,
    cross_entropy_sum_shard,
    cross_entropy_weight,
    embedding_shard,
    is_random,
    seeded,
    without_dropout,
)

aten = torch.ops.aten
IGNORED = -100


def tensor_axis(size: int) -> Axis:
    return Mesh.create(dist.get_world_size(), dist.get_rank(), [size]).tensor(size)


@pytest.mark.parametrize("padding_idx", [None, -1, 5])
@pytest.mark.parametrize("n", [2, 4])
def test_embedding_shard_sums_to_the_lookup(ranks, n: int, padding_idx: int | None) -> None:
    torch.manual_seed(0)
    table = torch.randn(12, 3, dtype=torch.float64)
    ids = torch.randint(0, 12, (4, 5))
    ids[0, :2] = 5
    gradient = torch.randn(4, 5, 3, dtype=torch.float64)

    def one_rank() -> tuple[Tensor, Tensor]:
        axis = tensor_axis(n)
        rows = table.chunk(n)[axis.index].clone().requires_grad_()
        out = embedding_shard(rows, ids, padding_idx, axis)
        out.backward(gradient)  # P: the same gradient on all
        return out.detach(), rows.grad

    whole = table.clone().requires_grad_()
    expected = F.embedding(ids, whole, None if padding_idx == -1 else padding_idx)
    expected.backward(gradient)
    answers = ranks(n).run(one_rank)
    assert torch.equal(sum(out for out, _ in answers), expected.detach())
    assert torch.equal(torch.cat([grad for _, grad in answers]), whole.grad)
    if padding_idx == 5:
        assert not whole.grad[5].any()


@pytest.mark.parametrize("wrong", [12, -1])
def test_embedding_shard_refuses_ids_outside_of_the_vocabulary(wrong: int) -> None:
    for index in range(4):
        with pytest.raises(IndexError):
            embedding_shard(
                torch.randn(3, 2), torch.tensor([1, wrong]), None, Axis.dry_run("tp4", 4, index)
            )


def labels(case: str, num_rows: int, num_classes: int) -> Tensor:
    target = torch.randint(0, num_classes, (num_rows,))
    if case == "some ignored":
        target[::3] = IGNORED
    if case == "all ignored":
        target[:] = IGNORED
    if case == "ignored class":
        target[::2] = 3
    return target


LABELS = ["none ignored", "some ignored", "all ignored", "ignored class"]


@pytest.mark.parametrize("n", [2, 4])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("weighted", [False, True])
def test_sharded_cross_entropy_equals_torch(ranks, n: int, smoothing: float, weighted: bool):
    torch.manual_seed(1)
    cases = []
    for case in LABELS:
        logits = 20 * torch.randn(9, 12, dtype=torch.float64) + 300
        weight = torch.rand(12, dtype=torch.float64) if weighted else None
        ignore = 3 if case == "ignored class" else IGNORED
        cases.append((logits, labels(case, 9, 12), weight, ignore))

    def one_rank() -> list[tuple[Tensor, Tensor, Tensor]]:
        axis, answers = tensor_axis(n), []
        for logits, target, weight, ignore in cases:
            local = logits.chunk(n, 1)[axis.index].clone().requires_grad_()
            loss = cross_entropy_sum_shard(local, target, weight, ignore, smoothing, axis)
            (3.0 * loss).backward()  # R: every rank has the whole gradient
            answers.append((loss.detach(), local.grad, local.detach()))
        return answers

    answers = ranks(n).run(one_rank)
    for i, (logits, target, weight, ignore) in enumerate(cases):
        whole = logits.clone().requires_grad_()
        expected = F.cross_entropy(
            whole, target, weight, ignore_index=ignore, label_smoothing=smoothing, reduction="sum"
        )
        (3.0 * expected).backward()
        losses = [answer[i][0] for answer in answers]
        assert all(torch.equal(loss, losses[0]) for loss in losses)
        torch.testing.assert_close(losses[0], expected.detach(), rtol=1e-12, atol=1e-12)
        gradient = torch.cat([answer[i][1] for answer in answers], 1)
        torch.testing.assert_close(gradient, whole.grad, rtol=1e-11, atol=1e-13)
        assert torch.equal(torch.cat([answer[i][2] for answer in answers], 1), logits)


def test_sharded_cross_entropy_of_bfloat16_keeps_float32_statistics(ranks) -> None:
    torch.manual_seed(2)
    logits = (10 * torch.randn(512, 64)).bfloat16()
    target = torch.randint(0, 64, (512,))

    def one_rank() -> tuple[Tensor, Tensor]:
        axis = tensor_axis(2)
        local = logits.chunk(2, 1)[axis.index].clone().requires_grad_()
        loss = cross_entropy_sum_shard(local, target, None, IGNORED, 0.0, axis)
        loss.backward()
        return loss.detach(), local.grad

    whole = logits.double().requires_grad_()
    expected = F.cross_entropy(whole, target, reduction="sum")
    expected.backward()
    answers = ranks(2).run(one_rank)
    assert answers[0][0].dtype == torch.float32
    torch.testing.assert_close(answers[0][0].double(), expected.detach(), rtol=1e-6, atol=0)
    gradient = torch.cat([gradient for _, gradient in answers], 1)
    # float32 until the end: nothing is lost but the one rounding to bfloat16 (2**-8)
    torch.testing.assert_close(gradient.double(), whole.grad, rtol=1.01 * 2**-8, atol=1e-6)


def test_sharded_cross_entropy_masks_classes_with_minus_infinity(ranks) -> None:
    logits = torch.randn(4, 8, dtype=torch.float64)
    logits[:, 4:] = -torch.inf  # the whole of the second rank
    target = torch.tensor([0, 1, 2, 3])

    def one_rank() -> tuple[Tensor, Tensor]:
        axis = tensor_axis(2)
        local = logits.chunk(2, 1)[axis.index].clone().requires_grad_()
        loss = cross_entropy_sum_shard(local, target, None, IGNORED, 0.0, axis)
        loss.backward()
        return loss.detach(), local.grad

    answers = ranks(2).run(one_rank)
    torch.testing.assert_close(answers[1][0], F.cross_entropy(logits, target, reduction="sum"))
    assert not answers[1][1].any()


def test_sharded_cross_entropy_refuses_wrong_labels_and_forms() -> None:
    axis = Axis.dry_run("tp2", 2)
    with pytest.raises((IndexError, RuntimeError), match="out of bounds"):
        cross_entropy_sum_shard(torch.randn(2, 4), torch.tensor([1, 8]), None, -100, 0.0, axis)
    with pytest.raises(UnsupportedError, match="gather the logits"):
        cross_entropy_sum_shard(torch.randn(2, 4), torch.rand(2, 8), None, -100, 0.0, axis)


def test_sharded_operators_propagate_fake_shapes_on_a_dry_axis() -> None:
    axis = Axis.dry_run("tp2", 2, 1)
    mode = FakeTensorMode()
    with mode:
        logits = torch.empty(6, 4, dtype=torch.bfloat16, requires_grad=True)
        target = torch.zeros(6, dtype=torch.int64)
        loss = cross_entropy_sum_shard(logits, target, torch.empty(8), -100, 0.1, axis)
        loss.backward()
        assert loss.shape == () and logits.grad is not None and logits.grad.shape == (6, 4)
        rows = torch.empty(3, 5, requires_grad=True)
        assert embedding_shard(rows, target, 4, axis).shape == (6, 5)


FORMS = {"rows": (9, 5), "image": (3, 5, 2, 4), "one": (5,), "empty": (0, 5)}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("kind", ["indices", "probabilities"])
def test_sum_over_weight_is_torchs_mean(form, smoothing, weighted, kind) -> None:
    torch.manual_seed(3)
    shape = FORMS[form]
    logits = torch.randn(shape, dtype=torch.float64)
    weight = torch.rand(5, dtype=torch.float64) if weighted else None
    class_dim = 0 if form == "one" else 1
    target = torch.randn(shape, dtype=torch.float64).softmax(class_dim)
    if kind == "indices":
        target = target.argmax(class_dim)
        if form != "one":
            target[target == 1] = IGNORED
    expected = F.cross_entropy(logits, target, weight, label_smoothing=smoothing)
    total = cross_entropy_sum(logits, target, weight, IGNORED, smoothing)
    divisor = cross_entropy_weight(target, weight, 5, IGNORED)
    torch.testing.assert_close(total / divisor, expected, equal_nan=True)
    assert torch.isnan(expected) == (form == "empty")


def test_sums_of_batch_shards_divide_into_the_global_mean() -> None:
    logits, weight = torch.randn(8, 5, dtype=torch.float64), torch.rand(5, dtype=torch.float64)
    target = torch.tensor([0, IGNORED, IGNORED, IGNORED, 1, 2, 3, 4])
    halves = list(zip(logits.chunk(2), target.chunk(2), strict=True))
    total = sum(cross_entropy_sum(x, t, weight, IGNORED, 0.1) for x, t in halves)
    divisor = sum(cross_entropy_weight(t, weight, 5, IGNORED) for _, t in halves)
    expected = F.cross_entropy(logits, target, weight, label_smoothing=0.1)
    torch.testing.assert_close(total / divisor, expected)


def test_sum_of_low_precision_logits_is_float32() -> None:
    logits = torch.randn(4096, 8).bfloat16()
    target = torch.randint(0, 8, (4096,))
    total = cross_entropy_sum(logits, target)
    assert total.dtype == torch.float32
    torch.testing.assert_close(
        total, F.cross_entropy(logits.float(), target, reduction="sum"), rtol=1e-3, atol=0
    )


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
