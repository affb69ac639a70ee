"""Collectives as operators that a traced graph can record.

They exist while a layer is traced: their only kernels compute shapes. What is recorded is replaced
by the functions of :mod:`galvatron_compile.transport` over real axes before anything runs. The
number of ranks is an argument, the axis a name.
"""

from __future__ import annotations

import torch
from torch import Tensor

_LIBRARY = torch.library.Library("galvatron", "DEF")
_LIBRARY.define("all_reduce(Tensor x, str op, int n, str axis) -> Tensor")
_LIBRARY.define("all_gather(Tensor x, int dim, int outer, int n, str axis) -> Tensor")
_LIBRARY.define("reduce_scatter(Tensor x, int dim, int outer, int n, str axis) -> Tensor")
_LIBRARY.define(
    "all_to_all(Tensor x, int dim_from, int outer_from, int dim_to, int outer_to, int n, str axis)"
    " -> Tensor"
)
_LIBRARY.define(
    "sum_add_rms_norm(Tensor x, Tensor residual, Tensor weight, float eps, int n, str axis)"
    " -> (Tensor, Tensor)"
)
_LIBRARY.define(
    "gather_linear(Tensor x, Tensor weight, int dim, int outer, int n, str axis)"
    " -> (Tensor, Tensor)"
)
_LIBRARY.define(
    "linear_reduce_scatter(Tensor x, Tensor weight, int dim, int outer, int n, str axis) -> Tensor"
)


def _all_reduce(x: Tensor, op: str, n: int, axis: str) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _all_gather(x: Tensor, dim: int, outer: int, n: int, axis: str) -> Tensor:
    return x.new_empty(_scaled(x, {dim: (n, 1)}))


def _reduce_scatter(x: Tensor, dim: int, outer: int, n: int, axis: str) -> Tensor:
    return x.new_empty(_scaled(x, {dim: (1, n)}))


def _all_to_all(
    x: Tensor, dim_from: int, outer_from: int, dim_to: int, outer_to: int, n: int, axis: str
) -> Tensor:
    if dim_from == dim_to:
        return torch.empty_like(x, memory_format=torch.contiguous_format)
    return x.new_empty(_scaled(x, {dim_from: (n, 1), dim_to: (1, n)}))


def _sum_add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, n: int, axis: str
) -> tuple[Tensor, Tensor]:
    like = torch.empty_like(residual, memory_format=torch.contiguous_format)
    return like, torch.empty_like(like)


def _gather_linear(
    x: Tensor, weight: Tensor, dim: int, outer: int, n: int, axis: str
) -> tuple[Tensor, Tensor]:
    gathered = _scaled(x, {dim: (n, 1)})
    return x.new_empty([*gathered[:-1], weight.shape[0]]), x.new_empty(gathered)


def _linear_reduce_scatter(
    x: Tensor, weight: Tensor, dim: int, outer: int, n: int, axis: str
) -> Tensor:
    return x.new_empty([*_scaled(x, {dim: (1, n)})[:-1], weight.shape[0]])


def _scaled(x: Tensor, factors: dict[int, tuple[int, int]]) -> list[int]:
    shape = list(x.shape)
    for dim, (times, over) in factors.items():
        shape[dim] = shape[dim] * times // over
    return shape


for _name, _kernel in {
    "all_reduce": _all_reduce,
    "all_gather": _all_gather,
    "reduce_scatter": _reduce_scatter,
    "all_to_all": _all_to_all,
    "sum_add_rms_norm": _sum_add_rms_norm,
    "gather_linear": _gather_linear,
    "linear_reduce_scatter": _linear_reduce_scatter,
}.items():
    _LIBRARY.impl(_name, _kernel, "Meta")
