"""Attention over repeated key heads and attention that shares them, against each other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, fx, nn

from galvatron_compile import grouped_queries
from galvatron_compile.cluster import ClusterProfile
from galvatron_compile.compiler import understand
from galvatron_compile.graph import LayeredGraph, noted
from galvatron_compile.grouped_queries import grouped_query_attention
from galvatron_compile.passes.layer_estimate import Estimator
from galvatron_compile.passes.node_costs import note_costs
from galvatron_compile.passes.sharding import apply
from galvatron_compile.passes.sharding.grouped_queries import share_heads
from galvatron_compile.passes.sharding.table import shard
from galvatron_compile.precision import Precision
from galvatron_compile.strategy import Strategy

aten = torch.ops.aten
BATCH, HEADS, KEY_HEADS, LENGTH, WIDTH = 2, 6, 2, 5, 4
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def repeated(x: Tensor, times: int) -> Tensor:
    """As transformers does it."""
    batch, heads, length, width = x.shape
    x = x[:, :, None].expand(batch, heads, times, length, width)
    return x.reshape(batch, heads * times, length, width)


def tiled(x: Tensor, times: int) -> Tensor:
    """Every head once, then every head again: queries 0 and 2 share a key head, not 0 and 1."""
    batch, heads, length, width = x.shape
    x = x[:, None].expand(batch, times, heads, length, width)
    return x.reshape(batch, heads * times, length, width)


def causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, repeated(k, 3), repeated(v, 3), is_causal=True)


def scaled(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, repeated(k, 3), repeated(v, 3), scale=0.3)


def copied(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    k, v = (x.repeat_interleave(3, dim=1) for x in (k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def of_tiled(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, tiled(k, 3), tiled(v, 3), is_causal=True)


def half_tiled(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, repeated(k, 3), tiled(v, 3), is_causal=True)


def masked(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    mask = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril(1)
    return F.scaled_dot_product_attention(q, repeated(k, 3), repeated(v, 3), attn_mask=mask)


def dropping(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, repeated(k, 3), repeated(v, 3), dropout_p=0.5)


def moved(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Repeated along the width, and flattened to the right sizes."""
    k, v = (x[..., None].expand(*x.shape, 3).reshape(BATCH, HEADS, LENGTH, WIDTH) for x in (k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def positions(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Three dims, of which the second are positions, as many as the query's."""
    k, v = (x[:, 0, :1].repeat_interleave(LENGTH, dim=1) for x in (k, v))
    return F.scaled_dot_product_attention(q[:, 0], k, v, is_causal=True)


def longer(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Every position twice, not every head."""
    k, v = (torch.cat([x, x, x], 1).repeat_interleave(2, dim=2) for x in (k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def swapped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Repeated like heads, then flattened to other lengths and widths."""
    shape = (BATCH, HEADS, WIDTH, LENGTH)
    k, v = (x[:, :, None].expand(-1, -1, 3, -1, -1).reshape(shape) for x in (k, v))
    return F.scaled_dot_product_attention(q.reshape(shape), k, v, is_causal=True)


def unequal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Two heads of keys, three of values."""
    three = repeated(torch.cat([v, v[:, :1]], 1), 2)
    return F.scaled_dot_product_attention(q, repeated(k, 3), three, is_causal=True)


def one_query_head(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention broadcasts it over all keys' heads."""
    return F.scaled_dot_product_attention(q[:, :1], repeated(k, 3), repeated(v, 3))


def one_for_both(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    key = repeated(k + v, 3)
    return F.scaled_dot_product_attention(q, key, key, is_causal=True)


def inputs() -> list[Tensor]:
    torch.manual_seed(0)
    shapes = [(BATCH, heads, LENGTH, WIDTH) for heads in (HEADS, KEY_HEADS, KEY_HEADS)]
    return [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]


def graph_of(attend: Attend) -> fx.GraphModule:
    class Model(nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return attend(q, k, v)

    return torch.export.export(Model(), tuple(inputs())).graph_module


def calls(module: fx.GraphModule, target: object) -> list[fx.Node]:
    return [node for node in module.graph.nodes if node.target is target]


def results(run: Callable[..., object]) -> list[Tensor]:
    given = inputs()
    found = run(*given)
    out: Tensor = found[0] if isinstance(found, tuple) else found  # type: ignore[assignment]
    weights = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape)
    return [out, *torch.autograd.grad((out * weights).sum(), given)]


@pytest.mark.parametrize("attend", [causal, scaled, copied, one_for_both])
def test_shared_heads_give_the_same_output_and_gradients(attend: Attend) -> None:
    module = graph_of(attend)
    share_heads(module)
    module.graph.lint()
    assert len(calls(module, grouped_query_attention)) == 1
    assert not calls(module, aten.expand.default), "what repeats is gone"
    for found, wanted in zip(results(module), results(attend), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "attend",
    [
        of_tiled, half_tiled, masked, dropping, moved, positions, longer, swapped, unequal,
        one_query_head,
    ],
)  # fmt: skip
def test_what_cannot_be_shared_stays(attend: Attend) -> None:
    module = graph_of(attend)
    before = module.code
    share_heads(module)
    assert module.code == before


def test_repeated_keys_that_something_else_reads_stay_for_it() -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        key = repeated(k, 3)
        mixed = F.scaled_dot_product_attention(q, key, repeated(v, 3), is_causal=True)
        return mixed + key

    module = graph_of(attend)
    share_heads(module)
    assert len(calls(module, grouped_query_attention)) == 1
    assert len(calls(module, aten.expand.default)) == 1
    for found, wanted in zip(results(module), results(attend), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


class OnCuda:
    """As much of a tensor as is asked for."""

    device = torch.device("cuda", 0)

    def __init__(self, dtype: torch.dtype, width: int, length: int = 8) -> None:
        self.dtype, self.shape = dtype, (1, 4, length, width)


HALF = torch.bfloat16
OK, WIDE = OnCuda(HALF, 128), OnCuda(torch.float16, 256)


@pytest.mark.parametrize(
    ("query", "key", "value", "is_causal", "taken"),
    [
        (OK, OK, OK, True, True),
        (WIDE, WIDE, WIDE, True, True),
        (OnCuda(torch.float32, 128), OK, OK, True, False),
        (OnCuda(HALF, 288), OnCuda(HALF, 288), OnCuda(HALF, 288), True, False),
        (OK, OK, OnCuda(HALF, 64), True, False),
        (OnCuda(HALF, 128, 5), OK, OK, True, False),
        (OnCuda(HALF, 128, 5), OK, OK, False, True),
    ],
)
def test_what_flash_attention_takes(
    query: Any, key: Any, value: Any, is_causal: bool, taken: bool
) -> None:
    assert grouped_queries.flash_takes(query, key, value, is_causal) is taken


def test_on_cuda_only_flash_attention_shares_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    given: Any = (OK, OK, OK, True)
    assert grouped_queries.shares_heads(*given)
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
        assert not grouped_queries.shares_heads(*given)
    monkeypatch.setattr(torch.backends.cuda, "flash_sdp_enabled", lambda: False)
    assert not grouped_queries.shares_heads(*given)


def test_where_no_kernel_shares_heads_they_are_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return grouped_query_attention(q, k, v, True, 0.3)

    wanted, heads = results(attend), []
    real = F.scaled_dot_product_attention

    def spy(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        heads.append((q.shape[1], k.shape[1], v.shape[1], options["enable_gqa"]))
        return real(q, k, v, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    monkeypatch.setattr(grouped_queries, "shares_heads", lambda *given: False)
    for found, other in zip(results(attend), wanted, strict=True):
        torch.testing.assert_close(found, other, rtol=1e-12, atol=1e-12)
    assert heads == [(HEADS, HEADS, HEADS, False)]


LENGTH_OF_LLAMA, WIDTH_OF_HEAD = 16, 8


def llama(precision: str | None) -> LayeredGraph:
    """Eight query heads, four key heads."""
    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=8 * WIDTH_OF_HEAD, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=8, num_key_value_heads=4, use_cache=False,
    )  # fmt: skip
    ids = torch.zeros(2, LENGTH_OF_LLAMA, dtype=torch.long)
    model = transformers.LlamaForCausalLM(config)
    return understand(model, {"input_ids": ids, "labels": ids}, None, Precision.parse(precision))


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize(("precision", "shared"), [("bf16", True), (None, False)])
def test_a_llama_keeps_its_key_heads_once(
    tp: int, precision: str | None, shared: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bytes that one sample's attention keeps on GPUs between forward and backward: repeated
    in float32, which FlashAttention does not take."""
    layered = llama(precision)
    block = layered.layers[1].class_index
    strategy = Strategy(tp, 1)
    shardings, cluster = shard(layered, [strategy]), ClusterProfile.preset("2xA100-80GB")

    def saved_bytes() -> int:
        return Estimator(layered, shardings, cluster).estimate(block, strategy, 1).saved_bytes

    found = saved_bytes()
    monkeypatch.setattr(apply, "share_heads", lambda module: None)
    repeated_bytes = 2 * LENGTH_OF_LLAMA * WIDTH_OF_HEAD * 2  # keys and values of one head
    heads_less = (8 - 4) // tp
    assert saved_bytes() - found == heads_less * repeated_bytes * shared


def test_the_printed_graph_tells_what_attention_costs() -> None:
    layered = llama("bf16")
    strategy = Strategy(1, 1)
    shardings, cluster = shard(layered, [strategy]), ClusterProfile.preset("2xA100-80GB")
    note_costs(layered, Estimator(layered, shardings, cluster), [strategy])
    graph = layered.classes[layered.layers[1].class_index].graph
    (call,) = calls(graph, aten.scaled_dot_product_attention.default)
    assert noted(call, "cost").flops > 0
