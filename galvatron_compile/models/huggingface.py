"""Models from the config.json of Hugging Face transformers, without weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from galvatron_compile.errors import ShapeError
from galvatron_compile.models.load import Workable, token_batch

# Ends of architecture names, and the factory that gives such a model with its loss.
_FACTORIES = {
    "ForCausalLM": "AutoModelForCausalLM",
    "LMHeadModel": "AutoModelForCausalLM",
    "ForMaskedLM": "AutoModelForMaskedLM",
    "ForConditionalGeneration": "AutoModelForSeq2SeqLM",
}
_LENGTHS = ("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx")


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
        config.use_cache = False  # a cache is for generating
        module = _build(getattr(transformers, factory), config, dtype or torch.bfloat16)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ShapeError(f"{file}: transformers cannot build this model: {error}") from error
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


def _length(config: Any, file: Path) -> int:
    for name in _LENGTHS:
        length = getattr(config, name, None)
        if isinstance(length, int) and length > 0:
            return length
    raise ShapeError(f"{file} names no longest sequence; give the sequence length, --seq 2048")
