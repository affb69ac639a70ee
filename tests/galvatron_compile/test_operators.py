"""Sharded operators, and sums that parts of a batch add up to a mean, equal torch's."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses import FakeTensorMode

from galvatron_compile.errors import UnsupportedError
from galvatron_compile.mesh import Axis, Mesh
from galvatron_compile.operators import (
    cross_entropy_sum,
    cross_entropy_sum_shard,
    cross_entropy_weight,
    embedding_shard,
)

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
