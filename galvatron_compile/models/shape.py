"""The shape of a decoder-only language model: data, without torch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

from galvatron_compile.errors import ShapeError

Norm = Literal["rms", "layer"]
Mlp = Literal["swiglu", "gelu"]
Positions = Literal["rotary", "learned"]
Biases = Literal["none", "qkv", "all"]
Attention = Literal["sdpa", "eager"]


@dataclass(frozen=True)
class DecoderShape:
    """What a decoder-only transformer consists of; :class:`~.decoder.Decoder` builds it.

    ffn: inner width of the MLP, of one expert where there are experts.
    max_positions: rows of the table of learned positions; with rotary positions the usual length
        of a sequence, which is no limit.
    head_width: 0 for hidden / heads.
    biases: "qkv" is Qwen 2's; "all" gives one to every projection but the head's.
    attention: "sdpa" is the fused kernel; "eager" writes the scores to memory, as training did
        before FlashAttention (Dao et al. 2022).
    dropout: share of the values dropped: of the embedding, of the attention's probabilities and
        of both branches of a block, as in GPT-2.
    qk_norm: RMS norm of every query and key head (Qwen 3).
    experts, experts_per_token: 0 and 0 for a dense model; else every block's MLP is a mixture.
    capacity: room of an expert as a multiple of an even share of a sequence's tokens. With 1 the
        mixture computes exactly as many products as it routes and drops what overflows; with
        experts / experts_per_token nothing can overflow.

    Raises ShapeError, which says what to change, if the numbers do not fit together.
    """

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    ffn: int
    vocab: int
    max_positions: int
    head_width: int = 0
    norm: Norm = "rms"
    mlp: Mlp = "swiglu"
    positions: Positions = "rotary"
    rotary_base: float = 10_000.0
    tied: bool = False
    biases: Biases = "none"
    attention: Attention = "sdpa"
    dropout: float = 0.0
    qk_norm: bool = False
    experts: int = 0
    experts_per_token: int = 0
    capacity: float = 1.0

    def __post_init__(self) -> None:
        for name in ("hidden", "layers", "heads", "kv_heads", "ffn", "vocab", "max_positions"):
            if getattr(self, name) < 1:
                raise ShapeError(f"{name} must be at least 1, got {getattr(self, name)}")
        choices = {"norm": Norm, "mlp": Mlp, "positions": Positions, "biases": Biases,
                   "attention": Attention}  # fmt: skip
        for name, kind in choices.items():
            if getattr(self, name) not in get_args(kind):
                known = ", ".join(get_args(kind))
                raise ShapeError(f"{name} must be one of {known}, got {getattr(self, name)!r}")
        if not self.head_width and self.hidden % self.heads:
            raise ShapeError(
                f"{self.heads} heads do not divide a hidden size of {self.hidden}; change one or "
                "give head_width"
            )
        if self.heads % self.kv_heads:
            raise ShapeError(
                f"{self.kv_heads} key heads do not divide {self.heads} heads; use a divisor"
            )
        if self.positions == "rotary" and self.head_size % 2:
            raise ShapeError(f"rotary positions need an even head width, got {self.head_size}")
        if not 0.0 <= self.dropout < 1.0:
            raise ShapeError(f"dropout must be at least 0 and below 1, got {self.dropout}")
        self._check_experts()

    def _check_experts(self) -> None:
        if not 0 <= self.experts_per_token <= self.experts or (
            self.experts > 0 and self.experts_per_token == 0
        ):
            raise ShapeError(
                f"a token cannot go to {self.experts_per_token} of {self.experts} experts; use 1 "
                "to all of them (0 of 0 for a dense model)"
            )
        if self.capacity <= 0:
            raise ShapeError(f"capacity must be above 0, got {self.capacity}")
        if self.experts and (self.mlp != "swiglu" or self.biases == "all"):
            raise ShapeError("experts are built as swiglu without biases; choose these")

    @property
    def head_size(self) -> int:
        """Width of one head."""
        return self.head_width or self.hidden // self.heads

    @property
    def qkv_width(self) -> int:
        """Width of queries, keys and values together."""
        return (self.heads + 2 * self.kv_heads) * self.head_size

    def expert_capacity(self, seq: int) -> int:
        """Tokens of one sequence that one expert takes."""
        even = seq * self.experts_per_token / self.experts
        return min(seq, math.ceil(even * self.capacity))

    @property
    def block_parameters(self) -> int:
        """Parameters of one block."""
        attention = self.hidden * (self.qkv_width + self.heads * self.head_size)
        if self.biases != "none":
            attention += self.qkv_width + (self.hidden if self.biases == "all" else 0)
        if self.qk_norm:
            attention += 2 * self.head_size
        matrices = 3 if self.mlp == "swiglu" else 2
        mlp = matrices * self.hidden * self.ffn
        if self.biases == "all":
            mlp += (matrices - 1) * self.ffn + self.hidden
        if self.experts:
            mlp = self.experts * (mlp + self.hidden)  # and a row of the router for each
        return attention + mlp + 2 * self._norm_parameters

    @property
    def num_parameters(self) -> int:
        """Parameters of the whole model, those that are tied counted once."""
        tables = self.vocab * self.hidden * (1 if self.tied else 2)
        if self.positions == "learned":
            tables += self.max_positions * self.hidden
        return self.layers * self.block_parameters + tables + self._norm_parameters

    @property
    def _norm_parameters(self) -> int:
        return self.hidden * (2 if self.norm == "layer" else 1)

    def __str__(self) -> str:
        """For example ``32 blocks, hidden 4096, 32 heads (8 for keys), ffn 14336, vocab 32000``."""
        keys = f" ({self.kv_heads} for keys)" if self.kv_heads != self.heads else ""
        mixture = f", {self.experts_per_token} of {self.experts} experts" if self.experts else ""
        return (
            f"{self.layers} blocks, hidden {self.hidden}, {self.heads} heads{keys}, "
            f"ffn {self.ffn}{mixture}, vocab {self.vocab}"
        )
