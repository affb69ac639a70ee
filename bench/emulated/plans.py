"""What the bench trains, at which link speeds, and under which plans."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

VOCABULARY, LENGTH, BATCH_SIZE = 4096, 64, 16
BLOCKS, HEADS = 4, 4


def model(width: int) -> nn.Module:
    """A Llama of 4 blocks whose embedding and head hold about a third of the parameters."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=width,
        intermediate_size=width * 11 // 4,
        num_hidden_layers=BLOCKS,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        max_position_embeddings=LENGTH,
        use_cache=False,
    )
    made: nn.Module = LlamaForCausalLM(config)
    return made


def batch() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, VOCABULARY, (BATCH_SIZE, LENGTH), generator=generator)
    return {"input_ids": ids, "labels": ids.clone()}


@dataclass(frozen=True)
class Topology:
    """An emulated cluster, the speeds of its links, the model, and the plans that run on it.

    width: of the model; larger where ranks have half a core each, so that what they compute between
        two messages is long beside the periods in which they get their time.
    pure: kind of parallelism -> the plans that use nothing else (the best of them counts).
    plans: more plans, with a few words on what each adds.
    """

    name: str
    ranks_per_node: int
    rates_bits_per_s: tuple[float, ...]
    width: int
    pure: dict[str, tuple[str, ...]]
    plans: tuple[str, ...]

    @property
    def world_size(self) -> int:
        return 2 * self.ranks_per_node

    def all(self) -> tuple[str, ...]:
        pure = [plan for plans in self.pure.values() for plan in plans]
        return tuple(dict.fromkeys((*pure, *self.plans)))


# Between the two speeds the best plan changes: data parallel with a divided head, and a pipeline.
TOPOLOGIES = {
    "a": Topology(
        "2 nodes x 1 rank",
        1,
        (1.2e9, 4e8),
        256,
        {
            "data": ("dp2",),
            "FSDP": ("dp2.zero3",),
            "tensor": ("tp2",),
            "pipeline": ("dp1; pp=2; micro=4; schedule=1f1b", "dp1; pp=2; micro=8; schedule=1f1b"),
        },
        (
            "dp2.zero1",
            "dp2.zero2; micro=2",
            "tp2.sp",
            "dp2.recompute",
            "all: dp2; embedding, head: tp2",
            "all: dp2.zero3; blocks: dp2; 3: dp2.recompute",
            "dp1; pp=2; micro=4; schedule=gpipe",
            "dp1; stages=4,3; micro=8; schedule=zero-bubble",
            "dp1; stages=4,3; micro=8; schedule=1f1b",
            "all: dp1; 0-2: dp1.recompute; pp=2; micro=4; schedule=1f1b",
            "dp1; pp=2; virtual=2; micro=4; schedule=interleaved",
            "dp1; pp=2; micro=2; schedule=gpipe",
            "dp2.zero2.recompute; micro=4",
            "dp2.zero3; micro=4",
            "tp2.recompute",
            "tp2.sp.recompute; micro=4",
        ),
    ),
    "b": Topology(
        "2 nodes x 2 ranks",
        2,
        (1.2e9, 4e8),
        384,
        {
            "data": ("dp4",),
            "FSDP": ("dp4.zero3",),
            "tensor": ("tp4",),
            "pipeline": ("dp1; pp=4; micro=4; schedule=1f1b", "dp1; pp=4; micro=8; schedule=1f1b"),
        },
        (
            "dp4.zero1",
            "dp4.zero2",
            "tp4.sp",
            "tp2.dp2",
            "tp2.sp.dp2.zero3",
            "all: dp4; head: tp2.dp2",
            "dp2; pp=2; micro=4; schedule=1f1b",
            "dp2.zero1; pp=2; micro=4; schedule=gpipe",
            "dp2; stages=4,3; micro=8; schedule=zero-bubble",
            "dp2.zero3; pp=2; micro=2; schedule=1f1b",
            "tp2; pp=2; micro=4; schedule=1f1b",
            "tp2.sp; stages=4,3; micro=4; schedule=1f1b",
            "all: dp2; head: tp2; pp=2; micro=4; schedule=1f1b",
            "dp1; stages=2,2,2,1; micro=8; schedule=zero-bubble",
            "dp2.recompute; pp=2; virtual=2; micro=4; schedule=interleaved",
        ),
    ),
}
