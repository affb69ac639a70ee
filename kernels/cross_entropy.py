"""Cross-entropy over a vocabulary that may be split over ranks; no softmax is ever stored.

A shard holds the columns ``[first, first + v)`` of the logits. In three steps::

    statistics   (max, sum of exp(l - max), logit of the target) of a shard's rows    one pass
    merge        (log-sum-exp, logit of the target) over all shards; loss = first - second
    gradient     (exp(l - log_sum) - [column is the target]) * scale                  one pass

For R rows of v logits of e bytes the statistics read ``Rve`` bytes and do about 5 flops an element;
the gradient reads and writes ``2Rve`` and does 4. Memory bounds both.

How programs share the work is told in cross_entropy_kernels.py.

A target that is neither ignored nor a class is the caller's mistake. On the CPU the statistics
refuse it, as PyTorch's loss does. On a GPU, where PyTorch's fails on the device and ends the
process, the host does not wait to see: the sum of that row is NaN, and so are the loss of all rows
and the gradient of that row.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from galvatron_compile.kernels.base import as_rows, exact, runs_kernels, triton
from galvatron_compile.kernels.cross_entropy_kernels import gradient_kernel, statistics_kernel

LANES = 1024  # groups of 16 bytes that a program reads at once
BLOCK = 4096  # elements of one program of the gradient
WARPS = 8


def cross_entropy_sum(logits: Tensor, target: Tensor, ignore_index: int = -100) -> Tensor:
    """Sum of the losses of all rows that are not ignored, for logits that are not split.

    logits: ``[..., v]``; target: ``[...]`` int64. 0-d, float32 (float64 for float64 logits).

    Raises:
        ValueError: target is not of the shape of logits without the last dim.
        IndexError: on the CPU, a target that is no class.
    """
    if target.shape != logits.shape[:-1]:
        raise ValueError(
            f"target must be {list(logits.shape[:-1])} for logits {list(logits.shape)}, "
            f"not {list(target.shape)}"
        )
    rows = logits.reshape(-1, logits.shape[-1])
    loss, _ = torch.ops.galvatron.cross_entropy_sum(rows, target.reshape(-1), ignore_index)
    return loss


def merge_statistics(stats: Tensor) -> Tensor:
    """``[rows, 2]``: log-sum-exp and logit of the target, from ``[n, rows, 3]`` of n shards."""
    return torch.ops.galvatron.cross_entropy_merge(stats)


def cross_entropy_reference(logits: Tensor, target: Tensor, ignore_index: int = -100) -> Tensor:
    """Loss of every row of whole logits ``[rows, v]``, 0 where ignored, in plain float64."""
    wide = logits.double()
    kept = target != ignore_index
    column = torch.where(kept, target, 0)
    loss = wide.exp().sum(1).log() - wide.gather(1, column[:, None])[:, 0]
    return torch.where(kept, loss, 0.0)


def moved_bytes(num_rows: int, v: int, itemsize: int, *, backward: bool = False) -> int:
    """Statistics: logits in, three numbers a row out. Gradient: logits in, gradient out."""
    if backward:
        return num_rows * (2 * v * itemsize + 8 + 4)
    return num_rows * (v * itemsize + 8 + 3 * 4)


def flops(num_rows: int, v: int, *, backward: bool = False) -> int:
    """Statistics: comparison, difference, exponential, sum, and a part of rescaling."""
    return (4 if backward else 5) * num_rows * v


def ahead() -> list[tuple[Any, dict[str, Any], int]]:
    """(kernel, arguments, warps) for bfloat16: a padded vocabulary, and one of odd size."""
    given: dict[str, Any] = {
        "logits": "*bf16", "target": "*i64", "log_sum": "*fp32", "scale": "*fp32",
        "stats": "*fp32", "out": "*bf16", "first": "i32:16", "ignore_index": "i32",
        "log_stride": "i32", "scale_stride": "i32", "num_blocks": "i32", "num_classes": "i32",
        "LANES": LANES, "GROUP": 8, "BLOCK": BLOCK, "SAME": True,
    }  # fmt: skip
    cases: list[tuple[Any, dict[str, Any], int]] = []
    for aligned in (True, False):
        size = "i32:16" if aligned else "i32"
        case = given | dict.fromkeys(("v", "stride", "out_stride"), size) | {"ALIGNED": aligned}
        for kernel in (statistics_kernel, gradient_kernel):
            cases.append((kernel, {name: case[name] for name in kernel.arg_names}, WARPS))
    return cases


@torch.library.custom_op("galvatron::cross_entropy_statistics", mutates_args=())
def cross_entropy_statistics(
    logits: Tensor, target: Tensor, first: int, ignore_index: int, num_classes: int | None = None
) -> Tensor:
    """``[rows, 3]`` of a shard: max (the lowest finite number at least), sum of exp(l - max), and
    the logit of the target where it lies in the shard and is not ignored, else 0.

    num_classes: of all shards; None: this one is the last. The sum is NaN for a target that is
    none of them, or, on the CPU, an IndexError says so.
    """
    stats = _empty_statistics(logits, target, first, ignore_index)
    classes = first + logits.shape[1] if num_classes is None else num_classes
    if not logits.numel() or not runs_kernels(logits):
        unknown = _unknown(target, classes, ignore_index)
        return stats.copy_(_plain_statistics(exact(logits), target, first, ignore_index, unknown))
    rows = as_rows(logits)
    group, aligned = _alignment(rows)
    statistics_kernel[rows.shape[0],](
        rows, target.contiguous(), stats, rows.shape[1], rows.stride(0), first, classes,
        ignore_index, LANES=LANES, GROUP=group, ALIGNED=aligned, num_warps=WARPS,
    )  # fmt: skip
    return stats


@cross_entropy_statistics.register_fake
def _empty_statistics(
    logits: Tensor, target: Tensor, first: int, ignore_index: int, num_classes: int | None = None
) -> Tensor:
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    return logits.new_empty((logits.shape[0], 3), dtype=dtype)


@torch.library.custom_op("galvatron::cross_entropy_merge", mutates_args=())
def _merge(stats: Tensor) -> Tensor:
    """A few numbers a row: PyTorch's own kernels do."""
    highest, total, picked = stats.unbind(-1)
    largest = highest.amax(0)
    log_sum = largest + (total * torch.exp(highest - largest)).sum(0).log()
    return torch.stack((log_sum, picked.sum(0)), -1)


@_merge.register_fake
def _(stats: Tensor) -> Tensor:
    return stats.new_empty((stats.shape[1], 2))


@torch.library.custom_op("galvatron::cross_entropy_gradient", mutates_args=())
def cross_entropy_gradient(
    logits: Tensor, target: Tensor, log_sum: Tensor, scale: Tensor, first: int, ignore_index: int
) -> Tensor:
    """``(exp(l - log_sum) - [column is the target]) * scale``, 0 in rows that are ignored.

    log_sum: ``[rows]`` over all shards; scale: 0-d or ``[rows]``. Of the dtype of logits.
    """
    out = logits.new_empty(logits.shape)
    if logits.stride(1) != 1:
        logits = logits.contiguous()
    return _write_gradient(logits, target, log_sum, scale, first, ignore_index, out)


@cross_entropy_gradient.register_fake
def _(
    logits: Tensor, target: Tensor, log_sum: Tensor, scale: Tensor, first: int, ignore_index: int
) -> Tensor:
    return logits.new_empty(logits.shape)


@torch.library.custom_op("galvatron::cross_entropy_gradient_", mutates_args=("logits",))
def cross_entropy_gradient_(
    logits: Tensor, target: Tensor, log_sum: Tensor, scale: Tensor, first: int, ignore_index: int
) -> None:
    """The same, written over the logits."""
    _write_gradient(logits, target, log_sum, scale, first, ignore_index, logits)


@cross_entropy_gradient_.register_fake
def _(
    logits: Tensor, target: Tensor, log_sum: Tensor, scale: Tensor, first: int, ignore_index: int
) -> None:
    return None


@torch.library.custom_op("galvatron::cross_entropy_sum", mutates_args=())
def _sum(logits: Tensor, target: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
    """(sum of losses, log-sum-exp of every row) of logits that are not split."""
    stats = cross_entropy_statistics(logits, target, 0, ignore_index)
    log_sum, picked = _merge(stats[None]).unbind(-1)
    loss = torch.where(target != ignore_index, log_sum - picked, 0.0).sum()
    return loss, log_sum.contiguous()


@_sum.register_fake
def _(logits: Tensor, target: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
    stats = _empty_statistics(logits, target, 0, ignore_index)
    return stats.new_empty(()), stats.new_empty(logits.shape[0])


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    logits, target, ctx.ignore_index = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(logits, target, output[1])


def _backward(ctx: Any, dloss: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, None, None]:
    if dloss is None:
        return None, None, None
    gradient = torch.ops.galvatron.cross_entropy_gradient
    return gradient(*ctx.saved_tensors, dloss, 0, ctx.ignore_index), None, None


_sum.register_autograd(_backward, setup_context=_save)


def _alignment(rows: Tensor) -> tuple[int, bool]:
    """Elements in 16 bytes, and whether every row begins at a multiple of them."""
    group = 16 // rows.element_size()
    return group, rows.stride(0) % group == 0


def _write_gradient(
    logits: Tensor,
    target: Tensor,
    log_sum: Tensor,
    scale: Tensor,
    first: int,
    ignore_index: int,
    out: Tensor,
) -> Tensor:
    num_rows, v = logits.shape
    if not logits.numel() or logits.stride(1) != 1 or not runs_kernels(logits, log_sum, scale):
        return out.copy_(_plain_gradient(logits, target, log_sum, scale, first, ignore_index))
    group, aligned = _alignment(logits)
    num_blocks = triton.cdiv(v + (0 if aligned else group - 1), BLOCK)
    scale_stride = scale.stride(0) if scale.dim() else 0
    gradient_kernel[num_rows * num_blocks,](
        logits, target.contiguous(), log_sum, scale, out,
        v, logits.stride(0), out.stride(0), log_sum.stride(0), scale_stride,
        first, ignore_index, num_blocks,
        GROUP=group, ALIGNED=aligned, SAME=out.stride(0) == logits.stride(0), BLOCK=BLOCK,
        num_warps=WARPS,
    )  # fmt: skip
    return out


def _unknown(target: Tensor, num_classes: int, ignore_index: int) -> Tensor:
    """Which targets are neither ignored nor a class; none may be where the host can look."""
    unknown = (target != ignore_index) & ((target < 0) | (target >= num_classes))
    if target.device.type == "cpu" and unknown.any():
        row = int(unknown.nonzero()[0])
        raise IndexError(
            f"target {int(target[row])} of row {row} is no class: the vocabulary has {num_classes}"
            f", 0 to {num_classes - 1}, and only {ignore_index} is ignored"
        )
    return unknown


def _plain_statistics(
    logits: Tensor, target: Tensor, first: int, ignore_index: int, unknown: Tensor
) -> Tensor:
    if not logits.shape[0]:
        return logits.new_empty((0, 3))
    largest = logits.amax(1).clamp(min=torch.finfo(torch.float32).min)
    total = (logits - largest[:, None]).exp_().sum(1).masked_fill_(unknown, float("nan"))
    here, column = _columns(target, first, logits.shape[1], ignore_index)
    picked = torch.where(here, logits.gather(1, column[:, None])[:, 0], 0.0)
    return torch.stack((largest, total, picked), 1)


def _plain_gradient(
    logits: Tensor, target: Tensor, log_sum: Tensor, scale: Tensor, first: int, ignore_index: int
) -> Tensor:
    result = (exact(logits) - log_sum[:, None]).exp_()
    here, column = _columns(target, first, logits.shape[1], ignore_index)
    result.scatter_add_(1, column[:, None], -here.to(result.dtype)[:, None])
    result *= scale[:, None] if scale.dim() else scale
    return result.masked_fill_((target == ignore_index)[:, None], 0.0)


def _columns(target: Tensor, first: int, v: int, ignore_index: int) -> tuple[Tensor, Tensor]:
    """(whether the target is a column here and counts, its column or 0)."""
    column = target - first
    here = (column >= 0) & (column < v) & (target != ignore_index)
    return here, torch.where(here, column, 0)
