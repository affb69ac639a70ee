"""Moving tensors along one axis, without autograd: what the conversions are made of.

A sharded dim of size d is seen as ``(outer, n, d / outer / n)``; rank r holds block r of every
outer piece. Every function returns new contiguous memory (a slice must not keep the whole tensor
alive) and leaves its input alone. On a dry axis nothing moves and shapes are right; fake and meta
tensors may flow through. On a traced axis an operator is recorded. Axes of one rank never come
here.

Backends must implement the collectives for float64, float32, bfloat16, float16 and integers, as
gloo (2.11 to 2.13) and NCCL do; what a backend refuses is raised. Booleans travel as bytes.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from galvatron_compile import (
    axis_operators,  # noqa: F401 - defines OPS
    gather_scatter,
)
from galvatron_compile.errors import ShapeError
from galvatron_compile.mesh import Axis

OPS: Any = torch.ops.galvatron  # defined by axis_operators
SUM = dist.ReduceOp.SUM
MAX = dist.ReduceOp.MAX


def identity(x: Tensor) -> Tensor:
    return x.view_as(x)  # an autograd function may not return its own input


def divide(x: Tensor, axis: Axis) -> Tensor:
    return x / axis.size


def all_reduce(x: Tensor, axis: Axis, op: dist.ReduceOp.RedOpType = SUM) -> Tensor:
    """Sum (or ``op``) over the axis of tensors of one shape; the same bits on every rank."""
    if axis.traced:
        return OPS.all_reduce(x, "max" if op == MAX else "sum", axis.size, axis.name)
    out = x.clone(memory_format=torch.contiguous_format)
    if not axis.dry:
        dist.all_reduce(out, op, group=_group(axis))
    return out


def all_gather(x: Tensor, dim: int, outer: int, axis: Axis) -> Tensor:
    """(…, d / n, …) on every rank to (…, d, …)."""
    if axis.traced:
        return OPS.all_gather(x, dim, outer, axis.size, axis.name)
    n = axis.size
    if axis.dry:
        return _join(x.unsqueeze(0).expand(n, *x.shape), dim, outer)
    wire = _as_wire(x)
    out = wire.new_empty((n, *wire.shape))
    gather_scatter.all_gather(out.view(-1), wire.view(-1), _group(axis)).wait()
    return _join(out.view(x.dtype), dim, outer)


def reduce_scatter(x: Tensor, dim: int, outer: int, axis: Axis) -> Tensor:
    """Sum over the axis of (…, d, …), of which this rank keeps its (…, d / n, …)."""
    if axis.traced:
        return OPS.reduce_scatter(x, dim, outer, axis.size, axis.name)
    if axis.dry:
        return shard(x, dim, outer, axis)
    send = _split(x, dim, outer, axis.size).contiguous()
    out = send.new_empty(send.shape[1:])
    gather_scatter.reduce_scatter(out.view(-1), send.view(-1), _group(axis)).wait()
    return _merge_pieces(out, dim)


def all_reduce_add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, axis: Axis
) -> tuple[Tensor, Tensor]:
    """(RMS norm of total, total), total = residual + the sum of x over the axis. One kernel where
    the axis has symmetric memory, a collective and a kernel elsewhere."""
    if axis.traced:
        both: tuple[Tensor, Tensor] = OPS.sum_add_rms_norm(
            x, residual, weight, eps, axis.size, axis.name
        )
        return both
    if axis.peers:
        return OPS.all_reduce_add_rms_norm(x, residual, weight, eps, axis.size, axis.peers)
    y, total, _ = OPS.add_rms_norm(all_reduce(x, axis), residual, weight, eps)
    return y, total


def gather_linear(
    x: Tensor, weight: Tensor, dim: int, outer: int, axis: Axis
) -> tuple[Tensor, Tensor]:
    """(linear of the gathered x, gathered x): (…, d / n, …, k) and (features, k) to
    (…, d, …, features) and (…, d, …, k). One kernel where the axis has symmetric memory."""
    if axis.traced:
        both: tuple[Tensor, Tensor] = OPS.gather_linear(x, weight, dim, outer, axis.size, axis.name)
        return both
    if not axis.peers:
        gathered = all_gather(x, dim, outer, axis)
        return F.linear(gathered, weight), gathered
    rows = x.reshape(-1, x.shape[-1])
    product, gathered = OPS.all_gather_matmul(rows, weight, axis.size, axis.peers)
    blocks = product.view(axis.size, *x.shape[:-1], weight.shape[0])
    return _join(blocks, dim, outer), _join(gathered.view(axis.size, *x.shape), dim, outer)


def linear_reduce_scatter(
    x: Tensor, weight: Tensor, dim: int, outer: int, axis: Axis
) -> Tensor:
    """Reduce-scatter of linear(x): (…, d, …, k) and (features, k) to (…, d / n, …, features)."""
    if axis.traced:
        return OPS.linear_reduce_scatter(x, weight, dim, outer, axis.size, axis.name)
    if not axis.peers:
        return reduce_scatter(F.linear(x, weight), dim, outer, axis)
    send = _split(x, dim, outer, axis.size)
    shape = send.shape[1:-1]
    rows = send.reshape(-1, x.shape[-1])
    summed = OPS.matmul_reduce_scatter(rows, weight, axis.size, axis.peers)
    return _merge_pieces(summed.view(*shape, weight.shape[0]), dim)


def shard(x: Tensor, dim: int, outer: int, axis: Axis) -> Tensor:
    """This rank's (…, d / n, …) of (…, d, …)."""
    block = _split(x, dim, outer, axis.size)[axis.index]
    return _merge_pieces(block.clone(memory_format=torch.contiguous_format), dim)


def pad(x: Tensor, dim: int, outer: int, axis: Axis) -> Tensor:
    """This rank's (…, d / n, …) in its place in zeros of (…, d, …); the transpose of shard."""
    n = axis.size
    shape = list(x.shape)
    shape[dim] = shape[dim] * n
    out = x.new_zeros(shape)
    block = _split(out, dim, outer, n)[axis.index]
    block.copy_(x.reshape(block.shape))
    return out


def all_to_all(
    x: Tensor, dim_from: int, outer_from: int, dim_to: int, outer_to: int, axis: Axis
) -> Tensor:
    """From sharded on ``dim_from`` to sharded on ``dim_to``, each with its outer."""
    if axis.traced:
        return OPS.all_to_all(x, dim_from, outer_from, dim_to, outer_to, axis.size, axis.name)
    if dim_from == dim_to:
        return _reorder(x, dim_from, outer_from, outer_to, axis)
    send = _split(x, dim_to, outer_to, axis.size).contiguous()
    received = send if axis.dry else _exchange(send, axis)
    # (n, …, outer_to, block, …) from rank q: its blocks of dim_from, my blocks of dim_to
    merged = received.flatten(1 + dim_to, 2 + dim_to)
    return _join(merged, dim_from, outer_from)


def _reorder(x: Tensor, dim: int, outer_from: int, outer_to: int, axis: Axis) -> Tensor:
    """Change of outer on one dim: pieces of the finest common grid go to their new owners."""
    n, me = axis.size, axis.index
    if axis.dry:
        return x.clone(memory_format=torch.contiguous_format)
    num_pieces = math.lcm(outer_from, outer_to) * n
    held = [_owned(num_pieces, outer_from, n, rank) for rank in range(n)]
    wanted = [_owned(num_pieces, outer_to, n, rank) for rank in range(n)]
    send = [[held[me].index(i) for i in held[me] if i in set(wanted[q])] for q in range(n)]
    arriving = [[i for i in held[q] if i in set(wanted[me])] for q in range(n)]
    order = [i for part in arriving for i in part]

    _check(x.shape[dim], len(held[me]), dim, outer_to, n)
    pieces = x.unflatten(dim, (len(held[me]), -1)).movedim(dim, 0)
    picked = pieces[[i for part in send for i in part]].contiguous()
    wire = _as_wire(picked)
    out = torch.empty_like(wire)
    sizes_in, sizes_out = [len(part) for part in send], [len(part) for part in arriving]
    dist.all_to_all_single(out, wire, sizes_out, sizes_in, group=_group(axis))
    sorted_pieces = out.view(x.dtype)[[order.index(i) for i in wanted[me]]]
    return sorted_pieces.movedim(0, dim).flatten(dim, dim + 1).contiguous()


def _owned(num_pieces: int, outer: int, n: int, rank: int) -> list[int]:
    block = num_pieces // (outer * n)
    return [i for i in range(num_pieces) if i // block % n == rank]


def _exchange(send: Tensor, axis: Axis) -> Tensor:
    """Entry q of the first dim goes to rank q; entry q of the result came from rank q."""
    wire = _as_wire(send)
    out = torch.empty_like(wire)
    dist.all_to_all_single(out, wire, group=_group(axis))
    return out.view(send.dtype)


def _split(x: Tensor, dim: int, outer: int, n: int) -> Tensor:
    """(…, d, …) as the view (n, …, outer, d / outer / n, …): one entry per rank."""
    _check(x.shape[dim], outer * n, dim, outer, n)
    block = x.shape[dim] // (outer * n)
    shape = (*x.shape[:dim], outer, n, block, *x.shape[dim + 1 :])
    return x.reshape(shape).movedim(dim + 1, 0)


def _join(parts: Tensor, dim: int, outer: int) -> Tensor:
    """One entry per rank, (n, …, d / n, …), to (…, d, …)."""
    n, size = parts.shape[0], parts.shape[dim + 1]
    _check(size, outer, dim, outer, n)
    before, after = parts.shape[1 : dim + 1], parts.shape[dim + 2 :]
    pieces = parts.reshape(n, *before, outer, size // outer, *after).movedim(0, dim + 1)
    return pieces.reshape(*before, size * n, *after).contiguous()


def _merge_pieces(block: Tensor, dim: int) -> Tensor:
    """(…, outer, d / outer / n, …) to (…, d / n, …)."""
    return block.flatten(dim, dim + 1)


def _as_wire(x: Tensor) -> Tensor:
    x = x.contiguous()
    return x.view(torch.uint8) if x.dtype == torch.bool else x


def _check(size: Any, divisor: Any, dim: int, outer: object, n: int) -> None:
    # A symbolic size is left to reshape, which checks it without a guard of ours.
    if isinstance(size, int) and isinstance(divisor, int) and size % divisor:
        raise ShapeError(
            f"dim {dim} of size {size} cannot be cut into {outer} pieces of {n} equal blocks; "
            "choose a degree that divides it"
        )


def _group(axis: Axis) -> dist.ProcessGroup:
    assert axis.group is not None, f"axis {axis} of {axis.size} ranks has no process group"
    return axis.group
