"""Rows that lie more than 2^31 elements behind the first: offsets must be of 64 bits.

The memory between them is never touched, so it costs none.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from kernel_checks import new_seed
from torch import Tensor

from galvatron_compile.kernels import cross_entropy, experts, rms_norm, rotary, swiglu

STRIDE = 2**30 + 8  # an int of 32 bits itself; twice as far is not
BEFORE = 16  # elements in front, so that a wrapped offset is not the first row's


def far(*shape: int) -> Tensor:
    """float16 random numbers ``[3, ...]``, its first dim of a long stride."""
    whole = torch.empty(2 * STRIDE + 4096, dtype=torch.float16)
    dense = torch.randn(shape).to(torch.float16)
    found = whole.as_strided(shape, (STRIDE, *dense.stride()[1:]), BEFORE)
    return found.copy_(dense)


def dense(x: Tensor) -> Tensor:
    return x.clone(memory_format=torch.contiguous_format)


def _cross_entropy(place: Callable[[Tensor], Tensor]) -> list[Tensor]:
    logits, target = place(far(3, 40)), torch.tensor([1, 39, 20])
    stats = cross_entropy.cross_entropy_statistics(logits, target, 0, -100)
    log_sum, scale = logits.double().logsumexp(1).float(), torch.ones(())
    gradient = cross_entropy.cross_entropy_gradient(logits, target, log_sum, scale, 0, -100)
    cross_entropy.cross_entropy_gradient_(logits, target, log_sum, scale, 0, -100)
    return [stats, gradient, logits]


def _norms(place: Callable[[Tensor], Tensor]) -> list[Tensor]:
    x, dy, weight = place(far(3, 40)), place(far(3, 40)), torch.ones(40, dtype=torch.float16)
    y, rstd = rms_norm._rms_norm(x, weight, 1e-6)
    total = rms_norm.add_rms_norm(x, dy, weight, 1e-6)
    return [y, *total, *rms_norm._rms_norm_backward(dy, x, weight, rstd, x)]


def _swiglu(place: Callable[[Tensor], Tensor]) -> list[Tensor]:
    gate, up, dout = (place(far(3, 40)) for _ in range(3))
    return [swiglu.swiglu(gate, up), *swiglu._swiglu_backward(dout, gate, up)]


def _rotary(place: Callable[[Tensor], Tensor]) -> list[Tensor]:
    tables = [torch.randn(1, 2, 4).to(torch.float16) for _ in range(2)]
    found = []
    for axis in (0, 1, 2):  # which dim is the far one: batches, heads, positions
        x = place(far(3, 2, 2, 4)).transpose(0, axis)
        cos, sin = (table.repeat(1, 2, 1)[:, : x.shape[2]] for table in tables)
        found.append(rotary.rotary_(x, cos, sin))
    return found


def _experts(place: Callable[[Tensor], Tensor]) -> list[Tensor]:
    x, chosen = place(far(3, 40)), torch.tensor([[1], [0], [1]])
    rows, source, _ = experts.permute(x, chosen, 2)
    gates = torch.tensor([[0.5], [1.0], [2.0]])
    back = experts._unpermute_backward(x, x, source, gates)
    return [rows, experts.unpermute(x, source, gates), *back]


def _compare(work: Callable[..., list[Tensor]], seed: int) -> None:
    torch.manual_seed(seed)
    there = [dense(x) for x in work(lambda x: x)]
    torch.manual_seed(seed)
    here = work(dense)
    for one, other in zip(there, here, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


@pytest.mark.parametrize("work", [_cross_entropy, _norms, _swiglu, _rotary, _experts])
def test_far_rows(interpreted: Any, work: Callable[..., list[Tensor]]) -> None:
    interpreted(1).run(_compare, work, new_seed())
