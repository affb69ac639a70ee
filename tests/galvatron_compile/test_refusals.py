"""What cannot be done is refused on every rank at once, with a message that says what to do."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F  # noqa: N812

import galvatron_compile as gc
from galvatron_compile.errors import (
    CaptureError,
    GalvatronError,
    InfeasibleError,
    NonFiniteLossError,
    NotationError,
    PeerError,
    PlanError,
    ProfileError,
    ShapeError,
    UnsupportedError,
)

SEQ, VOCAB, BATCH = 6, 20, 8


class Block(nn.Module):
    def __init__(self, hidden: int, heads: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(hidden)
        self.qkv = nn.Linear(hidden, 3 * hidden)
        self.out = nn.Linear(hidden, hidden)
        self.heads = heads

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, s, hidden = x.shape
        heads = self.qkv(self.norm(x)).view(b, s, 3, self.heads, hidden // self.heads)
        q, k, v = (part.transpose(1, 2) for part in heads.unbind(2))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return x + self.out(mixed.transpose(1, 2).reshape(b, s, hidden))


class Tiny(nn.Module):
    """Two blocks; returns its loss."""

    def __init__(
        self, hidden: int = 16, heads: int = 2, vocab: int = VOCAB, depth: int = 2, tied: bool = False
    ) -> None:
        super().__init__()
        self.table = nn.Embedding(vocab, hidden)
        self.blocks = nn.ModuleList(Block(hidden, heads) for _ in range(depth))
        self.head = nn.Linear(hidden, vocab, bias=False)
        if tied:
            self.head.weight = self.table.weight

    def forward(self, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        x = self.table(ids)
        for block in self.blocks:
            x = block(x)
        return F.cross_entropy(self.head(x).flatten(0, 1), labels.flatten())


def tokens(batch: int = BATCH, seq: int = SEQ) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, VOCAB, (batch, seq), generator=generator)
    return {"ids": ids, "labels": ids.roll(1, 1)}


def compiled(model: nn.Module | None = None, **changes: Any) -> Any:
    """``gc.compile`` of the tiny model on the ranks of the case, with what a test changes."""
    dist.barrier()  # so that a peer's failure can only come from the call under test
    arguments = {"example_inputs": tokens(), "measure": False} | changes
    profile = arguments.pop("profile", None) or gc.ClusterProfile.preset("2xH100")
    return gc.compile(model or Tiny(), profile, **arguments)


def refused(ranks: Any, case: Callable[..., Any], *args: Any) -> list[Exception]:
    """What each of two ranks raised; all must have, in seconds."""
    errors = ranks(2).errors(case, *args, timeout_s=60.0)
    assert all(isinstance(error, Exception) for error in errors), errors
    return errors


def alike(errors: list[Exception], kind: type[Exception], *patterns: str) -> None:
    """Every rank raised the same error by itself."""
    for error in errors:
        assert type(error) is kind, errors
        for pattern in patterns:
            assert re.search(pattern, str(error)), str(error)


# --- sizes --------------------------------------------------------------------------------------


def odd_sizes() -> None:
    # Three samples do not halve, nor do 3 heads, 15 features, 5 tokens or 21 words.
    compiled(Tiny(15, 3, 21), example_inputs=tokens(3, 5))


def test_a_world_size_that_nothing_divides_is_refused(ranks: Any) -> None:
    print(refused(ranks, odd_sizes))
    raise SystemExit


def odd_batch_for_dp() -> None:
    compiled(plan="dp2", global_batch_size=7)


def test_a_batch_that_a_plan_does_not_split_is_refused(ranks: Any) -> None:
    alike(
        refused(ranks, odd_batch_for_dp),
        PlanError,
        "global batch of 7 does not split into 1 micro-batches over dp 2",
        "use a multiple of 2, for example 8, or change dp",
    )
