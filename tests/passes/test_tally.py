"""Counting a layer without running it."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from galvatron_compile.passes.tally import ATTENTION, MATMUL, tally

B, S, H = 4, 16, 64
F32 = 4


class Mlp(torch.nn.Module):
    def forward(self, x: torch.Tensor, w: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor]:
        return (torch.nn.functional.linear(torch.relu(torch.nn.functional.linear(x, w)), v) + x,)


class Attention(torch.nn.Module):
    def forward(self, q: torch.Tensor) -> tuple[torch.Tensor]:
        return (torch.nn.functional.scaled_dot_product_attention(q, q, q),)


def mlp() -> Any:
    def make() -> list[Any]:
        return [torch.randn(B, S, H), torch.randn(2 * H, H), torch.randn(H, 2 * H)]

    return tally(fx.symbolic_trace(Mlp()), make, [True] * 3, [True, False, False])


def test_matrix_flops_are_two_per_multiply_add_and_twice_that_backward() -> None:
    counted = mlp()
    forward = sum(c.flops for c in counted.forward if c.kind == MATMUL)
    backward = sum(c.flops for c in counted.backward if c.kind == MATMUL)
    assert forward == 2 * B * S * H * 2 * H * 2
    assert backward == 2 * forward


def test_attention_flops_are_counted_on_the_cpu_kernel_too() -> None:
    graph = fx.symbolic_trace(Attention())
    counted = tally(graph, lambda: [torch.randn(B, 2, S, 8)], [True], [True])
    forward = sum(c.flops for c in counted.forward if c.kind == ATTENTION)
    assert forward == 4 * B * 2 * S * S * 8
    assert sum(c.flops for c in counted.backward if c.kind == ATTENTION) == 2.5 * forward


def test_saved_bytes_are_the_activations_that_backward_needs() -> None:
    counted = mlp()
    hidden = B * S * 2 * H * F32  # relu's output, saved once though two operators want it
    assert counted.saved_bytes == B * S * H * F32 + hidden  # and the layer's input
    assert counted.input_bytes == B * S * H * F32
    assert counted.peak_bytes > counted.saved_bytes - counted.input_bytes


def test_saved_bytes_match_what_autograd_really_keeps() -> None:
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    x = torch.randn(B, S, H, requires_grad=True)
    w, v = torch.randn(2 * H, H, requires_grad=True), torch.randn(H, 2 * H, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = Mlp()(x, w, v)[0]
    for weight in (w, v):
        kept.pop(weight.untyped_storage().data_ptr(), None)
    assert mlp().saved_bytes == sum(kept.values())
    assert out.requires_grad


def test_every_node_knows_what_it_caused() -> None:
    counted = mlp()
    assert [c.name for c in counted.by_node["relu"]] == ["relu"]
    assert sum(c.flops for c in counted.by_node["linear"]) == 2 * B * S * H * 2 * H


def test_selective_recompute_keeps_what_products_made_inside_the_layer() -> None:
    counted = mlp()
    # The hidden product is kept; the second one leaves through the addition, so it is kept too.
    assert counted.product_bytes == B * S * (2 * H + H) * F32


def test_causal_attention_is_half_the_work() -> None:
    class Causal(torch.nn.Module):
        def forward(self, q: torch.Tensor) -> tuple[torch.Tensor]:
            attend = torch.nn.functional.scaled_dot_product_attention
            return (attend(q, q, q, is_causal=True),)

    def flops(module: torch.nn.Module) -> list[int]:
        counted = tally(
            fx.symbolic_trace(module), lambda: [torch.randn(2, 4, S, H)], [True], [True]
        )
        return [
            sum(c.flops for c in side if c.kind == ATTENTION)
            for side in (counted.forward, counted.backward)
        ]

    assert [2 * count for count in flops(Causal())] == flops(Attention())


def test_views_that_their_schema_does_not_call_so_cost_nothing() -> None:
    class View(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor]:
            return (torch.ops.aten._unsafe_view(x, [B * S, H]),)

    counted = tally(fx.symbolic_trace(View()), lambda: [torch.randn(B, S, H)], [False], [True])
    assert not counted.forward
