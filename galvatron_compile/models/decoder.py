"""A decoder-only transformer in plain PyTorch, for every :class:`DecoderShape`.

A real model: it trains on any device. Built on the meta device it is what the planner captures.
Weights that Megatron-LM (Shoeybi et al. 2019) fuses are fused here: one product makes queries,
keys and values, grouped by key head so that tensor parallelism divides the groups, and one makes
the gate and the value of a gated MLP.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from galvatron_compile.errors import ShapeError
from galvatron_compile.models.shape import DecoderShape

INIT_STD = 0.02  # GPT-2's; what ends a branch is scaled down by sqrt(2 layers), section 2.3 there
IGNORED_LABEL = -100


class Decoder(nn.Module):
    """Token ids and labels, both [batch, seq], to the mean cross-entropy of the next token.

    seq: length of the sequences, which the tables of rotary positions and the mask are made for.
    Labels are shifted inside; -100 marks tokens to ignore.
    """

    cosine: Tensor
    sine: Tensor
    mask: Tensor

    def __init__(self, shape: DecoderShape, seq: int, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        if shape.positions == "learned" and seq > shape.max_positions:
            raise ShapeError(
                f"a sequence of {seq} needs as many learned positions, the model has "
                f"{shape.max_positions}; shorten the sequence to {shape.max_positions}"
            )
        self.shape = shape
        self.tokens = nn.Embedding(shape.vocab, shape.hidden, dtype=dtype)
        if shape.positions == "learned":
            table = torch.empty(shape.max_positions, shape.hidden, dtype=dtype)
            self.positions = nn.Parameter(table)
        else:
            cosine, sine = rotary_tables(seq, shape.head_size, shape.rotary_base)
            self.register_buffer("cosine", cosine.to(dtype), persistent=False)
            self.register_buffer("sine", sine.to(dtype), persistent=False)
        if shape.attention == "eager":
            mask = torch.full((seq, seq), float("-inf"), dtype=dtype).triu(1)
            self.register_buffer("mask", mask, persistent=False)
        self.blocks = nn.ModuleList(Block(shape, seq, dtype) for _ in range(shape.layers))
        self.norm = _norm(shape, shape.hidden, dtype)
        self.head = nn.Linear(shape.hidden, shape.vocab, bias=False, dtype=dtype)
        if shape.tied:
            self.head.weight = self.tokens.weight
        self.reset_parameters()

    def reset_parameters(self) -> None:
        scaled = INIT_STD / math.sqrt(2 * self.shape.layers)
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif parameter.dim() == 1:
                nn.init.ones_(parameter)
            else:
                nn.init.normal_(parameter, std=scaled if ".down" in name else INIT_STD)

    def forward(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        hidden = self.tokens(input_ids)
        seq = input_ids.shape[1]
        if self.shape.positions == "learned":
            hidden = hidden + self.positions[:seq]
            rotary = None
        else:
            rotary = self.cosine[:seq], self.sine[:seq]
        hidden = F.dropout(hidden, self.shape.dropout, self.training)
        mask = self.mask[:seq, :seq] if self.shape.attention == "eager" else None
        for block in self.blocks:
            hidden = block(hidden, rotary, mask)
        logits = self.head(self.norm(hidden))
        # Every position predicts the next token, and the last one nothing.
        following = F.pad(labels[:, 1:], (0, 1), value=IGNORED_LABEL)
        return F.cross_entropy(
            _wide(logits.flatten(0, 1)), following.flatten(), ignore_index=IGNORED_LABEL
        )


Rotary = tuple[Tensor, Tensor] | None


class Block(nn.Module):
    """Attention, then the MLP, each on normalised values and added to the stream."""

    def __init__(self, shape: DecoderShape, seq: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.dropout = shape.dropout
        self.attention_norm = _norm(shape, shape.hidden, dtype)
        self.attention = Attention(shape, dtype)
        self.mlp_norm = _norm(shape, shape.hidden, dtype)
        self.mlp = Mixture(shape, seq, dtype) if shape.experts else Mlp(shape, dtype)

    def forward(self, x: Tensor, rotary: Rotary, mask: Tensor | None) -> Tensor:
        mixed = self.attention(self.attention_norm(x), rotary, mask)
        x = x + F.dropout(mixed, self.dropout, self.training)
        return x + F.dropout(self.mlp(self.mlp_norm(x)), self.dropout, self.training)


class Attention(nn.Module):
    """Causal self-attention; query heads in groups that share a key head (Ainslie et al. 2023)."""

    def __init__(self, shape: DecoderShape, dtype: torch.dtype) -> None:
        super().__init__()
        self.shape, width = shape, shape.heads * shape.head_size
        every = shape.biases == "all"
        qkv_bias = shape.biases != "none"
        self.qkv = nn.Linear(shape.hidden, shape.qkv_width, bias=qkv_bias, dtype=dtype)
        self.down = nn.Linear(width, shape.hidden, bias=every, dtype=dtype)
        if shape.qk_norm:
            self.query_norm = _norm(shape, shape.head_size, dtype)
            self.key_norm = _norm(shape, shape.head_size, dtype)

    def forward(self, x: Tensor, rotary: Rotary, mask: Tensor | None) -> Tensor:
        shape, (batch, seq, _) = self.shape, x.shape
        queries = shape.heads // shape.kv_heads  # of one group, followed by its key and value
        grouped = self.qkv(x).view(batch, seq, shape.kv_heads, queries + 2, shape.head_size)
        q, k, v = grouped.split([queries, 1, 1], dim=3)
        q = q.reshape(batch, seq, shape.heads, shape.head_size)
        k, v = k.squeeze(3), v.squeeze(3)
        if shape.qk_norm:
            q, k = self.query_norm(q), self.key_norm(k)
        q, k, v = (each.transpose(1, 2) for each in (q, k, v))  # [batch, heads, seq, width]
        if rotary is not None:
            q, k = rotate(q, *rotary), rotate(k, *rotary)
        mixed = self._fused(q, k, v) if mask is None else self._eager(q, k, v, mask)
        return self.down(mixed.transpose(1, 2).reshape(batch, seq, -1))

    def _fused(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        dropout = self.shape.dropout if self.training else 0.0
        return F.scaled_dot_product_attention(
            q, k, v, dropout_p=dropout, is_causal=True,
            enable_gqa=self.shape.kv_heads != self.shape.heads,
        )  # fmt: skip

    def _eager(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        queries = self.shape.heads // self.shape.kv_heads
        if queries > 1:
            k, v = (each.repeat_interleave(queries, dim=1) for each in (k, v))
        scores = torch.matmul(q / math.sqrt(self.shape.head_size), k.transpose(2, 3))
        shares = F.dropout(F.softmax(scores + mask, dim=-1), self.shape.dropout, self.training)
        return torch.matmul(shares, v)


class Mlp(nn.Module):
    def __init__(self, shape: DecoderShape, dtype: torch.dtype) -> None:
        super().__init__()
        self.gated, bias = shape.mlp == "swiglu", shape.biases == "all"
        width = 2 * shape.ffn if self.gated else shape.ffn
        self.up = nn.Linear(shape.hidden, width, bias=bias, dtype=dtype)
        self.down = nn.Linear(shape.ffn, shape.hidden, bias=bias, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        wide = self.up(x)
        return self.down(_swiglu(wide) if self.gated else F.gelu(wide, approximate="tanh"))


class Mixture(nn.Module):
    """Experts, of which every token takes its best few, weighed by a softmax over those few.

    An expert takes at most ``capacity`` tokens of each sequence, in the order in which they come
    (Lepikhin et al. 2020), so that shapes are static, sequences independent and the products as
    many as the routed ones; a token that finds no room goes without that expert.
    """

    def __init__(self, shape: DecoderShape, seq: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.experts, self.chosen = shape.experts, shape.experts_per_token
        self.capacity = shape.expert_capacity(seq)
        self.router = nn.Linear(shape.hidden, shape.experts, bias=False, dtype=dtype)
        self.up = nn.Parameter(
            torch.empty(shape.experts, shape.hidden, 2 * shape.ffn, dtype=dtype)
        )
        self.down = nn.Parameter(torch.empty(shape.experts, shape.ffn, shape.hidden, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        batch, seq, hidden = x.shape
        scores, experts = self.router(x).topk(self.chosen, dim=-1)  # [batch, seq, chosen]
        shares = F.softmax(_wide(scores), dim=-1).to(x.dtype)
        choices = experts.reshape(batch, seq * self.chosen)
        order = choices.argsort(dim=1, stable=True)  # choices, those of expert 0 first
        counts = F.one_hot(choices, self.experts).sum(1)  # [batch, experts]
        starts = counts.cumsum(1) - counts

        slots = starts.unsqueeze(2) + torch.arange(self.capacity, device=x.device)
        slots = slots.clamp(max=seq * self.chosen - 1).flatten(1)  # what is past the end is unused
        taken = order.gather(1, slots) // self.chosen  # the token in every slot of every expert
        rows = x.gather(1, taken.unsqueeze(2).expand(-1, -1, hidden))
        rows = rows.view(batch, self.experts, self.capacity, hidden)
        inner = _swiglu(torch.einsum("besh,ehf->besf", rows, self.up))
        made = torch.einsum("besf,efh->besh", inner, self.down)
        made = made.reshape(batch, self.experts * self.capacity, hidden)

        place = order.argsort(dim=1) - starts.gather(1, choices)  # in its expert's queue
        kept = (place < self.capacity).view(batch, seq, self.chosen)
        slot = choices * self.capacity + place.clamp(max=self.capacity - 1)
        back = made.gather(1, slot.unsqueeze(2).expand(-1, -1, hidden))
        back = back.view(batch, seq, self.chosen, hidden)
        return (back * (shares * kept).unsqueeze(3)).sum(2)


def _wide(x: Tensor) -> Tensor:
    """At least float32, as softmax over many entries needs."""
    return x if x.dtype == torch.float64 else x.float()


def _swiglu(wide: Tensor) -> Tensor:
    gate, value = wide.chunk(2, dim=-1)
    return F.silu(gate) * value


def _norm(shape: DecoderShape, width: int, dtype: torch.dtype) -> nn.Module:
    if shape.norm == "rms":
        return nn.RMSNorm(width, eps=1e-5, dtype=dtype)
    return nn.LayerNorm(width, eps=1e-5, dtype=dtype)


def rotary_tables(seq: int, width: int, base: float) -> tuple[Tensor, Tensor]:
    """Cosine and sine [seq, width] of every position's angles (Su et al. 2021, section 3.2.2)."""
    steps = torch.arange(0, width, 2, dtype=torch.float32) / width
    angles = torch.outer(torch.arange(seq, dtype=torch.float32), base**-steps)
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Rotate the pairs (i, i + width / 2) of every head by its position's angles."""
    low, high = x.chunk(2, dim=-1)
    return x * cosine + torch.cat((-high, low), dim=-1) * sine
