"""What the fuse pass puts into graphs: operators that are one kernel where there is one.

Norms, activation and rotary embedding are those of ``kernels``; they compute the same in PyTorch
where no kernel runs. Here are those that also communicate along an axis. First derivatives only.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from galvatron_compile import collectives, transport
from galvatron_compile.kernels import cross_entropy as _cross_entropy  # noqa: F401 - its operators
from galvatron_compile.kernels.layer_norm import add_layer_norm, layer_norm
from galvatron_compile.kernels.rms_norm import add_rms_norm, rms_norm
from galvatron_compile.kernels.rotary import rotary
from galvatron_compile.kernels.swiglu import swiglu
from galvatron_compile.mesh import Axis

__all__ = [
    "add_layer_norm",
    "add_rms_norm",
    "all_reduce_add_rms_norm",
    "cross_entropy",
    "cross_entropy_over",
    "gather_linear",
    "layer_norm",
    "linear_reduce_scatter",
    "rms_norm",
    "rotary",
    "swiglu",
]

OPS: Any = torch.ops.galvatron


def cross_entropy(logits: Tensor, target: Tensor, ignore_index: int, axis: Axis | None) -> Tensor:
    """Sum of the losses of all rows that are not ignored, a scalar of at least float32.

    The logits are read once forward and once backward, and no softmax of them is made; between
    ranks go three numbers a row (Megatron-LM, Shoeybi et al. 2019, section 3, sends as few).

    Args:
        logits: (N, C), or (N, C / n) sharded over the classes along ``axis``, S(1).
        target: (N,) class indices in [0, C) or ``ignore_index``, R.

    Raises:
        IndexError: on the CPU, a target that is no class; on a GPU the loss is NaN instead.
    """
    sum_of_rows: Tensor = _CrossEntropy.apply(logits, target, ignore_index, axis)
    return sum_of_rows


def cross_entropy_over(
    logits: Tensor, target: Tensor, ignore_index: int, axis: Axis | None
) -> Tensor:
    """:func:`cross_entropy` whose backward writes the gradient over the logits, which spares as
    much memory again. For logits that nothing else reads, neither the backward of what made them.
    """
    sum_of_rows: Tensor = _CrossEntropyOver.apply(logits, target, ignore_index, axis)
    return sum_of_rows


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, target: Tensor, ignore_index: int, axis: Axis | None
    ) -> Tensor:
        ctx.first = 0 if axis is None else axis.index * logits.shape[1]
        ctx.ignore_index = ignore_index
        num_classes = logits.shape[1] * (1 if axis is None else axis.size)
        statistics = OPS.cross_entropy_statistics(
            logits, target, ctx.first, ignore_index, num_classes
        )[None]
        if axis is not None and axis.size > 1:
            statistics = transport.all_gather(statistics, 0, 1, axis)
        merged = OPS.cross_entropy_merge(statistics)
        log_sum = merged[:, 0].clone()
        ctx.save_for_backward(logits, target, log_sum)
        losses = (log_sum - merged[:, 1]).masked_fill(target == ignore_index, 0)
        return losses.sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        logits, target, log_sum = ctx.saved_tensors
        found = OPS.cross_entropy_gradient(
            logits, target, log_sum, gradient, ctx.first, ctx.ignore_index
        )
        return found, None, None, None


class _CrossEntropyOver(_CrossEntropy):
    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        logits, target, log_sum = ctx.saved_tensors
        over = logits.detach()
        OPS.cross_entropy_gradient_(over, target, log_sum, gradient, ctx.first, ctx.ignore_index)
        return over, None, None, None


def all_reduce_add_rms_norm(
    partial: Tensor, residual: Tensor, weight: Tensor, eps: float, axis: Axis
) -> tuple[Tensor, Tensor]:
    """(RMS norm of total, total) with total = residual + the sum of ``partial`` over the axis.

    Args:
        partial: (…, features), P. residual: of the same shape, R. weight: (features,), R.
    """
    found: tuple[Tensor, Tensor] = _AllReduceAddNorm.apply(partial, residual, weight, eps, axis)
    return found


class _AllReduceAddNorm(torch.autograd.Function):
    """P → R has the identity for its backward, so both terms get the gradient of the total."""

    @staticmethod
    def forward(
        ctx: Any, partial: Tensor, residual: Tensor, weight: Tensor, eps: float, axis: Axis
    ) -> tuple[Tensor, Tensor]:
        y, total = transport.all_reduce_add_rms_norm(partial, residual, weight, eps, axis)
        ctx.save_for_backward(total, weight)
        ctx.eps = eps
        ctx.set_materialize_grads(False)
        return y, total

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, of_y: Tensor | None, of_total: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        total, weight = ctx.saved_tensors
        gradient, of_weight = of_total, None
        if of_y is not None:
            scale = OPS.rms_norm(total, weight, ctx.eps)[1]  # cheaper to make again than to keep
            gradient, of_weight = OPS.rms_norm_backward(of_y, total, weight, scale, of_total)
        return gradient, gradient, of_weight, None, None


def gather_linear(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    dim: int,
    outer: int,
    axis: Axis,
) -> tuple[Tensor, ...]:
    """``linear(all_gather(x), w, b)`` for every weight, with the gather behind the product.

    Args:
        x: (…, d / n, …, k), S(dim), dim not the last. weights: each (features, k). biases: each
            (features,) or None.

    Returns:
        (…, d, …, features) for every weight. Gradients of x are summed and scattered at once;
        in backward x is gathered again rather than kept whole.
    """
    found: tuple[Tensor, ...] = _GatherLinear.apply(x, dim, outer, axis, *weights)
    pairs = zip(found, biases, strict=True)
    return tuple(each if bias is None else each + bias for each, bias in pairs)


class _GatherLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, dim: int, outer: int, axis: Axis, *weights: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.save_for_backward(x, *weights)
        ctx.where = (dim, outer, axis)
        product, _ = transport.gather_linear(x, _joined(weights), dim, outer, axis)
        return tuple(product.split([weight.shape[0] for weight in weights], -1))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, *weights = ctx.saved_tensors
        gradient = gradients[0] if len(gradients) == 1 else torch.cat(gradients, -1)
        of_x, of_weights = None, [None] * len(weights)
        if ctx.needs_input_grad[0]:
            transposed = _joined(weights).t()
            of_x = transport.linear_reduce_scatter(gradient, transposed, *ctx.where)
        if any(ctx.needs_input_grad[4:]):
            gathered = transport.all_gather(x, *ctx.where)
            joint = gradient.flatten(0, -2).t() @ gathered.flatten(0, -2)
            of_weights = list(joint.split([weight.shape[0] for weight in weights]))
        return of_x, None, None, None, *of_weights


def _joined(weights: Sequence[Tensor]) -> Tensor:
    return weights[0] if len(weights) == 1 else torch.cat(list(weights))


def linear_reduce_scatter(
    x: Tensor, weight: Tensor, bias: Tensor | None, dim: int, outer: int, axis: Axis
) -> Tensor:
    """``reduce_scatter(linear(x, weight)) + bias``, with the sum behind the product.

    Args:
        x: (…, d, …, k / n), dim not the last. weight: (features, k / n). bias: (features,), R, as
            its gradient is.

    Returns:
        (…, d / n, …, features), S(dim).
    """
    found: Tensor = _LinearReduceScatter.apply(x, weight, dim, outer, axis)
    return found if bias is None else found + collectives.all_reduce_gradient(bias, axis)


class _LinearReduceScatter(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, dim: int, outer: int, axis: Axis
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.where = (dim, outer, axis)
        return transport.linear_reduce_scatter(x, weight, dim, outer, axis)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        of_x = of_weight = None
        if ctx.needs_input_grad[0]:  # the product hides the gather
            of_x, gathered = transport.gather_linear(gradient, weight.t(), *ctx.where)
        else:
            gathered = transport.all_gather(gradient, *ctx.where)
        if ctx.needs_input_grad[1]:
            of_weight = gathered.flatten(0, -2).t() @ x.flatten(0, -2)
        return of_x, of_weight, None, None, None
