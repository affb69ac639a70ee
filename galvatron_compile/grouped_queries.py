"""Attention in which neighbouring query heads share a key head (arXiv 2305.13245, section 2.2).

Everywhere: query (batch, heads, queries, width); key and value (batch, key heads, keys, width), the
heads a multiple of theirs.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def grouped_query_attention(
    query: Tensor, key: Tensor, value: Tensor, is_causal: bool, scale: float | None
) -> Tensor:
    """Softmax attention, (batch, heads, queries, width of the values). No mask, no dropout.

    Keys and values are repeated where PyTorch's kernel could not share them: on CUDA only
    FlashAttention can, and without it every score would be kept.

    scale: of the scores; None: 1 / √width.
    """
    if not shares_heads(query, key, value, is_causal):
        key, value = repeat_heads(query, key, value)
    return F.scaled_dot_product_attention(
        query, key, value, is_causal=is_causal, scale=scale,
        enable_gqa=query.shape[1] != key.shape[1],
    )  # fmt: skip


def repeat_heads(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values with as many heads as the query."""
    times = query.shape[1] // key.shape[1]
    return key.repeat_interleave(times, dim=1), value.repeat_interleave(times, dim=1)


def shares_heads(query: Tensor, key: Tensor, value: Tensor, is_causal: bool) -> bool:
    """Whether the kernel that these get on their device takes fewer key heads than query heads."""
    if query.device.type != "cuda":
        return True
    is_there = torch.cuda.get_device_capability(query.device) >= (8, 0)
    is_wanted = torch.backends.cuda.flash_sdp_enabled()
    return is_there and is_wanted and flash_takes(query, key, value, is_causal)


def flash_takes(query: Tensor, key: Tensor, value: Tensor, is_causal: bool) -> bool:
    """Whether CUDA's FlashAttention takes these dtypes and shapes (ATen's sdp_utils.cpp of torch
    2.11 to 2.13)."""
    widths = {each.shape[-1] for each in (query, key, value)}
    aligned = not is_causal or query.shape[2] == key.shape[2]
    return query.dtype.itemsize == 2 and len(widths) == 1 and max(widths) <= 256 and aligned
