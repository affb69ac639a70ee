"""Depth and width of models that Galvatron profiles: its folders name the model and hold neither.

From the models' published configurations, by Galvatron's names for them.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Shape:
    """num_layers: transformer layers, without embedding and head. hidden_size: of their output."""

    num_layers: int
    hidden_size: int


SHAPES: dict[str, Shape] = {
    "gpt-0.3b": Shape(24, 1024),
    "gpt-1.5b": Shape(48, 1600),
    "gpt-2.7b": Shape(32, 2560),
    "gpt-6.7b": Shape(32, 4096),
    "llama-7b": Shape(32, 4096),
    "llama-13b": Shape(40, 5120),
    "llama-30b": Shape(60, 6656),
    "llama2-7b": Shape(32, 4096),
    "llama2-13b": Shape(40, 5120),
    "llama2-70b": Shape(80, 8192),
    "qwen2.5-7b": Shape(28, 3584),
    "qwen2.5-32b": Shape(64, 5120),
    "qwen2.5-72b": Shape(80, 8192),
}
