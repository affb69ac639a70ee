"""Norms, gates, rotary embeddings: patterns, and what looks like one and is not; values stay."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from fuse_cases import BF16, check, exported, norm, r
from torch import Tensor


def turn(x: Tensor, cos: Any, sin: Any) -> Tensor:
    half = x.shape[-1] // 2
    return x * cos + torch.cat((-x[..., half:], x[..., :half]), -1) * sin


def squared(x: Tensor) -> Tensor:
    found = norm(x)
    return found * found


def gated_by_itself(x: Tensor) -> Tensor:
    silu = F.silu(x)
    return silu * silu


def of_a_sum_of_itself(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    total = x + x
    return w * norm(total), total


TAKEN: dict[str, tuple[str, Callable[..., Any], tuple[Tensor, ...]]] = {
    "norm": ("rms_norm", lambda x, w: w * norm(x), (r(2, 3, 8), r(8))),
    "weight behind": ("rms_norm", lambda x, w: norm(x) * w, (r(2, 3, 8), r(8))),
    "weight of Gemma": ("rms_norm", lambda x, w: norm(x) * (1.0 + w), (r(2, 3, 8), r(8))),
    "a positive dim": (
        "rms_norm",
        lambda x, w: w * (x * torch.rsqrt(x.pow(2).mean(2, keepdim=True) + 1e-6)),
        (r(2, 3, 8), r(8)),
    ),
    "sum of itself": ("add_rms_norm", of_a_sum_of_itself, (r(2, 8), r(8))),
    "of torch": ("rms_norm", lambda x, w: F.rms_norm(x, (8,), w, 0.1), (r(2, 8), r(8))),
    "of torch, no eps": ("rms_norm", lambda x, w: F.rms_norm(1e-8 * x, (8,), w), (r(2, 8), r(8))),
    "of torch, of a sum": (
        "add_rms_norm", lambda x, y, w: F.rms_norm(x + y, (8,), w, 0.1), (r(2, 8), r(2, 8), r(8)),
    ),
    "layer norm": (
        "layer_norm", lambda x, w, b: F.layer_norm(x, (8,), w, b, 0.1), (r(2, 8), r(8), r(8)),
    ),
    "layer norm, bare": ("layer_norm", lambda x: F.layer_norm(x, (8,)), (r(2, 8),)),
    "layer norm of a sum": (
        "add_layer_norm",
        lambda x, y, w: F.layer_norm(x + y, (8,), w),
        (r(2, 8), r(2, 8), r(8)),
    ),
    "gate": ("swiglu", lambda x, y: F.silu(x) * y, (r(2, 8), r(2, 8))),
    "gate behind": ("swiglu", lambda x, y: y * F.silu(x), (r(2, 8), r(2, 8))),
    "gate of itself": ("swiglu", lambda x: F.silu(x) * x, (r(2, 8),)),
    "turned": ("rotary", turn, (r(2, 3, 4, 6), r(2, 1, 4, 6), r(2, 1, 4, 6))),
    "turned by one table": ("rotary", turn, (r(2, 3, 4, 6), r(1, 1, 4, 6), r(1, 1, 4, 6))),
    "turned in part": (
        "rotary",
        lambda x, c, s: torch.cat((turn(x[..., :4], c, s), x[..., 4:]), -1),
        (r(2, 3, 5, 6), r(2, 1, 5, 4), r(2, 1, 5, 4)),
    ),
}  # fmt: skip

WEIGHT, TABLES = r(8), (r(2, 1, 4, 6), r(2, 1, 4, 6))
LEFT: dict[str, tuple[Callable[..., Any], tuple[Tensor, ...]]] = {
    "a weight that spreads": (lambda x, w: w * norm(x), (r(2, 3, 8), r(1))),
    "a value that spreads": (lambda x, w: w * norm(x), (r(2, 3, 1), WEIGHT)),
    "a weight of rows": (lambda x, w: w * norm(x), (r(8, 8), r(8, 1))),
    "a norm with a norm for its weight": (squared, (r(8),)),
    "a scaled eps": (
        lambda x, w: w * (x * torch.rsqrt(
            torch.add(x.pow(2).mean(-1, keepdim=True), 1e-2, alpha=3))),
        (r(2, 8), WEIGHT),
    ),
    "a mean in few digits": (
        lambda x, w: w * (x * torch.rsqrt(
            x.pow(2).mean(-1, keepdim=True, dtype=BF16) + 1e-6)),
        (r(2, 8), WEIGHT),
    ),
    "another value is squared": (
        lambda x, y, w: w * (y * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)),
        (r(2, 8), r(2, 8), WEIGHT),
    ),
    "fewer digits inside": (lambda x, w: w * norm(x.float()).double(), (r(2, 8), WEIGHT)),
    "fewer digits behind": (lambda x, w: w * norm(x).bfloat16().double(), (r(2, 8), WEIGHT)),
    "a norm over two dims": (
        lambda x, w: F.layer_norm(x, (3, 8), w), (r(2, 3, 8), r(3, 8)),
    ),
    "an rms norm over two dims": (
        lambda x, w: F.rms_norm(x, (3, 8), w), (r(2, 3, 8), r(3, 8)),
    ),
    "an rms norm without a weight": (lambda x: F.rms_norm(x, (8,)), (r(2, 8),)),
    "gated by itself": (gated_by_itself, (r(2, 8),)),
    "another gate": (lambda x, y: F.gelu(x) * y, (r(2, 8), r(2, 8))),
    "a gate that spreads": (lambda x, y: F.silu(x) * y, (r(2, 1), r(2, 8))),
    "a number for up": (lambda x: F.silu(x) * 2.0, (r(2, 8),)),
    "an odd dim": (turn, (r(2, 3, 4, 5), r(2, 1, 4, 5), r(2, 1, 4, 5))),
    "heads behind positions": (turn, (r(2, 1, 3, 6), r(2, 1, 1, 6), r(2, 1, 1, 6))),
    "one row for all positions": (turn, (r(2, 3, 4, 6), r(2, 1, 1, 6), r(2, 1, 1, 6))),
    "tables for more batches": (turn, (r(1, 3, 4, 6), *TABLES)),
    "a table for each head": (turn, (r(2, 3, 4, 6), r(2, 3, 4, 6), r(2, 3, 4, 6))),
    "numbers for tables": (lambda x: turn(x, 2.0, 3.0), (r(2, 3, 4, 6),)),
    "three dims": (turn, (r(3, 4, 6), r(3, 4, 6), r(3, 4, 6))),
    "turned the other way": (
        lambda x, c, s: x * c + torch.cat((x[..., 3:], -x[..., :3]), -1) * s,
        (r(2, 3, 4, 6), *TABLES),
    ),
    "both turned": (
        lambda x, c, s: x * c + torch.cat((-x[..., 3:], -x[..., :3]), -1) * s,
        (r(2, 3, 4, 6), *TABLES),
    ),
    "not turned": (
        lambda x, c, s: x * c + torch.cat((-x[..., :3], x[..., 3:]), -1) * s,
        (r(2, 3, 4, 6), *TABLES),
    ),
    "uneven parts": (
        lambda x, c, s: x * c + torch.cat((-x[..., 3:5], x[..., :4]), -1) * s,
        (r(2, 3, 4, 6), *TABLES),
    ),
    "bent, not turned": (
        lambda x, c, s: x * c + torch.cat((x[..., 3:].relu(), x[..., :3]), -1) * s,
        (r(2, 3, 4, 6), *TABLES),
    ),
    "thirds": (
        lambda x, c, s: x * c + torch.cat((-x[..., 2:], x[..., :2]), -1) * s,
        (r(2, 3, 4, 6), *TABLES),
    ),
    "pairs side by side": (
        lambda x, c, s: x * c + torch.cat((-x[..., 1::2], x[..., ::2]), -1) * s,
        (r(2, 3, 4, 6), *TABLES),
    ),
    "a part of another value": (
        lambda x, y, c, s: x * c + torch.cat((-y[..., 3:], x[..., :3]), -1) * s,
        (r(2, 3, 4, 6), r(2, 3, 4, 6), *TABLES),
    ),
    "twice the turned part": (
        lambda x, c, s: torch.add(
            x * c, torch.cat((-x[..., 3:], x[..., :3]), -1) * s, alpha=2),
        (r(2, 3, 4, 6), *TABLES),
    ),
    "joined along the positions": (  # which spread
        lambda x, c, s: x * c + torch.cat((-x[..., 1:], x[..., :1]), 2) * s,
        (r(2, 3, 1, 2), r(2, 1, 1, 2), r(2, 1, 1, 2)),
    ),
    "nothing joined": (
        lambda x, c, s: x * c + torch.cat((-x,), -1) * s, (r(2, 3, 4, 6), *TABLES),
    ),
    "means of rows for columns": (
        lambda x, w: w * (x * torch.rsqrt(x.pow(2).mean(-1) + 1e-6)), (r(8, 8), WEIGHT),
    ),
    "a mean of fourth powers": (
        lambda x, w: w * (x * torch.rsqrt(x.pow(4).mean(-1, keepdim=True) + 1e-6)),
        (r(2, 8), WEIGHT),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", TAKEN)
def test_a_pattern_is_replaced(case: str) -> None:
    name, function, inputs = TAKEN[case]
    assert check(exported(function, *inputs), *inputs) == [name]


@pytest.mark.parametrize("case", LEFT)
def test_what_is_no_pattern_stays(case: str) -> None:
    function, inputs = LEFT[case]
    assert check(exported(function, *inputs), *inputs) == []
