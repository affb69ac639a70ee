"""Operators that are one kernel on CUDA but several on the CPU, where layers are counted.

Each is run on fake tensors as an autograd function that makes what the CUDA kernel makes (results,
and what it keeps for backward) and records one operator forward and one backward.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch

from galvatron_compile.grouped_queries import (
    flash_takes,
    grouped_query_attention,
    repeat_heads,
)
from galvatron_compile.random_operators import seeded

aten = torch.ops.aten


class Recorder(Protocol):
    """Counts operators; what runs inside ``quiet`` makes tensors but is not counted."""

    def quiet(self) -> AbstractContextManager[None]: ...

    def record(
        self, name: str, reads: Sequence[torch.Tensor], writes: Sequence[torch.Tensor]
    ) -> None: ...


class _RmsNorm(torch.autograd.Function):
    """As ``aten._fused_rms_norm``: keeps its input and 1 / rms of every row in float32."""

    @staticmethod
    def forward(
        ctx: Any, recorder: Recorder, x: torch.Tensor, weight: torch.Tensor | None, width: int
    ) -> torch.Tensor:
        with recorder.quiet():
            out = torch.empty_like(x)
            rows = x.new_empty(x.numel() // width, dtype=torch.float32)
        weights = [] if weight is None else [weight]
        recorder.record("_fused_rms_norm", [x, *weights], [out, rows])
        ctx.save_for_backward(x, rows, *weights)
        ctx.recorder = recorder
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        (gradient,) = gradients
        x, rows, *weights = ctx.saved_tensors
        with ctx.recorder.quiet():
            made = [torch.empty_like(tensor) for tensor in (x, *weights)]
        reads = [gradient, x, rows, *weights]
        ctx.recorder.record("_fused_rms_norm_backward", reads, made)
        return None, made[0], made[1] if weights else None, None


class _Dropout(torch.autograd.Function):
    """As ``aten.native_dropout``: keeps a mask of one byte an element."""

    @staticmethod
    def forward(ctx: Any, recorder: Recorder, x: torch.Tensor) -> torch.Tensor:
        with recorder.quiet():
            out, mask = torch.empty_like(x), torch.empty_like(x, dtype=torch.bool)
        recorder.record("native_dropout", [x], [out, mask])
        ctx.save_for_backward(mask)
        ctx.recorder = recorder
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        (gradient,) = gradients
        (mask,) = ctx.saved_tensors
        with ctx.recorder.quiet():
            made = torch.empty_like(gradient)
        ctx.recorder.record("native_dropout_backward", [gradient, mask], [made])
        return None, made


Call = Callable[..., Any]


def _rms_norm(
    recorder: Recorder,
    x: torch.Tensor,
    normalized_shape: Sequence[int],
    weight: torch.Tensor | None = None,
    eps: float | None = None,
) -> Any:
    width = torch.Size(normalized_shape).numel()
    return _RmsNorm.apply(recorder, x, weight, width)  # type: ignore[no-untyped-call]


def _dropout(recorder: Recorder, x: torch.Tensor, p: float, train: bool) -> Any:
    if not train or p == 0.0:
        return x
    return _Dropout.apply(recorder, x)  # type: ignore[no-untyped-call]


def _attention(
    recorder: Recorder,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    **options: Any,
) -> Any:
    """CUDA's fused kernels drop shares on the way; the CPU's would write all scores for it."""
    return aten.scaled_dot_product_attention.default(
        query, key, value, attn_mask, 0.0, is_causal, **options
    )


def _grouped(
    recorder: Recorder,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    is_causal: bool,
    scale: float | None,
) -> Any:
    """As on CUDA, though it is the CPU where layers are counted."""
    if not flash_takes(query, key, value, is_causal):
        key, value = repeat_heads(query, key, value)
    return grouped_query_attention(query, key, value, is_causal, scale)


def _seeded(
    recorder: Recorder, op: Any, seed: Any, offset: int, coordinate: Any, *args: Any, **kwargs: Any
) -> Any:
    kernel = KERNELS.get(op)
    if kernel is None:
        return seeded(op, seed, offset, coordinate, *args, **kwargs)
    return kernel(recorder, *args, **kwargs)


KERNELS: Mapping[Any, Call] = {
    aten.rms_norm.default: _rms_norm,
    aten.dropout.default: _dropout,
    aten.scaled_dot_product_attention.default: _attention,
    grouped_query_attention: _grouped,
    seeded: _seeded,
}
"""What stands for an operator; called with the recorder and the operator's arguments."""

PICKING = frozenset({"embedding", "gather", "index", "index_select", "nll_loss_forward"})
"""Operators that read of their first tensor only as much as they write."""
UNREAD = {"nll_loss_backward": 1}
"""Operators that want one of their tensors for its shape only, and which."""


def bytes_read(name: str, inputs: Sequence[torch.Tensor], written_bytes: int) -> list[int]:
    """What of each input a CUDA kernel reads."""
    sizes = [tensor.numel() * tensor.element_size() for tensor in inputs]
    if name in PICKING:
        sizes[0] = min(sizes[0], written_bytes)
    if name in UNREAD:
        sizes[UNREAD[name]] = 0
    return sizes
