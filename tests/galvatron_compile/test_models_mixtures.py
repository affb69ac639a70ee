"""Mixtures of a Hugging Face config are our decoder; what it does not have is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from galvatron_compile.errors import ShapeError
from galvatron_compile.models import load_model
from galvatron_compile.models.decoder import Decoder
from galvatron_compile.passes.batch import batch
from galvatron_compile.passes.capture import capture
from galvatron_compile.passes.layers import find_layers

COMMON = {
    "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": 64,
    "num_key_value_heads": 2, "max_position_embeddings": 48, "num_experts_per_tok": 2,
    "pad_token_id": None, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
MIXTRAL = {
    **COMMON, "model_type": "mixtral", "architectures": ["MixtralForCausalLM"],
    "intermediate_size": 48, "num_local_experts": 4, "rope_theta": 500_000.0,
}  # fmt: skip
QWEN = {
    **COMMON, "model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"], "head_dim": 16,
    "intermediate_size": 80, "moe_intermediate_size": 24, "num_experts": 6,
    "norm_topk_prob": True, "tie_word_embeddings": True, "rope_theta": 20_000.0,
}  # fmt: skip
CONFIGS: dict[str, dict[str, Any]] = {"mixtral": MIXTRAL, "qwen3_moe": QWEN}


def write(folder: Path, settings: dict[str, Any], **changes: Any) -> str:
    (folder / "config.json").write_text(json.dumps({**settings, **changes}))
    return str(folder)


def parameters_of_transformers(folder: str) -> int:
    config = transformers.AutoConfig.from_pretrained(folder)
    with torch.device("meta"):
        module = transformers.AutoModelForCausalLM.from_config(config)
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize(
    "changes", [{}, {"tie_word_embeddings": True}, {"tie_word_embeddings": False}, {"head_dim": 4}]
)
@pytest.mark.parametrize("name", CONFIGS)
def test_it_has_the_parameters_of_transformers(
    tmp_path: Path, name: str, changes: dict[str, Any]
) -> None:
    folder = write(tmp_path, CONFIGS[name], **changes)
    assert load_model(folder).num_parameters == parameters_of_transformers(folder)


@pytest.mark.parametrize("name", CONFIGS)
def test_every_field_is_read(tmp_path: Path, name: str) -> None:
    settings, folder = CONFIGS[name], write(tmp_path, CONFIGS[name])
    model = load_model(folder, 16, torch.float32)
    module = model.module
    assert isinstance(module, Decoder) and module.training
    assert {(p.device.type, p.dtype) for p in module.parameters()} == {("meta", torch.float32)}
    assert (model.name, model.seq, load_model(folder).seq) == (name, 16, 48)
    shape = module.shape
    assert (shape.heads, shape.kv_heads, shape.head_size) == (4, 2, settings.get("head_dim", 8))
    assert shape.rotary_base == settings["rope_theta"] and shape.experts_per_token == 2
    assert (shape.qk_norm, shape.tied) == (2 * (name == "qwen3_moe",))
    assert model.origin.startswith(f"our decoder of {tmp_path / 'config.json'}: 3 blocks")
    assert model.origin in str(model)


@pytest.mark.parametrize("name", CONFIGS)
def test_it_can_be_split_over_samples_and_has_equal_blocks(tmp_path: Path, name: str) -> None:
    model = load_model(write(tmp_path, CONFIGS[name]), 16)
    found = find_layers(batch(capture(model.module, model.example_inputs, model.loss_fn)))
    assert found.graph.splits_batch
    assert [layer.class_index for layer in found.layers] == [0, 1, 1, 1, 2, 3]


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("qwen3_moe", {"decoder_sparse_step": 2}, "decoder_sparse_step is 2, .*; write 1, "),
        ("qwen3_moe", {"mlp_only_layers": [0]}, r"mlp_only_layers is \[0\], .*; write \[\], "),
        ("qwen3_moe", {"norm_topk_prob": False}, "norm_topk_prob is false, .*; write true, "),
        ("qwen3_moe", {"attention_bias": True}, "attention_bias is true"),
        ("qwen3_moe", {"shared_expert_intermediate_size": 8}, "shared_expert_intermediate_size"),
        ("mixtral", {"n_shared_experts": 1}, "n_shared_experts is 1"),
        ("mixtral", {"hidden_act": "gelu"}, 'hidden_act is "gelu", .*; write "silu", '),
        ("mixtral", {"attention_dropout": 0.1}, "attention_dropout is 0.1"),
        ("mixtral", {"router_jitter_noise": 0.1}, "router_jitter_noise is 0.1"),
        ("mixtral", {"output_router_logits": True}, "output_router_logits is true"),
        ("mixtral", {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "rope_type is"),
        ("mixtral", {"sliding_window": 32}, "no sliding window, .* --seq 32"),
        ("mixtral", {"num_experts_per_tok": 5}, "config.json: a token cannot go to 5 of 4"),
    ],
)
def test_what_our_decoder_does_not_have_is_refused(
    tmp_path: Path, name: str, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ShapeError, match=message) as caught:
        load_model(write(tmp_path, CONFIGS[name], **changes))
    assert "transformers cannot" not in str(caught.value)


def test_a_window_that_cuts_nothing_is_none(tmp_path: Path) -> None:
    assert load_model(write(tmp_path, MIXTRAL, sliding_window=32), 32).seq == 32
    unused = {"sliding_window": 8, "use_sliding_window": False}  # as Qwen 3 is published
    assert load_model(write(tmp_path, QWEN, **unused)).seq == 48


def test_other_mixtures_name_the_built_in_ones(tmp_path: Path) -> None:
    changes = {"model_type": "olmoe", "architectures": ["OlmoeForCausalLM"]}
    with pytest.raises(ShapeError, match=r"OlmoeExperts.* olmoe cannot .*mixtral-8x7b, .*qwen3"):
        load_model(write(tmp_path, MIXTRAL, **changes))
