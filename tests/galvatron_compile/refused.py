"""A tiny model, and what every rank raised where it or its plan cannot be run."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F

import galvatron_compile as gc

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
        self,
        hidden: int = 16,
        heads: int = 2,
        vocab: int = VOCAB,
        depth: int = 2,
        tied: bool = False,
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


def compiled(model: Any = None, **changes: Any) -> Any:
    """``gc.compile`` of the tiny model on the ranks of the case, with what a test changes."""
    dist.barrier()  # so that a peer's failure can only come from the call under test
    arguments = {"example_inputs": tokens(), "measure": False} | changes
    profile = arguments.pop("profile", gc.ClusterProfile.preset("2xH100"))
    return gc.compile(model or Tiny(), profile, **arguments)


def refused(ranks: Any, case: Callable[..., Any], *args: Any, **changes: Any) -> list[Exception]:
    """What each of two ranks raised; all must have, without waiting for a timeout."""
    errors = ranks(2).errors(partial(case, *args, **changes), timeout_s=60.0)
    assert [type(error).__name__ for error in errors if error is None] == []
    assert not any("gave no answer" in str(e) or "was ended" in str(e) for e in errors), errors
    return errors


def alike(errors: list[Exception], kind: type[Exception], *patterns: str) -> None:
    """Every rank raised the same kind of error by itself, saying all of this."""
    for error in errors:
        assert type(error) is kind, errors
        for pattern in patterns:
            assert re.search(pattern, str(error)), str(error)
