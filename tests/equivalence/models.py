"""Small models of every kind that plans are checked on, with batches for them.

Everything here is made inside the ranks, from a fixed seed, in float64.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

BATCH, SEQ, VOCAB = 8, 12, 32


class Wobble(nn.Module):
    """Attention block with an interleaved query/key/value weight and names nobody would guess."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.zig = nn.LayerNorm(width)
        self.plum = nn.Linear(width, 3 * width)
        self.kiwi = nn.Linear(width, width)
        self.zag = nn.LayerNorm(width)
        self.boat = nn.Linear(width, 4 * width)
        self.sail = nn.Linear(2 * width, width, bias=False)
        self.heads, self.dropout = heads, dropout

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, s, width = x.shape
        fused = self.plum(self.zig(x)).view(b, s, self.heads, 3, width // self.heads)
        q, k, v = (piece.transpose(1, 2) for piece in fused.unbind(3))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + F.dropout(self.kiwi(mixed.transpose(1, 2).reshape(b, s, width)), self.dropout)
        gate, up = self.boat(self.zag(x)).chunk(2, dim=-1)
        return x + self.sail(F.gelu(gate) * up)


class OddGPT(nn.Module):
    """A hand-written GPT that owes nothing to any library's naming."""

    def __init__(
        self, width: int = 32, heads: int = 4, depth: int = 3, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.lettuce = nn.Embedding(VOCAB, width)
        self.where = nn.Parameter(torch.randn(SEQ, width) * 0.1)
        self.pile = nn.ModuleList(Wobble(width, heads, dropout) for _ in range(depth))
        self.last = nn.LayerNorm(width)
        self.out = nn.Linear(width, VOCAB, bias=False)
        self.out.weight = self.lettuce.weight

    def forward(self, tokens: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        x = self.lettuce(tokens) + self.where
        for block in self.pile:
            x = block(x)
        logits = self.out(self.last(x))
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100)


@dataclass(frozen=True)
class Case:
    """A model and its global batch (kwargs): tensors, and constants such as ``use_cache=False``."""

    model: nn.Module
    batch: dict[str, Any]


def _padding() -> torch.Tensor:
    """An attention mask that leaves out none, one or two tokens at the end of each sample."""
    mask = torch.ones(BATCH, SEQ, dtype=torch.int64)
    for row in range(BATCH):
        mask[row, SEQ - row % 3 :] = 0
    return mask


def _text(labels: str = "labels", **extra: Any) -> dict[str, Any]:
    """Token batch whose ignored labels are spread very unevenly over the samples."""
    tokens = torch.randint(0, VOCAB, (BATCH, SEQ))
    wanted = torch.randint(0, VOCAB, (BATCH, SEQ))
    for row in range(BATCH):
        wanted[row, 1 + (row * 5) % (SEQ - 2) :] = -100
    wanted[3] = -100
    return {"input_ids": tokens, labels: wanted, **extra}


def odd_gpt() -> Case:
    batch = _text()
    return Case(OddGPT(), {"tokens": batch["input_ids"], "labels": batch["labels"]})


def llama() -> Case:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=VOCAB, use_cache=False, tie_word_embeddings=False,
    )
    return Case(LlamaForCausalLM(config), _text())


def gpt2() -> Case:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        n_embd=32, n_layer=3, n_head=4, vocab_size=VOCAB, n_positions=SEQ, use_cache=False,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )
    return Case(GPT2LMHeadModel(config), _text())


def bert() -> Case:
    from transformers import BertConfig, BertForMaskedLM

    config = BertConfig(
        hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=48,
        vocab_size=VOCAB, max_position_embeddings=SEQ, hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return Case(BertForMaskedLM(config), _text(attention_mask=_padding()))


def t5() -> Case:
    """Encoder and decoder of different lengths, one embedding for both of them and the head."""
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(
        d_model=32, d_kv=8, d_ff=48, num_layers=2, num_decoder_layers=3, num_heads=4,
        vocab_size=VOCAB, dropout_rate=0.0, decoder_start_token_id=0, pad_token_id=0,
        relative_attention_num_buckets=8, relative_attention_max_distance=10,
    )
    batch = _text(attention_mask=_padding(), use_cache=False)
    batch["labels"] = batch["labels"][:, : SEQ - 4].contiguous()
    return Case(T5ForConditionalGeneration(config), batch)


def vit() -> Case:
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=48,
        image_size=24, patch_size=8, num_labels=8, hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    batch = {
        "pixel_values": torch.randn(BATCH, 3, 24, 24, dtype=torch.float64),
        "labels": torch.randint(0, 8, (BATCH,)),
    }
    return Case(ViTForImageClassification(config), batch)


MODELS: dict[str, Callable[[], Case]] = {
    "odd_gpt": odd_gpt, "llama": llama, "gpt2": gpt2, "bert": bert, "vit": vit, "t5": t5,
}


def make(name: str, seed: int = 0) -> Case:
    """The named case in float64, the same in every process."""
    torch.manual_seed(seed)
    case = MODELS[name]()
    model = case.model.double().train()
    with torch.no_grad():
        for parameter in model.parameters():  # zero biases would hide wrong shardings
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return Case(model, case.batch)


class Promote(torch.overrides.TorchFunctionMode):
    """Casts to float32 that a model hard-codes become casts to float64.

    Without it a float64 comparison stops at float32's precision (shared/SHARDING.md). It is
    active on both sides: around the eager reference and around the capture.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if func is torch.Tensor.float:
            func = torch.Tensor.double
        args = tuple(torch.float64 if value is torch.float32 else value for value in args)
        kwargs = {
            name: torch.float64 if value is torch.float32 else value
            for name, value in (kwargs or {}).items()
        }
        return func(*args, **kwargs)
