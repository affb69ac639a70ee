"""Fusing neighbours: what stays inside is not moved, what is used elsewhere is."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from galvatron_compile.passes.fusion import fuse
from galvatron_compile.passes.tally import Tally, tally

N = 64
F32 = 4
SQUARE = N * N * F32


class Chain(torch.nn.Module):
    """A product, three pointwise operators of which backward needs two results, a product."""

    def forward(self, x: torch.Tensor, w: torch.Tensor) -> tuple[torch.Tensor]:
        return (((x @ w) + 1).sigmoid().exp() @ w,)


def counted() -> Tally:
    def make() -> list[Any]:
        return [torch.randn(N, N), torch.randn(N, N)]

    return tally(fx.symbolic_trace(Chain()), make, [True, True], [True, False], True)


def test_a_compiler_makes_one_kernel_between_two_products() -> None:
    plain, fused = counted(), fuse(counted())
    assert [c.name for c in plain.forward] == ["mm", "add", "sigmoid", "exp", "mm"]
    assert [c.name for c in fused.forward] == ["mm", "fused", "mm"]
    # Reads the product; writes what sigmoid and exp gave, since backward reads both.
    assert fused.forward[1].num_bytes == 3 * SQUARE
    assert sum(c.flops for c in fused.backward) == sum(c.flops for c in plain.backward)
    assert sum(c.num_bytes for c in fused.backward) < sum(c.num_bytes for c in plain.backward)
    assert fused.saved_bytes == plain.saved_bytes


def test_gradients_are_added_up_outside() -> None:
    names = [c.name for c in fuse(counted()).backward]
    assert names.count("accumulate") == [c.name for c in counted().backward].count("accumulate")


def test_only_named_neighbours_are_fused_by_hand() -> None:
    fused = fuse(counted(), frozenset({("add", "sigmoid")}))
    assert [c.name for c in fused.forward] == ["mm", "fused", "exp", "mm"]
    assert fused.forward[1].num_bytes == 2 * SQUARE
    assert fuse(counted(), frozenset()).forward == counted().forward


def test_a_product_swallows_what_is_named_with_it() -> None:
    fused = fuse(counted(), frozenset({("mm", "add"), ("exp", "mm")}))
    first, _, last = fused.forward
    assert (first.name, first.kind, first.flops) == ("mm", "matmul", 2 * N**3)
    assert first.num_bytes == 3 * SQUARE  # two operands, and the sum instead of the product
    assert last.flops == 2 * N**3 and last.product == (1, N, N, N)


def test_what_leaves_the_layer_is_written() -> None:
    class Leaves(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            first = x + 1
            return first, first * 2

    found = tally(
        fx.symbolic_trace(Leaves()), lambda: [torch.randn(N, N)], [False], [True], True
    )
    assert fuse(found).forward[0].num_bytes == 3 * SQUARE
