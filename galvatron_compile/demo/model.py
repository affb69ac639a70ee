"""A small Llama over bytes, and the single process that its parallel training is held against."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from galvatron_compile.demo.data import VOCABULARY


def build_model(seed: int = 0, max_length: int = 512) -> nn.Module:
    """1.7 million parameters: 4 blocks of width 192, grouped-query attention. Same seed, same."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=max_length,
        use_cache=False,
    )
    model: nn.Module = LlamaForCausalLM(config)
    return model


def num_parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@dataclass(frozen=True)
class Deviation:
    """How far the parallel run is from one process: largest relative differences."""

    loss: float
    gradient: float

    def worst(self, other: Deviation) -> Deviation:
        return Deviation(max(self.loss, other.loss), max(self.gradient, other.gradient))


def deviation(
    state: Mapping[str, Tensor] | None,
    batch: Mapping[str, Tensor],
    loss: float,
    gradients: Mapping[str, Tensor],
) -> Deviation:
    """Run ``batch`` in this process alone, with the weights ``state`` (None: the first ones).

    Each gradient's largest difference is relative to that gradient's largest entry.

    Raises:
        KeyError: ``gradients`` lacks a parameter of the model.
    """
    reference = build_model()
    if state is not None:
        reference.load_state_dict(dict(state))
    expected = reference(**batch).loss
    expected.backward()
    wanted = float(expected.detach())
    worst = 0.0
    for name, parameter in reference.named_parameters():
        assert parameter.grad is not None
        difference = (gradients[name] - parameter.grad).abs().max() / parameter.grad.abs().max()
        worst = max(worst, float(difference))
    return Deviation(abs(loss - wanted) / abs(wanted), worst)
