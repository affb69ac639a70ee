"""Sizes that may depend on the batch, and how a shard travels through a view.

Sizes are ints or sympy expressions in the batch symbol. An axis is described by one size ``n``:
its number of ranks, or the batch symbol itself for the data axis (a dim that can be cut into as
many blocks as there are samples can be cut into any number of blocks of whole samples).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Any

import sympy
import torch

Size = Any  # int or sympy.Expr


def size_of(value: object) -> Size:
    """The int or sympy expression behind an int, a torch.SymInt or an expression."""
    if isinstance(value, torch.SymInt):
        value = value.node.expr
    if isinstance(value, sympy.Integer):
        return int(value)
    return value


def shape_of(value: torch.Tensor) -> tuple[Size, ...]:
    return tuple(size_of(size) for size in value.shape)


def product(sizes: Iterable[Size]) -> Size:
    result: Size = 1
    for size in sizes:
        result = result * size
    return size_of(result)


@lru_cache(maxsize=65536)
def quotient(size: Size, divisor: Size) -> Size | None:
    """``size / divisor`` if that is an integer for every batch size, else None."""
    if isinstance(size, int) and isinstance(divisor, int):
        return size // divisor if divisor and size % divisor == 0 else None
    if isinstance(size, int):  # no constant other than 0 is a multiple of every batch size
        return None
    ratio = sympy.cancel(sympy.sympify(size) / divisor)
    numerator, denominator = ratio.as_numer_denom()
    return size_of(numerator) if denominator == 1 else None


def can_shard(size: Size, outer: Size, n: Size) -> bool:
    """Whether a dim of ``size`` is legal as ``(outer, n, rest)``. Empty dims are not sharded."""
    if isinstance(size, int) and size < 2:
        return False
    block = quotient(size, outer)
    return block is not None and quotient(block, n) is not None


def map_shard(
    source: Sequence[Size], target: Sequence[Size], dim: int, outer: Size, n: Size
) -> tuple[int, Size] | None:
    """Where the shard ``S(dim, outer)`` of shape ``source`` lies after a view as ``target``.

    In the flattened order a shard is ``(prefix, n, rest)`` with prefix = the sizes before ``dim``
    times ``outer``; it is a shard of the output dim j with ``prod(before j) * q == prefix`` where
    q is the new outer. At most one j fits, because its block must still hold a factor n > 1.
    Returns (j, q), or None if the blocks do not fall on one output dim. Both shapes are complete
    (no -1) and have equally many elements.
    """
    if not can_shard(source[dim], outer, n):
        return None
    prefix = product([*source[:dim], outer])
    before: Size = 1
    for j, size in enumerate(target):
        q = quotient(prefix, before)
        if q is not None and can_shard(size, q, n):
            return j, q
        before = product([before, size])
    return None
