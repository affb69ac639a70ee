"""Models from the config.json of Hugging Face transformers, without weights.

The mixtures of transformers (its integrations/moe.py) route the tokens of the whole batch as one
list, so they cannot be split over samples. Those that our own decoder can be are built as it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from galvatron_compile.errors import ShapeError
from galvatron_compile.models.families import FAMILIES
from galvatron_compile.models.load import Workable, load_shape, token_batch
from galvatron_compile.models.shape import DecoderShape

# Ends of architecture names, and the factory that gives such a model with its loss.
_FACTORIES = {
    "ForCausalLM": "AutoModelForCausalLM",
    "LMHeadModel": "AutoModelForCausalLM",
    "ForMaskedLM": "AutoModelForMaskedLM",
    "ForConditionalGeneration": "AutoModelForSeq2SeqLM",
}
_LENGTHS = ("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx")
_MIXTURES = ("mixtral", "qwen3_moe")  # model types that are built as our decoder
# Fields of their configs that say what our decoder has not, with the one value that it is.
_PLAIN: dict[str, Any] = {
    "attention_bias": False,
    "attention_dropout": 0.0,
    "decoder_sparse_step": 1,
    "hidden_act": "silu",
    "mlp_only_layers": [],
    "n_shared_experts": 0,
    "norm_topk_prob": True,
    "num_shared_experts": 0,
    "output_router_logits": False,
    "router_jitter_noise": 0.0,
    "shared_expert_intermediate_size": 0,
}


def from_config(path: Path, seq: int | None, dtype: torch.dtype | None) -> Workable:
    """The model of a config.json, or of the folder that holds one. ShapeError if it has none."""
    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        raise ShapeError(f"{path} holds no config.json; give the folder of a Hugging Face model")
    settings = _read(file)
    transformers = _transformers()
    factory = _factory(settings, file)
    try:
        config = transformers.AutoConfig.from_pretrained(str(file))
        ours = config.model_type in _MIXTURES and factory == "AutoModelForCausalLM"
        if not ours:
            config.use_cache = False  # a cache is for generating
            module = _build(getattr(transformers, factory), config, dtype or torch.bfloat16)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ShapeError(f"{file}: transformers cannot build this model: {error}") from error
    if ours:
        return _mixture(config, file, seq, dtype)
    _check_experts(module, config, file)
    length = seq or _length(config, file)
    batch: dict[str, Any] = dict(token_batch(length))
    if factory == "AutoModelForSeq2SeqLM":
        batch["use_cache"] = False  # T5 takes the argument's default over its config's
    name = str(getattr(config, "model_type", "") or file.parent.name)
    return Workable(
        name, module.train(), batch, length, origin=f"{type(module).__name__} from {file}"
    )


def _read(file: Path) -> dict[str, Any]:
    try:
        settings = json.loads(file.read_text())
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ShapeError(f"{file} is not readable JSON: {error}") from error
    if not isinstance(settings, dict) or "model_type" not in settings:
        raise ShapeError(
            f"{file} has no field model_type, so it is not the config.json of a Hugging Face model"
        )
    return settings


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise ShapeError(
            "a Hugging Face config needs transformers: pip install transformers, or use a "
            "built-in name or package.module:callable"
        ) from error
    return transformers


def _factory(settings: dict[str, Any], file: Path) -> str:
    names = settings.get("architectures") or ["ForCausalLM"]  # many hand-written configs lack it
    for end, factory in _FACTORIES.items():
        if str(names[0]).endswith(end):
            return factory
    raise ShapeError(
        f"{file}: architecture {names[0]} is not a language model with a loss "
        f"({', '.join(_FACTORIES)}); write a function that builds the model and its batch, and "
        "give package.module:callable"
    )


def _build(factory: Any, config: Any, dtype: torch.dtype) -> torch.nn.Module:
    with torch.device("meta"):
        try:
            built: torch.nn.Module = factory.from_config(
                config, dtype=dtype, attn_implementation="sdpa"
            )
        except ValueError as error:  # a model without that kernel says so by name
            if "scaled_dot_product_attention" not in str(error):
                raise
            built = factory.from_config(config, dtype=dtype, attn_implementation="eager")
    return built


def _mixture(config: Any, file: Path, seq: int | None, dtype: torch.dtype | None) -> Workable:
    """Our decoder of a config of ``_MIXTURES``: its parameters are as many as transformers'.

    Unlike there, an expert takes no more than its capacity of a sequence's tokens (see
    :class:`~.shape.DecoderShape`), and norms add 1e-5 whatever ``rms_norm_eps`` says.
    """
    length = seq or _length(config, file)
    try:
        _check_plain(config, length)
        shape = _shape(config)
        built = load_shape(str(config.model_type), shape, length, dtype)
    except ShapeError as error:
        raise ShapeError(f"{file}: {error}") from error
    return Workable(
        built.name, built.module.train(), built.example_inputs, length,
        origin=f"our decoder of {file}: {shape}",
    )  # fmt: skip


def _check_plain(config: Any, length: int) -> None:
    settings = {name: getattr(config, name, None) for name in _PLAIN}
    settings["rope_type"] = _rope(config).get("rope_type")
    for name, plain in {**_PLAIN, "rope_type": "default"}.items():
        if settings[name] is not None and settings[name] != plain:
            raise ShapeError(
                f"{name} is {json.dumps(settings[name])}, which our decoder of "
                f"{config.model_type} does not have; write {json.dumps(plain)}, or build the model "
                "in a function and give package.module:callable"
            )
    window = getattr(config, "sliding_window", None)
    if window is not None and window < length:
        raise ShapeError(
            f"our decoder of {config.model_type} has no sliding window, this one is of {window} "
            f"tokens; write null, or give a sequence that it does not cut, --seq {window}"
        )


def _shape(config: Any) -> DecoderShape:
    """Of a config of ``_MIXTURES``; ShapeError if the numbers do not fit together."""
    qwen = config.model_type == "qwen3_moe"
    return DecoderShape(
        hidden=config.hidden_size,
        layers=config.num_hidden_layers,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        ffn=config.moe_intermediate_size if qwen else config.intermediate_size,
        vocab=config.vocab_size,
        max_positions=config.max_position_embeddings,
        head_width=getattr(config, "head_dim", None) or 0,
        rotary_base=float(_rope(config)["rope_theta"]),
        tied=bool(config.tie_word_embeddings),
        qk_norm=qwen,
        experts=config.num_experts if qwen else config.num_local_experts,
        experts_per_token=config.num_experts_per_tok,
    )


def _rope(config: Any) -> dict[str, Any]:
    """The settings of rotary positions, which transformers 5 put into one field."""
    found = getattr(config, "rope_parameters", None)
    return dict(found) if found else {"rope_theta": config.rope_theta}


def _check_experts(module: torch.nn.Module, config: Any, file: Path) -> None:
    """ShapeError if the model has experts that transformers runs in its integrations/moe.py."""
    for name, part in module.named_modules():
        # what its decorator use_experts_implementation leaves on every such module
        if hasattr(part, "has_gate") and hasattr(part, "is_transposed"):
            known = ", ".join(name for name, shape in FAMILIES.items() if shape.experts)
            raise ShapeError(
                f"{file}: {name} ({type(part).__name__}) routes the tokens of the whole batch as "
                f"one list, so {config.model_type} cannot be split over samples; use a built-in "
                f"mixture ({known}), a config of {' or '.join(_MIXTURES)}, or give "
                "package.module:callable of a model that routes every sample by itself, as "
                "galvatron_compile.models.decoder does"
            )


def _length(config: Any, file: Path) -> int:
    for name in _LENGTHS:
        length = getattr(config, name, None)
        if isinstance(length, int) and length > 0:
            return length
    raise ShapeError(f"{file} names no longest sequence; give the sequence length, --seq 2048")
