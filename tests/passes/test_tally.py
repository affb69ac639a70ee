"""Counting a layer without running it."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from galvatron_compile.passes.tally import ACCUMULATE, ATTENTION, MATMUL, Tally, tally

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


class Norm(torch.nn.Module):
    def forward(self, x: torch.Tensor, w: torch.Tensor) -> tuple[torch.Tensor]:
        return (torch.ops.aten.rms_norm.default(x, [H], w, 1e-5),)


def norm(cuda: bool) -> Tally:
    def make() -> list[Any]:
        return [torch.randn(B, S, H), torch.randn(H)]

    return tally(fx.symbolic_trace(Norm()), make, [True] * 2, [True, False], cuda)


def test_cuda_runs_rms_norm_as_one_kernel_each_way() -> None:
    counted, x, rows = norm(cuda=True), B * S * H * F32, B * S * F32
    assert [c.name for c in counted.forward] == ["_fused_rms_norm"]
    assert counted.forward[0].num_bytes == 2 * x + rows + H * F32
    assert [c.name for c in counted.backward] == ["_fused_rms_norm_backward", ACCUMULATE]
    assert counted.backward[0].num_bytes == 3 * x + rows + 2 * H * F32
    assert counted.saved_bytes == x + rows  # its input, and 1 / rms of every row
    assert len(norm(cuda=False).forward) > 4  # the CPU is counted as it runs


def test_cuda_keeps_a_byte_an_element_for_dropout() -> None:
    class Drop(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor]:
            kept = torch.ops.aten.dropout.default(x.exp(), 0.5, True)
            same = torch.ops.aten.dropout.default(kept, 0.0, True)
            return (torch.ops.aten.dropout.default(same, 0.5, False),)

    counted = tally(fx.symbolic_trace(Drop()), lambda: [torch.randn(B, H)], [True], [True], True)
    assert [c.name for c in counted.forward] == ["exp", "native_dropout"]
    assert counted.forward[1].num_bytes == B * H * (2 * F32 + 1)
    assert [c.name for c in counted.backward] == ["native_dropout_backward", "mul"]
    assert counted.saved_bytes == B * H * (F32 + 1)  # the mask, and what exp gave


def test_cuda_drops_shares_of_attention_without_writing_scores() -> None:
    class Dropped(torch.nn.Module):
        def forward(self, q: torch.Tensor) -> tuple[torch.Tensor]:
            return (torch.ops.aten.scaled_dot_product_attention.default(q, q, q, None, 0.1, True),)

    graph = fx.symbolic_trace(Dropped())
    counted = tally(graph, lambda: [torch.randn(2, 4, S, H)], [True], [True], True)
    assert [c.kind for c in counted.forward] == [ATTENTION]


def test_cuda_adds_gradients_of_parameters_up_and_reads_only_rows_of_a_table() -> None:
    class Lookup(torch.nn.Module):
        def forward(self, table: torch.Tensor, index: torch.Tensor) -> tuple[torch.Tensor]:
            return (torch.ops.aten.embedding.default(table, index),)

    def make() -> list[Any]:
        return [torch.randn(1000, H), torch.zeros(B, dtype=torch.int64)]

    graph = fx.symbolic_trace(Lookup())
    counted = tally(graph, make, [True, False], [False, True], True)
    assert counted.forward[0].num_bytes == 2 * B * H * F32 + B * 8
    assert [c.name for c in counted.backward] == ["embedding_dense_backward", ACCUMULATE]
    assert counted.backward[1].num_bytes == 3 * 1000 * H * F32
    on_cpu = tally(graph, make, [True, False], [False, True])
    assert on_cpu.forward[0].num_bytes == (1000 + B) * H * F32 + B * 8
    assert [c.name for c in on_cpu.backward] == ["ones_like", "embedding_dense_backward"]
