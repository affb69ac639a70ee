"""What tests of kernels share: tolerances, launches counted, memory poisoned before it is written.

Runs in the test process and, by value, in ranks under the interpreter.
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any
from unittest import mock

import torch
from torch import Tensor


def new_seed() -> int:
    """``GALVATRON_TEST_SEED``, 0 if it is not set; "fresh" draws one, printed to repeat a failure.

    A commit's tests end alike whenever they run; ``make test-all`` is where fresh seeds are tried.
    """
    given = os.environ.get("GALVATRON_TEST_SEED", "0")
    seed = random.SystemRandom().randrange(2**31) if given == "fresh" else int(given)
    print(f"seed {seed}")
    return seed


def close(
    actual: Tensor,
    expected: Tensor,
    *,
    terms: int = 1,
    what: str = "",
    summed: Tensor | None = None,
) -> None:
    """Assert that ``actual`` is ``expected`` (float64) to the rounding of its own dtype.

    terms: how many products a sum has; float32 sums lose ``sqrt(terms)`` of their last bits of the
    largest value. Low precision is rounded once, at the end (the interpreter truncates bfloat16).
    summed: what each sum adds up, without signs, in place of the largest value: said where few are
    compared, all of which may happen to cancel.
    """
    assert actual.shape == expected.shape, f"{what} {actual.shape} {expected.shape}"
    eps = torch.finfo(actual.dtype).eps
    sums = 1e-12 if actual.dtype == torch.float64 else 4 * 2**-24 * terms**0.5
    scale: Tensor | float = 0.0
    if expected.numel():
        scale = expected.abs().max() if summed is None else summed
    tiny = torch.finfo(actual.dtype).smallest_normal * eps
    limit = 1.01 * eps * expected.abs() + sums * scale + tiny
    wrong = ~((actual.double() - expected).abs() <= limit)  # so that NaN is wrong
    if wrong.any():
        place = tuple(int(i) for i in wrong.nonzero()[0])
        raise AssertionError(
            f"{what}: {int(wrong.sum())} of {wrong.numel()} are wrong, first at {place}: "
            f"{float(actual[place])} for {float(expected[place])}"
        )


@contextmanager
def watched(module: ModuleType, *kernels: str, **changes: Any) -> Iterator[dict[str, int]]:
    """Counts launches of a module's kernels by name; inside, new float memory is full of NaN.

    changes: other names of the module and what they are inside.
    """
    counts = dict.fromkeys(kernels, 0)

    class Counting:
        def __init__(self, name: str) -> None:
            self.name, self.kernel = name, getattr(module, name)

        def __getitem__(self, grid: Any) -> Any:
            counts[self.name] += 1
            return self.kernel[grid]

    with (
        mock.patch.multiple(module, **{name: Counting(name) for name in kernels}, **changes),
        mock.patch.object(Tensor, "new_empty", _poisoned(Tensor.new_empty)),
        mock.patch.object(torch, "empty_like", _poisoned(torch.empty_like)),
        mock.patch.object(torch, "empty", _poisoned(torch.empty)),
    ):
        yield counts


def _poisoned(make: Any) -> Any:
    def poisoned(*args: Any, **kwargs: Any) -> Tensor:
        made = make(*args, **kwargs)
        return made.fill_(float("nan")) if made.is_floating_point() else made

    return poisoned


def launched(counts: dict[str, int]) -> set[str]:
    return {name for name, count in counts.items() if count}
