"""Built-in shapes are the published ones; the decoder is right, trains, and shards as Megatron."""

from __future__ import annotations

import math
import subprocess
import sys
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from galvatron_compile.errors import ShapeError
from galvatron_compile.graph import LayeredGraph
from galvatron_compile.models import FAMILIES, DecoderShape, family, load_model, load_shape
from galvatron_compile.models.decoder import Decoder, Mixture
from galvatron_compile.passes.batch import batch
from galvatron_compile.passes.capture import capture
from galvatron_compile.passes.layers import find_layers
from galvatron_compile.passes.sharding import shard_layer

SEQ = 16
LLAMA = DecoderShape(64, 3, 16, 8, 128, 256, SEQ)
GPT = DecoderShape(
    64, 3, 8, 8, 256, 256, SEQ, norm="layer", mlp="gelu", positions="learned", biases="all",
    tied=True,
)  # fmt: skip
MIXTURE = replace(LLAMA, experts=4, experts_per_token=2, capacity=2.0)
SHAPES = {
    "llama": LLAMA,
    "gpt": GPT,
    "gpt eager": replace(GPT, attention="eager", tied=False),
    "mixture": MIXTURE,
    "qwen2": replace(LLAMA, biases="qkv"),
    "qwen3": replace(LLAMA, qk_norm=True, head_width=8),
}


@pytest.mark.parametrize(
    ("name", "published"),
    [  # billions, of the papers or the model cards
        ("llama3-8b", 8.03), ("llama3-70b", 70.55), ("llama3-405b", 405.85), ("llama2-7b", 6.74),
        ("llama2-13b", 13.02), ("llama2-70b", 68.98), ("gpt2", 0.1244), ("gpt2-xl", 1.558),
        ("gpt3-175b", 174.6), ("mixtral-8x7b", 46.70), ("mixtral-8x22b", 140.6),
        ("mistral-7b", 7.24), ("qwen3-8b", 8.19), ("qwen3-32b", 32.76), ("qwen3-30b-a3b", 30.53),
        ("qwen3-235b-a22b", 235.09), ("qwen2.5-7b", 7.62), ("qwen2.5-72b", 72.71),
        ("llama3-1b", 1.236), ("llama3-3b", 3.21),
    ],
)  # fmt: skip
def test_published_parameter_counts(name: str, published: float) -> None:
    assert family(name).num_parameters / 1e9 == pytest.approx(published, rel=2e-3)


@pytest.mark.parametrize("name", ["gpt2", "llama3-405b", "mixtral-8x7b", "qwen2.5-7b", "qwen3-4b"])
def test_a_built_model_has_the_parameters_its_shape_says(name: str) -> None:
    model = load_model(name)
    assert model.num_parameters == FAMILIES[name].num_parameters
    assert {p.device.type for p in model.module.parameters()} == {"meta"}
    assert {p.dtype for p in model.module.parameters()} == {torch.bfloat16}
    assert model.seq == FAMILIES[name].max_positions
    assert {t.shape for t in model.example_inputs.values()} == {(2, model.seq)}  # type: ignore[union-attr]
    assert str(model).startswith(f"{name}: ")


def test_sequence_and_dtype_are_the_callers() -> None:
    model = load_model("Llama3-8B", 512, torch.float32)
    assert model.seq == 512 and next(model.module.parameters()).dtype == torch.float32
    with pytest.raises(ShapeError, match="shorten the sequence to 1024"):
        load_model("gpt2", 2048)
    with pytest.raises(ShapeError, match="at least 1 token"):
        load_model("gpt2", 0)


def test_an_unknown_name_is_answered_with_the_nearest() -> None:
    with pytest.raises(ShapeError, match=r"no model 'llama3-71b'; did you mean .*llama3-70b"):
        load_model("llama3-71b")
    with pytest.raises(ShapeError, match=r"known names: gpt2, .*qwen3-8b"):
        load_model("something else")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"heads": 7}, "7 heads do not divide"),
        ({"kv_heads": 3}, "3 key heads do not divide 16"),
        ({"layers": 0}, "layers must be at least 1"),
        ({"norm": "batch"}, "norm must be one of rms, layer"),
        ({"dropout": 1.0}, "below 1"),
        ({"experts": 4}, "0 of 4 experts"),
        ({"experts": 2, "experts_per_token": 3}, "3 of 2 experts"),
        ({"experts": 2, "experts_per_token": 1, "capacity": 0.0}, "above 0"),
        ({"experts": 2, "experts_per_token": 1, "mlp": "gelu"}, "swiglu"),
        ({"head_width": 3}, "even head width"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ShapeError, match=message):
        replace(LLAMA, **change)


def test_the_shapes_cost_no_import_of_torch() -> None:
    code = "import sys, galvatron_compile.models; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


# --- numerics ----------------------------------------------------------------------------------


def made(shape: DecoderShape, dtype: torch.dtype = torch.float64) -> Decoder:
    torch.manual_seed(0)
    return Decoder(shape, SEQ, dtype)


def tokens(vocab: int = 256, size: int = 3) -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    ids = torch.randint(0, vocab, (size, SEQ))
    labels = ids.clone()
    labels[0, : SEQ // 2] = -100
    return {"input_ids": ids, "labels": labels}


def copy_matrix(target: Any, source: torch.Tensor) -> None:
    weight = target.weight if isinstance(target, nn.Module) else target
    assert weight.shape == source.shape
    with torch.no_grad():
        weight.copy_(source)


def fused_qkv(shape: DecoderShape, parts: list[torch.Tensor]) -> torch.Tensor:
    """Query, key and value weights as rows grouped by key head."""
    groups = [part.reshape(shape.kv_heads, -1, *part.shape[1:]) for part in parts]
    return torch.cat(groups, dim=1).flatten(0, 1)


def compare(ours: Decoder, theirs: Any, tolerance: float) -> None:
    """Logits, which depend on everything, and the loss, which transformers takes in float32."""
    kept: list[torch.Tensor] = []
    ours.head.register_forward_hook(lambda module, inputs, output: kept.append(output))
    batch = tokens()
    loss, found = ours(**batch), theirs(**batch)
    assert found.logits.std() > 0.5  # far from the uniform guess, so the comparison says something
    torch.testing.assert_close(kept[0], found.logits, rtol=tolerance, atol=tolerance)
    assert loss.item() == pytest.approx(found.loss.item(), rel=1e-6)


def larger(model: Any) -> Any:
    """Weights an order larger than at the start, so that every layer matters."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(8.0)
    return model


def test_llama_is_that_of_transformers() -> None:
    config = transformers.LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=16,
        num_key_value_heads=8, vocab_size=256, rms_norm_eps=1e-5, use_cache=False,
        rope_parameters={"rope_theta": 10_000.0, "rope_type": "default"},
    )  # fmt: skip
    torch.manual_seed(3)
    theirs = larger(transformers.LlamaForCausalLM(config).double())
    ours = made(LLAMA)
    copy_matrix(ours.tokens, theirs.model.embed_tokens.weight)
    copy_matrix(ours.head, theirs.lm_head.weight)
    for block, layer in zip(ours.blocks, theirs.model.layers, strict=True):
        attention = layer.self_attn
        parts = [attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight]
        copy_matrix(block.attention.qkv, fused_qkv(LLAMA, parts))
        copy_matrix(block.attention.down, attention.o_proj.weight)
        mlp = layer.mlp
        copy_matrix(block.mlp.up, torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight]))
        copy_matrix(block.mlp.down, mlp.down_proj.weight)
    # transformers computes norms and angles in float32 whatever the model's dtype
    compare(ours, theirs, 1e-5)


def test_gpt_is_that_of_transformers() -> None:
    config = transformers.GPT2Config(
        n_embd=64, n_layer=3, n_head=8, vocab_size=256, n_positions=SEQ, use_cache=False,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    torch.manual_seed(3)
    theirs = larger(transformers.GPT2LMHeadModel(config).double().eval())
    ours = made(GPT).eval()
    copy_matrix(ours.tokens, theirs.transformer.wte.weight)
    copy_matrix(ours.positions, theirs.transformer.wpe.weight)
    for block, layer in zip(ours.blocks, theirs.transformer.h, strict=True):
        parts = list(layer.attn.c_attn.weight.T.chunk(3))
        copy_matrix(block.attention.qkv, fused_qkv(GPT, parts))
        copy_matrix(block.attention.down, layer.attn.c_proj.weight.T)
        copy_matrix(block.mlp.up, layer.mlp.c_fc.weight.T)
        copy_matrix(block.mlp.down, layer.mlp.c_proj.weight.T)
    compare(ours, theirs, 1e-9)


def test_scores_in_memory_give_what_the_fused_kernel_gives() -> None:
    fused, eager = made(LLAMA), made(replace(LLAMA, attention="eager"))
    eager.load_state_dict(fused.state_dict())
    batch = tokens()
    losses = [model(**batch) for model in (fused, eager)]
    for loss in losses:
        loss.backward()
    assert losses[0].item() == pytest.approx(losses[1].item(), rel=1e-12)
    for a, b in zip(fused.parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-9, atol=1e-12)


def naive(layer: Mixture, x: torch.Tensor) -> torch.Tensor:
    """Token by token, expert by expert; an expert that is full turns later tokens away."""
    out = torch.zeros_like(x)
    for b in range(x.shape[0]):
        taken = [0] * layer.experts
        for s in range(x.shape[1]):
            scores, experts = (layer.router.weight @ x[b, s]).topk(layer.chosen)
            for share, expert in zip(F.softmax(scores, 0), experts.tolist(), strict=True):
                taken[expert] += 1
                if taken[expert] <= layer.capacity:
                    gate, value = (x[b, s] @ layer.up[expert]).chunk(2)
                    made = (F.silu(gate) * value) @ layer.down[expert]
                    out[b, s] = out[b, s] + share * made
    return out


@pytest.mark.parametrize("capacity", [2.0, 1.0, 0.3])
def test_a_mixture_routes_as_a_loop_would(capacity: float) -> None:
    torch.manual_seed(2)
    layer = Mixture(replace(MIXTURE, capacity=capacity), SEQ, torch.float64)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.3)
    x = torch.randn(3, SEQ, 64, dtype=torch.float64, requires_grad=True)
    weights = torch.linspace(-1, 1, x.numel(), dtype=torch.float64).view_as(x)
    found = []
    for function in (layer, lambda y: naive(layer, y)):
        layer.zero_grad()
        x.grad = None
        out = function(x)
        (out * weights).sum().backward()
        found.append([out, x.grad, *(p.grad for p in layer.parameters())])
    dropped = capacity < 2 and (found[1][0] == 0).all(-1).any()
    assert dropped or capacity >= 1, "the case must drop some tokens altogether"
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)


def test_a_mixture_computes_as_many_products_as_it_routes() -> None:
    shape = replace(MIXTURE, capacity=1.0)
    layer = Mixture(shape, SEQ, torch.float32)
    with FlopCounterMode(display=False) as counter:
        layer(torch.randn(3, SEQ, 64))
    routed = 2 * 3 * SEQ * shape.experts_per_token * 3 * 64 * shape.ffn
    assert counter.get_total_flops() == routed + 2 * 3 * SEQ * 64 * shape.experts


@pytest.mark.parametrize("name", SHAPES)
def test_it_trains(name: str) -> None:
    torch.manual_seed(0)
    model = Decoder(replace(SHAPES[name], dropout=0.05), SEQ)
    assert sum(p.numel() for p in model.parameters()) == SHAPES[name].num_parameters
    batch = tokens()
    first = model(**batch)
    assert first.item() == pytest.approx(math.log(256), abs=0.2)
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(30):
        optimizer.zero_grad()
        loss = model(**batch)
        loss.backward()
        optimizer.step()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert loss.item() < first.item() - 2


# --- what the planner makes of it --------------------------------------------------------------


@cache
def layered(name: str) -> LayeredGraph:
    model = load_shape(name, SHAPES[name])
    return find_layers(batch(capture(model.module, model.example_inputs, model.loss_fn)))


@pytest.mark.parametrize("name", SHAPES)
def test_it_is_captured_with_a_free_batch_and_equal_blocks(name: str) -> None:
    found = layered(name)
    assert found.graph.batch_symbol is not None and found.graph.splits_batch
    names = ["embedding", "blocks.0", "blocks.1", "blocks.2", "norm", "head"]
    assert [layer.name for layer in found.layers] == names
    assert [layer.class_index for layer in found.layers] == [0, 1, 1, 1, 2, 3]


BLOCK = {"attention_qkv_weight": "S(0)", "attention_down_weight": "S(1)", "mlp_down_weight": "S(1)"}


@pytest.mark.parametrize("tp", [2, 4, 8])
@pytest.mark.parametrize("name", [name for name in SHAPES if name != "mixture"])
def test_blocks_are_sharded_column_then_row(name: str, tp: int) -> None:
    found = layered(name)
    for sequence_parallel in (False, True):
        form = shard_layer(found.classes[1], tp, sequence_parallel)
        nodes = form.layer_class.graph.graph.find_nodes(op="placeholder")
        kinds = form.layer_class.kinds
        own = [n.name for n, kind in zip(nodes, kinds, strict=True) if kind == "parameter"]
        placed = dict(zip(own, map(str, form.parameters), strict=True))
        assert {name: placed[name] for name in BLOCK} == BLOCK
        assert placed["mlp_up_weight"] == ("S(0,2)" if SHAPES[name].mlp == "swiglu" else "S(0)")
        moved = [f"{c.direction} {c.kind}" for c in form.collectives]
        around = ["backward reduce_scatter", "forward all_gather", "backward all_gather",
                  "forward reduce_scatter"]  # fmt: skip
        plain = ["backward all_reduce", "forward all_reduce"]
        assert sorted(moved) == sorted(2 * (around if sequence_parallel else plain))
        assert form.remarks == ()


def test_the_head_is_sharded_over_the_vocabulary() -> None:
    form = shard_layer(layered("llama").classes[3], 4, False)
    assert [str(p) for p in form.parameters] == ["S(0)"]
