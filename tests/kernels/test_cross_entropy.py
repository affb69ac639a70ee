"""Vocabulary-parallel cross-entropy: operators against float64, kernels, machine code."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
from kernel_checks import close, launched, new_seed, watched
from torch import Tensor

from galvatron_compile.kernels import cross_entropy as op
from galvatron_compile.kernels.cross_entropy import cross_entropy_reference, cross_entropy_sum

KERNELS = ("statistics_kernel", "gradient_kernel")
IGNORED = 3  # a column as well: an ignored target must not be taken for it


def _inputs(num_rows: int, v: int, dtype: torch.dtype, seed: int) -> tuple[Tensor, Tensor]:
    """Logits, with large ones and masked columns, and targets, among them the first and last column
    and ignored ones."""
    make = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(num_rows, v, generator=make)
    target = torch.randint(v, (num_rows,), generator=make)
    if num_rows > 3:
        logits[0] += 300.0  # overflows without the maximum
        logits[1, v // 2] = float("-inf")
        target[0], target[1], target[2], target[3] = v - 1, 0, v // 3, IGNORED
    return logits.to(dtype), target


def _wide(x: Tensor, gap: int) -> Tensor:
    """The same values as part of a wider matrix: rows of another stride, NaN between them."""
    wide = torch.full((x.shape[0], x.shape[1] + gap), float("nan"), dtype=x.dtype)
    wide[:, : x.shape[1]] = x
    return wide[:, : x.shape[1]]


def _check_shards(
    logits: Tensor, target: Tensor, num_shards: int, scale: Tensor, gap: int = 0
) -> None:
    """Statistics, loss and both gradients with the columns split over ``num_shards``."""
    v = logits.shape[1]
    whole = logits.double().requires_grad_()
    losses = cross_entropy_reference(whole, target, IGNORED)
    (expected,) = torch.autograd.grad((losses * scale.double()).sum(), whole)
    size = -(-v // num_shards)
    shards = [_wide(part, gap) if gap else part.clone() for part in logits.split(size, 1)]
    stats = []
    for shard, start in zip(shards, range(0, v, size), strict=True):
        part = op.cross_entropy_statistics(shard, target, start, IGNORED, v)
        stats.append(part)
        wide = shard.double()
        close(part[:, 0], wide.amax(1), what="max")
        close(part[:, 1], (wide - wide.amax(1)[:, None]).exp().sum(1), terms=v, what="sum")
    log_sum, picked = op.merge_statistics(torch.stack(stats)).unbind(1)
    close(log_sum, logits.double().logsumexp(1), terms=v, what="log-sum-exp")
    kept = target != IGNORED
    close(picked, torch.where(kept, logits.double().gather(1, target[:, None])[:, 0], 0.0))
    for shard, start in zip(shards, range(0, v, size), strict=True):
        part = op.cross_entropy_gradient(shard, target, log_sum, scale, start, IGNORED)
        # An error of log_sum (large in the rows of large logits) counts in relation to itself.
        terms = v + int(logits[logits.isfinite()].double().abs().max() ** 2)
        assert part.dtype == logits.dtype and part.is_contiguous()
        close(part, expected[:, start : start + size], terms=terms, what=f"gradient {start}")
        op.cross_entropy_gradient_(shard, target, log_sum, scale, start, IGNORED)
        assert torch.equal(shard, part), "in place"
        if gap:
            assert shard._base is not None and shard._base[:, -gap:].isnan().all(), "gaps written"


def _scales(num_rows: int) -> list[Tensor]:
    return [torch.tensor(0.37), torch.linspace(0.5, 2.0, num_rows)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_rows, v, num_shards", [(6, 33, 1), (5, 40, 4), (4, 10, 3), (1, 8, 2)])
def test_plain(num_rows: int, v: int, num_shards: int, dtype: torch.dtype) -> None:
    logits, target = _inputs(num_rows, v, dtype, new_seed())
    for scale in _scales(num_rows):
        scale = scale.double() if dtype == torch.float64 else scale
        _check_shards(logits, target, num_shards, scale)
        _check_shards(logits, target, num_shards, scale, gap=3)


def test_as_pytorch_and_gradcheck() -> None:
    logits, target = _inputs(5, 7, torch.float64, new_seed())
    logits = logits.nan_to_num(neginf=-5.0).requires_grad_()
    ours = cross_entropy_sum(logits, target, IGNORED)
    theirs = torch.nn.functional.cross_entropy(
        logits, target, ignore_index=IGNORED, reduction="sum"
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    assert torch.autograd.gradcheck(lambda x: cross_entropy_sum(x, target, IGNORED), logits)


def test_columns_that_are_not_contiguous() -> None:
    logits, target = _inputs(6, 9, torch.float32, new_seed())
    turned = logits.t().contiguous().t()
    log_sum, scale = logits.logsumexp(1), torch.tensor(2.0)
    for name in ("cross_entropy_statistics", "cross_entropy_gradient"):
        more = () if name.endswith("statistics") else (log_sum, scale)
        a, b = (getattr(op, name)(x, target, *more, 0, IGNORED) for x in (turned, logits))
        torch.testing.assert_close(a, b)
    op.cross_entropy_gradient_(turned, target, log_sum, scale, 0, IGNORED)
    torch.testing.assert_close(turned, b)


def test_a_shard_that_masks_every_column() -> None:
    """Its part of the sum is nothing; the loss and the gradient stay finite."""
    logits, target = _inputs(4, 8, torch.float32, new_seed())
    logits[:, 4:], target[:] = float("-inf"), torch.tensor([0, 1, 2, IGNORED])
    _check_only_finite(logits, target)


def _check_only_finite(logits: Tensor, target: Tensor) -> None:
    parts = logits[:, :4].contiguous(), logits[:, 4:].contiguous()
    stats = [op.cross_entropy_statistics(x, target, 4 * i, -100, 8) for i, x in enumerate(parts)]
    log_sum = op.merge_statistics(torch.stack(stats))[:, 0]
    close(log_sum, logits.double().logsumexp(1), terms=8)
    gradient = op.cross_entropy_gradient(parts[1], target, log_sum, torch.ones(()), 4, -100)
    assert torch.equal(gradient, torch.zeros(4, 4))


def test_no_rows_and_leading_dims() -> None:
    logits = torch.randn(0, 8, requires_grad=True)
    loss = cross_entropy_sum(logits, torch.zeros(0, dtype=torch.int64))
    loss.backward()
    assert loss == 0 and logits.grad is not None and logits.grad.shape == (0, 8)
    logits, target = torch.randn(2, 3, 8), torch.randint(8, (2, 3))
    expected = cross_entropy_reference(logits.view(6, 8), target.view(6)).sum()
    close(cross_entropy_sum(logits, target), expected, terms=48)
    with pytest.raises(ValueError, match=r"target must be \[2, 3\]"):
        cross_entropy_sum(logits, target[0])


def test_opcheck() -> None:
    logits, target = _inputs(4, 8, torch.float32, 0)
    log_sum, scale = logits.logsumexp(1), torch.ones(4)
    leaf = logits.clone().requires_grad_()
    torch.library.opcheck(op._sum, (leaf, target, IGNORED))
    torch.library.opcheck(op.cross_entropy_statistics, (logits, target, 8, IGNORED))
    torch.library.opcheck(op._merge, (torch.rand(2, 4, 3),))
    args = logits, target, log_sum, scale, 8, IGNORED
    torch.library.opcheck(op.cross_entropy_gradient, args)
    torch.library.opcheck(op.cross_entropy_gradient_, args)


def test_traced_with_a_symbolic_batch() -> None:
    from torch.fx.experimental.proxy_tensor import make_fx

    def step(x: Tensor, target: Tensor) -> Tensor:
        return torch.autograd.grad(cross_entropy_sum(x, target), x)[0]

    logits, target = torch.randn(4, 8, requires_grad=True), torch.randint(8, (4,))
    graph = make_fx(step, tracing_mode="symbolic")(logits, target)
    names = [str(node.target) for node in graph.graph.nodes]
    assert "galvatron.cross_entropy_sum.default" in names
    assert "galvatron.cross_entropy_gradient.default" in names
    logits, target = torch.randn(6, 8, requires_grad=True), torch.randint(8, (6,))
    torch.testing.assert_close(graph(logits, target), step(logits, target))


# Under the interpreter: (rows, columns, shards, gap), with small blocks so that a row has several.
CASES = [(5, 129, 1, 0), (4, 96, 2, 0), (4, 100, 3, 5), (4, 7, 1, 0), (4, 64, 1, 0)]


def _in_interpreter(dtype: torch.dtype, seed: int, lanes: int, block: int) -> None:
    with (
        mock.patch.multiple(op, LANES=lanes, BLOCK=block),
        watched(op, *KERNELS) as counts,
    ):
        for num_rows, v, num_shards, gap in CASES:
            logits, target = _inputs(num_rows, v, dtype, seed)
            for scale in _scales(num_rows)[: 1 + (v == 129)]:
                _check_shards(logits, target, num_shards, scale, gap)
        logits, target = _inputs(4, 8, torch.float32, seed)
        logits[:, 4:], target[:] = float("-inf"), torch.tensor([0, 1, 2, IGNORED])
        _check_only_finite(logits, target)
    assert launched(counts) == set(KERNELS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_kernels(interpreted: Any, dtype: torch.dtype) -> None:
    interpreted(1).run(_in_interpreter, dtype, new_seed(), 4, 32)


def test_kernels_whose_block_is_longer_than_a_row(interpreted: Any) -> None:
    interpreted(1).run(_in_interpreter, torch.bfloat16, new_seed(), 64, 512)


def _targets_at_the_edges(kernels: bool) -> None:
    """Each column of a shard in the middle, those around it included: the logit is that column's or
    0. Columns of other shards lie beside it in memory."""
    whole = torch.arange(1.0, 25.0).repeat(24, 1)
    with watched(op, *KERNELS) as counts:
        stats = op.cross_entropy_statistics(whole[:, 8:16], torch.arange(24), 8, -100, 24)
    assert (launched(counts) == {"statistics_kernel"}) is kernels
    assert stats[:, 2].tolist() == [float(c + 1) if 8 <= c < 16 else 0.0 for c in range(24)]


def test_targets_at_the_edges(interpreted: Any) -> None:
    _targets_at_the_edges(False)
    interpreted(1).run(_targets_at_the_edges, True)


@pytest.mark.parametrize("wrong", [8, -1, 100])
def test_a_target_that_is_no_class_is_refused(wrong: int) -> None:
    """By every shard, also by one that the target is behind of, with words that name it."""
    logits, target = torch.randn(4, 8), torch.tensor([0, -100, wrong, 7])
    said = rf"target {wrong} of row 2 is no class: the vocabulary has 8, 0 to 7, and only -100 is"
    with pytest.raises(IndexError, match=said):
        cross_entropy_sum(logits, target)
    for first in (0, 4):
        with pytest.raises(IndexError, match=said):
            op.cross_entropy_statistics(logits[:, first : first + 4], target, first, -100, 8)


def _unknown_in_interpreter() -> None:
    """Where kernels run nobody looks: the row is NaN, and only its gradient is."""
    for wrong in (8, -1):
        logits, target = torch.randn(4, 8), torch.tensor([0, -100, wrong, 7])
        with watched(op, *KERNELS) as counts:
            parts = logits[:, :4].contiguous(), logits[:, 4:].contiguous()
            stats = [
                op.cross_entropy_statistics(x, target, 4 * i, -100, 8) for i, x in enumerate(parts)
            ]
            for part in stats:
                assert part[:, 1].isnan().tolist() == [False, False, True, False]
            log_sum = op.merge_statistics(torch.stack(stats))[:, 0]
            loss = cross_entropy_sum(logits.requires_grad_(), target)
            loss.backward()
            gradient = op.cross_entropy_gradient(
                parts[1], target, log_sum, torch.ones(()), 4, -100
            )
        assert loss.isnan() and launched(counts) == set(KERNELS)
        assert logits.grad is not None
        for found in (logits.grad, gradient):
            assert found.isnan().all(1).tolist() == [False, False, True, False]
            assert not found[[0, 1, 3]].isnan().any()


def test_a_target_that_is_no_class_makes_kernels_give_nan(interpreted: Any) -> None:
    interpreted(1).run(_unknown_in_interpreter)


def _sum_in_interpreter(seed: int) -> None:
    with watched(op, *KERNELS) as counts:
        logits, target = _inputs(6, 50, torch.float32, seed)
        whole = logits.double().requires_grad_()
        expected = cross_entropy_reference(whole, target, IGNORED).sum()
        (gradient,) = torch.autograd.grad(2 * expected, whole)
        loss = cross_entropy_sum(logits.requires_grad_(), target, IGNORED)
        (2 * loss).backward()
        close(loss.detach(), expected.detach(), terms=300)
        assert logits.grad is not None
        close(logits.grad, gradient, terms=300**2, what="gradient")
    assert counts == dict.fromkeys(KERNELS, 1)


def test_sum_launches_kernels(interpreted: Any) -> None:
    interpreted(1).run(_sum_in_interpreter, new_seed())


@pytest.mark.parametrize("capability", [80, 90])
def test_machine_code(capability: int) -> None:
    """No spills; whole blocks move 16 bytes a lane, also where rows begin anywhere."""
    from galvatron_compile.kernels.ahead import compile_ahead

    for kernel, arguments, warps in op.ahead():
        made = compile_ahead(kernel, arguments, capability=capability, num_warps=warps)
        aligned = arguments["ALIGNED"]
        assert made.spilled_bytes == 0, made.name
        lanes_elements = 8 * 32 * warps  # 16 bytes of bfloat16 a lane
        if kernel is op.statistics_kernel:
            # In the loop, and where rows are aligned in the masked last block as well.
            wide = arguments["LANES"] * 8 // lanes_elements
        else:
            wide = arguments["BLOCK"] // lanes_elements
            assert made.num_wide_stores >= (2 if aligned else 1) * wide, made.name
        assert made.num_wide_loads >= (2 if aligned else 1) * wide, made.name
        if aligned:
            assert made.num_narrow_loads <= 3, made.name  # target, its logit; log_sum, scale


def test_moved_bytes() -> None:
    """As counted by hand for 10 rows of 8 in bfloat16."""
    assert op.moved_bytes(10, 8, 2) == 10 * (16 + 8 + 12)
    assert op.moved_bytes(10, 8, 2, backward=True) == 10 * (32 + 8 + 4)
