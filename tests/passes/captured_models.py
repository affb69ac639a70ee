"""Tiny models for the tests of capture and layers, and how they are compared with eager."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

VOCABULARY, LENGTH, WIDTH = 32, 8, 16


class OddBlock(nn.Module):
    """Causal attention with a fused projection, and an MLP, under names that say nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.zig, self.zag = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.ping, self.pong = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.foo, self.bar = nn.Linear(WIDTH, 24), nn.Linear(24, WIDTH)

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        batch, length, _ = h.shape
        heads = self.ping(self.zig(h)).view(batch, length, 3, 4, 4).permute(2, 0, 3, 1, 4)
        q, k, v = heads.unbind(0)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        h = h + self.pong(mixed.transpose(1, 2).reshape(batch, length, WIDTH))
        return h + self.bar(nn.functional.gelu(self.foo(self.zag(h))))


class OddGPT(nn.Module):
    def __init__(self, blocks: int = 3, tied: bool = True) -> None:
        super().__init__()
        self.apple = nn.Embedding(VOCABULARY, WIDTH)
        self.pear = nn.Parameter(torch.randn(LENGTH, WIDTH))
        self.plums = nn.ModuleList(OddBlock() for _ in range(blocks))
        self.fig = nn.LayerNorm(WIDTH)
        self.melon = nn.Linear(WIDTH, VOCABULARY, bias=False)
        if tied:
            self.melon.weight = self.apple.weight

    def forward(self, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        h = self.apple(ids) + self.pear
        for plum in self.plums:
            h = plum(h)
        logits = self.melon(self.fig(h))
        return nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())


class RenamedBlock(OddBlock):
    def __init__(self) -> None:
        super().__init__()
        self.norm_in, self.qkv = self.zig, self.ping
        del self.zig, self.ping

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        batch, length, _ = h.shape
        heads = self.qkv(self.norm_in(h)).view(batch, length, 3, 4, 4).permute(2, 0, 3, 1, 4)
        q, k, v = heads.unbind(0)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        h = h + self.pong(mixed.transpose(1, 2).reshape(batch, length, WIDTH))
        return h + self.bar(nn.functional.gelu(self.foo(self.zag(h))))


class RenamedGPT(nn.Module):
    """OddGPT, block for block, with other names."""

    def __init__(self, blocks: int = 3) -> None:
        super().__init__()
        self.token = nn.Embedding(VOCABULARY, WIDTH)
        self.place = nn.Parameter(torch.randn(LENGTH, WIDTH))
        self.trunk = nn.ModuleDict({f"step{n}": RenamedBlock() for n in range(blocks)})
        self.last = nn.LayerNorm(WIDTH)
        self.out = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.out.weight = self.token.weight

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        h = self.token(x) + self.place
        for block in self.trunk.values():
            h = block(h)
        logits = self.out(self.last(h))
        return nn.functional.cross_entropy(logits.flatten(0, 1), y.flatten())


def token_batch(size: int, **names: str) -> dict[str, torch.Tensor]:
    ids, labels = names.get("ids", "ids"), names.get("labels", "labels")
    made = torch.randint(0, VOCABULARY, (2, size, LENGTH))
    made[1, 0, : LENGTH // 2] = -100
    return {ids: made[0], labels: made[1]}


def eager(model: nn.Module, loss: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The loss and every gradient, by name; the model's gradients are cleared."""
    model.zero_grad()
    loss.backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return loss.detach(), gradients


def assert_equal_to(
    reference: tuple[torch.Tensor, dict[str, torch.Tensor]], model: nn.Module, loss: torch.Tensor
) -> None:
    value, gradients = eager(model, loss)
    torch.testing.assert_close(value, reference[0], rtol=1e-12, atol=1e-12)
    assert gradients.keys() == reference[1].keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, reference[1][name], rtol=1e-10, atol=1e-12, msg=name)


def transformers_model(kind: str) -> tuple[nn.Module, Any]:
    """A tiny model and a function from a batch size to a batch."""
    import transformers as hf

    small: dict[str, Any] = {"vocab_size": VOCABULARY, "hidden_size": WIDTH}
    layers: dict[str, Any] = {"num_hidden_layers": 3, "num_attention_heads": 4}
    tokens = lambda n: token_batch(n, ids="input_ids") | {"use_cache": False}  # noqa: E731
    plain = lambda n: token_batch(n, ids="input_ids")  # noqa: E731
    if kind.startswith("llama"):
        config: Any = hf.LlamaConfig(
            **small, **layers, intermediate_size=24, num_key_value_heads=2,
            tie_word_embeddings=kind == "llama_tied",
        )  # fmt: skip
        return hf.LlamaForCausalLM(config), tokens
    if kind == "gpt2":
        config = hf.GPT2Config(
            vocab_size=VOCABULARY, n_embd=WIDTH, n_layer=3, n_head=4, n_positions=LENGTH,
            resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        )  # fmt: skip
        return hf.GPT2LMHeadModel(config), tokens
    drops = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    if kind == "bert":
        config = hf.BertConfig(**small, **layers, **drops, intermediate_size=24)
        return hf.BertForMaskedLM(config), plain
    if kind == "vit":
        config = hf.ViTConfig(
            hidden_size=WIDTH, **layers, **drops, intermediate_size=24, image_size=8, patch_size=4,
            num_labels=5,
        )  # fmt: skip
        return hf.ViTForImageClassification(config), lambda n: {
            "pixel_values": torch.randn(n, 3, 8, 8),
            "labels": torch.randint(0, 5, (n,)),
        }
    config = hf.T5Config(
        vocab_size=VOCABULARY, d_model=WIDTH, d_kv=4, d_ff=24, num_layers=3, num_heads=4,
        dropout_rate=0.0, decoder_start_token_id=0, pad_token_id=0,
    )  # fmt: skip
    return hf.T5ForConditionalGeneration(config), tokens
