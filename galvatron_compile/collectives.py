"""Conversions between placements: collectives that autograd differentiates as the types say.

Each function takes this rank's value, the dims and outers of the shards involved, and the axis
last, so that it can be the target of an fx ``call_function`` node. A placement types the gradient
too (:mod:`galvatron_compile.placement`), so the backward of a conversion from s to t is the
conversion of gradients from t's type to s's:

=======================  ========  ==============  ==============
function                 from, to  forward         backward
=======================  ========  ==============  ==============
all_reduce_gradient      R → V     identity        all-reduce
all_reduce               P → R     all-reduce      identity
all_gather               S → V     all-gather      reduce-scatter
all_gather_replicated    S → R     all-gather      slice
shard                    R → S     slice           all-gather
shard_varying            V → S     slice           zero-pad
reduce_scatter           P → S     reduce-scatter  all-gather
all_to_all               S → S′    all-to-all      all-to-all
split_sum                R → P     ÷ n             identity
average_gradient         V → R     identity        ÷ n
=======================  ========  ==============  ==============

(Plain functional all-reduce of torch 2.13 differentiates as all-reduce: used for P → R it leaves
the loss right and multiplies gradients by n.) On an axis of one rank all are the identity. Values
without gradient (integers, booleans) may be gathered, sharded and exchanged. First derivatives
only: differentiating a backward raises.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from galvatron_compile import transport
from galvatron_compile.mesh import Axis
from galvatron_compile.placement import Placement

Move = Callable[[Tensor], Tensor]
DimMove = Callable[[Tensor, int, int, Axis], Tensor]
CollectiveKind = Literal[
    "none", "local", "all_reduce", "all_gather", "reduce_scatter", "all_to_all"
]


class _Moved(torch.autograd.Function):
    """``forward_move`` of the value, ``backward_move`` of the gradient.

    The moves hold the group, since backward may run on another thread.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, forward_move: Move, backward_move: Move) -> Tensor:
        ctx.backward_move = backward_move
        return forward_move(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return ctx.backward_move(gradient), None, None


def _moved(x: Tensor, axis: Axis, forward_move: Move, backward_move: Move) -> Tensor:
    return x if axis.size == 1 else _Moved.apply(x, forward_move, backward_move)


def _moved_on_dim(
    x: Tensor, forward_move: DimMove, backward_move: DimMove, dim: int, outer: int, axis: Axis
) -> Tensor:
    where = (dim, outer, axis)
    return _moved(x, axis, lambda v: forward_move(v, *where), lambda g: backward_move(g, *where))


def identity(x: Tensor, axis: Axis) -> Tensor:
    """Equal placements: nothing to do."""
    return x


def all_reduce_gradient(x: Tensor, axis: Axis) -> Tensor:
    """R → V: the value as it is; its partial gradients are summed over the axis."""
    return _moved(x, axis, transport.identity, partial(transport.all_reduce, axis=axis))


def all_reduce(x: Tensor, axis: Axis) -> Tensor:
    """P → R: the sum over the axis; every rank's gradient is already the whole one."""
    return _moved(x, axis, partial(transport.all_reduce, axis=axis), transport.identity)


def all_gather(x: Tensor, dim: int, outer: int, axis: Axis) -> Tensor:
    """S → V: (…, d / n, …) to (…, d, …); partial gradients are reduce-scattered."""
    return _moved_on_dim(x, transport.all_gather, transport.reduce_scatter, dim, outer, axis)


def all_gather_replicated(x: Tensor, dim: int, outer: int, axis: Axis) -> Tensor:
    """S → R: (…, d / n, …) to (…, d, …); of the gradient this rank takes its slice."""
    return _moved_on_dim(x, transport.all_gather, transport.shard, dim, outer, axis)


def shard(x: Tensor, dim: int, outer: int, axis: Axis) -> Tensor:
    """R → S: this rank's slice; the gradient's slices are gathered."""
    return _moved_on_dim(x, transport.shard, transport.all_gather, dim, outer, axis)


def shard_varying(x: Tensor, dim: int, outer: int, axis: Axis) -> Tensor:
    """V → S: this rank's slice; the gradient in its place among zeros is this rank's part."""
    return _moved_on_dim(x, transport.shard, transport.pad, dim, outer, axis)


def reduce_scatter(x: Tensor, dim: int, outer: int, axis: Axis) -> Tensor:
    """P → S: this rank's slice of the sum; the gradient's slices are gathered."""
    return _moved_on_dim(x, transport.reduce_scatter, transport.all_gather, dim, outer, axis)


def all_to_all(
    x: Tensor, dim_from: int, outer_from: int, dim_to: int, outer_to: int, axis: Axis
) -> Tensor:
    """S → S′: (…, d / n, …, e, …) to (…, d, …, e / n, …), or another outer of the same dim."""
    there = (dim_from, outer_from, dim_to, outer_to, axis)
    back = (dim_to, outer_to, dim_from, outer_from, axis)
    return _moved(
        x, axis, lambda v: transport.all_to_all(v, *there), lambda g: transport.all_to_all(g, *back)
    )


def split_sum(x: Tensor, axis: Axis) -> Tensor:
    """R → P: an n-th of the value each (floating point only); the gradient as it is.

    Exact for n a power of two.
    """
    return _moved(x, axis, partial(transport.divide, axis=axis), transport.identity)


def average_gradient(x: Tensor, axis: Axis) -> Tensor:
    """V → R: the value as it is; every rank's equal gradient counts an n-th."""
    return _moved(x, axis, transport.identity, partial(transport.divide, axis=axis))


@dataclass(frozen=True, slots=True)
class Conversion:
    """One conversion: ``function(x, *arguments, axis)``.

    arguments: dim and outer of the source if it is sharded, then of the target if that is.
    forward, backward: what runs on the value and on the gradient. ``"none"`` costs nothing,
        ``"local"`` (slice, pad, divide) copies on the device and moves nothing between ranks.

    Payload convention of the byte counts, as in nccl-tests: the larger of what one rank gives and
    gets. That is the whole summed tensor of an all-reduce, the gathered result of an all-gather,
    the input of a reduce-scatter, and one rank's own shard of an all-to-all.
    """

    source: Placement
    target: Placement
    function: Callable[..., Tensor]
    arguments: tuple[Any, ...]
    forward: CollectiveKind
    backward: CollectiveKind

    def forward_bytes(self, local_source_bytes: float, n: int) -> float:
        """Payload of the forward collective; ``local_source_bytes`` is one rank's source value."""
        return _payload(self.forward, self._full_bytes(local_source_bytes, n), n)

    def backward_bytes(self, local_source_bytes: float, n: int) -> float:
        """Payload of the backward collective; gradients have the dtype of their values."""
        return _payload(self.backward, self._full_bytes(local_source_bytes, n), n)

    def _full_bytes(self, local_source_bytes: float, n: int) -> float:
        return local_source_bytes * n if self.source.is_shard else local_source_bytes


def _payload(kind: CollectiveKind, full_bytes: float, n: int) -> float:
    if kind in ("none", "local") or n == 1:
        return 0
    return full_bytes / n if kind == "all_to_all" else full_bytes


_Entry = tuple[Callable[..., Tensor], CollectiveKind, CollectiveKind]
_TABLE: dict[tuple[str, str], _Entry] = {
    ("R", "V"): (all_reduce_gradient, "none", "all_reduce"),
    ("P", "R"): (all_reduce, "all_reduce", "none"),
    ("S", "V"): (all_gather, "all_gather", "reduce_scatter"),
    ("S", "R"): (all_gather_replicated, "all_gather", "local"),
    ("R", "S"): (shard, "local", "all_gather"),
    ("V", "S"): (shard_varying, "local", "local"),
    ("P", "S"): (reduce_scatter, "reduce_scatter", "all_gather"),
    ("S", "S"): (all_to_all, "all_to_all", "all_to_all"),
    ("R", "P"): (split_sum, "local", "none"),
    ("V", "R"): (average_gradient, "none", "local"),
}


def conversion(source: Placement, target: Placement) -> Conversion | None:
    """The one step from ``source`` to ``target``, or None where it takes more than one.

    Equal placements give :func:`identity`; P → V, V → P and S → P go through R.
    """
    if source == target:
        return Conversion(source, target, identity, (), "none", "none")
    entry = _TABLE.get((source.kind, target.kind))
    if entry is None:
        return None
    function, forward, backward = entry
    shards = [placement for placement in (source, target) if placement.is_shard]
    arguments = tuple(item for placement in shards for item in (placement.dim, placement.outer))
    return Conversion(source, target, function, arguments, forward, backward)
