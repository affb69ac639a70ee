"""Shapes of published models by name."""

from __future__ import annotations

import difflib
from dataclasses import replace

from galvatron_compile.errors import ShapeError
from galvatron_compile.models.shape import DecoderShape

_QWEN3_VOCAB = 151_936


def _gpt(hidden: int, layers: int, heads: int, positions: int) -> DecoderShape:
    """Byte-pair vocabulary of 50,257, inner width 4 times the outer one."""
    return DecoderShape(
        hidden, layers, heads, heads, 4 * hidden, 50_257, positions,
        norm="layer", mlp="gelu", positions="learned", tied=True, biases="all", dropout=0.1,
    )  # fmt: skip


def _llama2(hidden: int, layers: int, heads: int, kv_heads: int, ffn: int) -> DecoderShape:
    return DecoderShape(hidden, layers, heads, kv_heads, ffn, 32_000, 4096)


def _llama3(
    hidden: int, layers: int, heads: int, ffn: int, tied: bool = False
) -> DecoderShape:
    """8,192 tokens, the length most of the training ran at, not the extended context."""
    return DecoderShape(
        hidden, layers, heads, 8, ffn, 128_256, 8192, rotary_base=500_000.0, tied=tied
    )


def _mistral(
    hidden: int, layers: int, heads: int, ffn: int, positions: int, experts: int = 0
) -> DecoderShape:
    chosen = 2 if experts else 0
    return DecoderShape(
        hidden, layers, heads, 8, ffn, 32_000, positions, rotary_base=1e6,
        experts=experts, experts_per_token=chosen,
    )  # fmt: skip


def _qwen2(hidden: int, layers: int, heads: int, kv_heads: int, ffn: int) -> DecoderShape:
    return DecoderShape(
        hidden, layers, heads, kv_heads, ffn, 152_064, 32_768, rotary_base=1e6, biases="qkv"
    )


def _qwen3(
    hidden: int, layers: int, heads: int, kv_heads: int, ffn: int, tied: bool = False
) -> DecoderShape:
    return DecoderShape(
        hidden, layers, heads, kv_heads, ffn, _QWEN3_VOCAB, 32_768, head_width=128,
        rotary_base=1e6, tied=tied, qk_norm=True,
    )  # fmt: skip


def _mixture(dense: DecoderShape, experts: int, chosen: int) -> DecoderShape:
    return replace(dense, experts=experts, experts_per_token=chosen)


FAMILIES: dict[str, DecoderShape] = {
    # Radford et al. 2019, table 2; config.json of huggingface.co/openai-community/gpt2 and others
    "gpt2": _gpt(768, 12, 12, 1024),
    "gpt2-medium": _gpt(1024, 24, 16, 1024),
    "gpt2-large": _gpt(1280, 36, 20, 1024),
    "gpt2-xl": _gpt(1600, 48, 25, 1024),
    # Brown et al. 2020, table 2.1
    "gpt3-6.7b": _gpt(4096, 32, 32, 2048),
    "gpt3-175b": _gpt(12_288, 96, 96, 2048),
    # Touvron et al. 2023; config.json of huggingface.co/meta-llama/Llama-2-7b-hf and others
    "llama2-7b": _llama2(4096, 32, 32, 32, 11_008),
    "llama2-13b": _llama2(5120, 40, 40, 40, 13_824),
    "llama2-70b": _llama2(8192, 80, 64, 8, 28_672),
    # The Llama 3 herd of models, arXiv 2407.21783, table 3; the two small ones: config.json of
    # huggingface.co/meta-llama/Llama-3.2-1B and Llama-3.2-3B
    "llama3-1b": _llama3(2048, 16, 32, 8192, tied=True),
    "llama3-3b": _llama3(3072, 28, 24, 8192, tied=True),
    "llama3-8b": _llama3(4096, 32, 32, 14_336),
    "llama3-70b": _llama3(8192, 80, 64, 28_672),
    "llama3-405b": _llama3(16_384, 126, 128, 53_248),
    # Jiang et al. 2023 and 2024; config.json of huggingface.co/mistralai/Mistral-7B-v0.1,
    # Mixtral-8x7B-v0.1 and Mixtral-8x22B-v0.1
    "mistral-7b": replace(_mistral(4096, 32, 32, 14_336, 8192), rotary_base=10_000.0),
    "mixtral-8x7b": _mistral(4096, 32, 32, 14_336, 32_768, experts=8),
    "mixtral-8x22b": _mistral(6144, 56, 48, 16_384, 65_536, experts=8),
    # Qwen2.5 technical report, arXiv 2412.15115; config.json of huggingface.co/Qwen/Qwen2.5-7B …
    "qwen2.5-7b": _qwen2(3584, 28, 28, 4, 18_944),
    "qwen2.5-72b": _qwen2(8192, 80, 64, 8, 29_568),
    # Qwen3 technical report, arXiv 2505.09388; config.json of huggingface.co/Qwen/Qwen3-8B …
    "qwen3-0.6b": _qwen3(1024, 28, 16, 8, 3072, tied=True),
    "qwen3-1.7b": _qwen3(2048, 28, 16, 8, 6144, tied=True),
    "qwen3-4b": _qwen3(2560, 36, 32, 8, 9728, tied=True),
    "qwen3-8b": _qwen3(4096, 36, 32, 8, 12_288),
    "qwen3-14b": _qwen3(5120, 40, 40, 8, 17_408),
    "qwen3-32b": _qwen3(5120, 64, 64, 8, 25_600),
    "qwen3-30b-a3b": _mixture(_qwen3(2048, 48, 32, 4, 768), 128, 8),
    "qwen3-235b-a22b": _mixture(_qwen3(4096, 94, 64, 4, 1536), 128, 8),
}


def family(name: str) -> DecoderShape:
    """The shape of a published model. ShapeError with the nearest names if there is none."""
    found = FAMILIES.get(name.lower())
    if found is None:
        near = difflib.get_close_matches(name.lower(), FAMILIES, 3, cutoff=0.5)
        hint = f"; did you mean {' or '.join(near)}?" if near else ""
        raise ShapeError(
            f"no model {name!r}{hint}\nknown names: {', '.join(FAMILIES)}\nor give the path of a "
            "Hugging Face config.json, or package.module:callable"
        )
    return found
