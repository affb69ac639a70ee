"""Operators that run on shards of the vocabulary, and the loss as a sum instead of a mean.

For random operators see :mod:`galvatron_compile.random_operators`, whose names are offered here
too.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from galvatron_compile import transport
from galvatron_compile.errors import UnsupportedError
from galvatron_compile.mesh import Axis
from galvatron_compile.random_operators import is_random, seeded, without_dropout

__all__ = [
    "cross_entropy_sum",
    "cross_entropy_sum_shard",
    "cross_entropy_weight",
    "embedding_shard",
    "is_random",
    "seeded",
    "without_dropout",
]


def embedding_shard(weight: Tensor, ids: Tensor, padding_idx: int | None, axis: Axis) -> Tensor:
    """Look ids up in this rank's rows of the table; the sum over the axis is the lookup (P).

    Args:
        weight: (vocabulary / n, features), S(0).
        ids: integers of any shape, R. An id outside of the vocabulary fails on every rank, as
            in aten.embedding.
        padding_idx: the row, in the whole table, that gets no gradient; None or negative: none.

    Returns:
        (*ids.shape, features), zero where another rank holds the row.
    """
    rows = weight.shape[0]
    start = rows * axis.index
    local, elsewhere = _local_index(ids, start, rows, axis.size)
    padding = None
    if padding_idx is not None and start <= padding_idx < start + rows:
        padding = padding_idx - start
    found = F.embedding(local, weight, padding)
    return found.masked_fill(elsewhere.unsqueeze(-1), 0)


def cross_entropy_sum(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
) -> Tensor:
    """The numerator of the mean that aten.cross_entropy_loss takes; any of its input forms.

    Args:
        logits: (N, C), (N, C, d1, …) or (C,).
        target: class indices, or probabilities of the shape of ``logits``.
        weight: (C,), a weight per class.

    Returns:
        The sum over rows, a scalar of the dtype of ``logits`` but at least float32: sums of
        several ranks and micro-batches are added before the division.
    """
    rows = F.cross_entropy(
        logits,
        target,
        weight,
        ignore_index=ignore_index,
        reduction="none",
        label_smoothing=label_smoothing,
    )
    return rows.sum(dtype=_statistics_dtype(logits.dtype))


def cross_entropy_weight(
    target: Tensor, weight: Tensor | None, num_classes: int, ignore_index: int = -100
) -> Tensor:
    """The denominator of that mean, a scalar: sums over shards of the batch add up to the whole.

    An int64 count of the rows that are not ignored; with class weights the sum of theirs, at
    least float32. For class probabilities (a floating point ``target``) the number of rows,
    whatever the weights, as aten does.
    """
    if target.is_floating_point():
        count = target.numel() // num_classes
        return torch.full((), count, dtype=torch.int64, device=target.device)
    counted = target != ignore_index
    if weight is None:
        return counted.sum()
    picked = weight[target.masked_fill(~counted, 0)]
    return picked.masked_fill(~counted, 0).sum(dtype=_statistics_dtype(weight.dtype))


def cross_entropy_sum_shard(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    axis: Axis,
) -> Tensor:
    """:func:`cross_entropy_sum` of logits sharded over the classes; the result is R.

    Two all-reduces forward, a maximum of N and a sum of 2 N numbers (3 N with label smoothing),
    and none backward. Only this rank's part of the softmax is ever made, once in forward and
    again in backward; between them it keeps the logits and a few numbers a row.

    Args:
        logits: (N, C / n), S(1).
        target: (N,) class indices in [0, C) or ``ignore_index``, R.
        weight: (C,), the weights of all classes, R, or None.

    Raises:
        UnsupportedError: other shapes, or targets that are class probabilities.
    """
    if logits.ndim != 2 or target.ndim != 1 or target.is_floating_point():
        raise UnsupportedError(
            "vocabulary-parallel cross entropy takes logits (N, C / n) and class indices (N,), got "
            f"{tuple(logits.shape)} and {target.dtype} {tuple(target.shape)}; gather the logits"
        )
    if axis.size == 1:
        return cross_entropy_sum(logits, target, weight, ignore_index, label_smoothing)
    return _CrossEntropyShard.apply(logits, target, weight, ignore_index, label_smoothing, axis)


class _CrossEntropyShard(torch.autograd.Function):
    """With z = x - max, s = Σ_c exp(z_c), W = Σ_c w_c and smoothing ε, a row with target t costs

    (1 - ε) w_t (log s - z_t) + ε / C (W log s - Σ_c w_c z_c),

    and with p = exp(z - log s) the gradient of x_c is

    p_c ((1 - ε) w_t + ε W / C) - (1 - ε) w_t [c = t] - ε w_c / C.

    Ignored rows cost nothing.
    """

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        target: Tensor,
        weight: Tensor | None,
        ignore_index: int,
        label_smoothing: float,
        axis: Axis,
    ) -> Tensor:
        block = logits.shape[1]
        num_classes, start = block * axis.size, block * axis.index
        dtype = _statistics_dtype(logits.dtype)
        counted = target != ignore_index
        target = target.masked_fill(~counted, 0)
        local, elsewhere = _local_index(target, start, block, axis.size)

        x = logits.to(dtype)
        maximum = transport.all_reduce(x.amax(1), axis, transport.MAX)
        z = x - maximum.unsqueeze(1)
        # Picked before exp overwrites z.
        picked = z.gather(1, local.unsqueeze(1)).squeeze(1).masked_fill(elsewhere, 0)
        here = None if weight is None else weight[start : start + block].to(dtype)
        smooth = [z.sum(1) if here is None else z @ here] if label_smoothing else []
        sums = transport.all_reduce(torch.stack([z.exp_().sum(1), picked, *smooth]), axis)
        log_sum = sums[0].log()

        ones = counted.to(dtype)  # a bool times a Python float would be float32
        target_weight = ones * (1 - label_smoothing)
        if weight is not None:
            target_weight = target_weight * weight[target].to(dtype)
        loss = target_weight * (log_sum - sums[1])
        softmax_weight = target_weight
        if label_smoothing:
            each = label_smoothing / num_classes
            total = num_classes if weight is None else weight.to(dtype).sum()
            loss = loss + each * (total * log_sum - sums[2])
            softmax_weight = target_weight + each * total * ones
        picked_weight = target_weight.masked_fill(elsewhere, 0)
        rows = (maximum, log_sum, softmax_weight, picked_weight, counted)
        ctx.save_for_backward(logits, local, here, *rows)
        ctx.each = label_smoothing / num_classes
        return loss.masked_fill(~counted, 0).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        logits, local, here, *rows = ctx.saved_tensors
        maximum, log_sum, softmax_weight, picked_weight, counted = rows
        out = logits.to(maximum.dtype) - maximum.unsqueeze(1)
        out.sub_(log_sum.unsqueeze(1)).exp_().mul_(softmax_weight.unsqueeze(1))
        if ctx.each:
            smooth = ctx.each * counted.to(out.dtype).unsqueeze(1)
            out.sub_(smooth if here is None else smooth * here)
        out.scatter_add_(1, local.unsqueeze(1), -picked_weight.unsqueeze(1))
        return out.mul_(gradient).to(logits.dtype), None, None, None, None, None


def _local_index(ids: Tensor, start: int, size: int, num_shards: int) -> tuple[Tensor, Tensor]:
    """(index into this rank's block, mask of ids that another rank holds).

    Those get index 0. An id that no rank holds keeps an index outside of the block, so that the
    lookup refuses it instead of giving zeros.
    """
    local = ids - start
    valid = (ids >= 0) & (ids < size * num_shards)
    elsewhere = valid & ((local < 0) | (local >= size))
    # A negative index may count from the end in some operators: push it out on the other side.
    local = torch.where(valid, local, size).masked_fill(elsewhere, 0)
    return local, elsewhere


def _statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
