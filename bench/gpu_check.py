"""When a kernel's result counts as right: element by element against float64, and in the mean."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from galvatron_compile.kernels.base import INTERPRETED

# (of an element itself, of the root mean square, of the mean), in eps of the dtype. Sums are made
# in float32, so a result of 16 bits is off by one rounding (half an eps; the interpreter cuts off:
# up to one, 0.36 in the mean), and by next to nothing where terms cancel. 1 % is 1.3 eps of
# bfloat16.
ROUNDED = (1.05, 0.02, 0.5) if INTERPRETED else (0.55, 0.02, 0.3)
FLOAT32 = (16.0, 16.0, 8.0)


def excess(got: Tensor, exact: Tensor, roundings: int = 1) -> Tensor:
    """How many times its tolerance a result is off, 0-d; above 1, or NaN: it is wrong.

    exact: the same in float64, or equal integers. roundings: how often what went into the result
    was rounded to its dtype, 1: only at the end; sums of rounded parts may cancel, so with more the
    root mean square counts in full.
    """
    if got.shape != exact.shape:
        return torch.full((), float("inf"))
    if not got.is_floating_point():
        return 2.0 * (got != exact).any().double()
    exact = exact.double()
    eps = torch.finfo(got.dtype).eps
    by_element, by_square, by_mean = ROUNDED if got.element_size() < 4 else FLOAT32
    tiny = torch.finfo(got.dtype).smallest_normal
    size = exact.abs()
    square = exact.square().mean().sqrt()
    if roundings > 1:
        by_square = max(by_square, roundings * by_element)
    error = (got.double() - exact).abs()
    limit = eps * (roundings * by_element * size + by_square * square) + tiny
    mean_limit = eps * roundings**0.5 * by_mean * size.mean() + tiny
    return torch.maximum((error / limit).max(), error.mean() / mean_limit)


def wrong_results(name: str, got: Any, exact: Any, roundings: int = 1) -> list[str]:
    """A line for each result that is wrong."""
    results, wanted = flat(got), flat(exact)
    if len(results) != len(wanted):
        return [f"{name}: {len(results)} results for {len(wanted)}"]
    lines = []
    for place, (one, other) in enumerate(zip(results, wanted, strict=True)):
        times = float(excess(one, other, roundings))
        if not times <= 1:
            lines.append(f"{name}: result {place} is off by {times:.3g} times its tolerance")
    return lines


def wide(value: Any) -> Any:
    """A copy with floats in float64, of lists too."""
    if isinstance(value, (list, tuple)):
        return type(value)(wide(x) for x in value)
    if isinstance(value, Tensor):
        return value.double() if value.is_floating_point() else value.clone()
    return value


def flat(value: Any) -> list[Tensor]:
    """Tensors of nested tuples and lists; others of it are left out."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, Sequence):
        return [tensor for x in value for tensor in flat(x)]
    return []


@contextmanager
def poisoned() -> Iterator[None]:
    """Inside, memory from ``empty`` is full of NaN, so that what is not written shows."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
