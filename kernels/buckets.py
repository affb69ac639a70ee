"""Copies between tensors and the flat buckets of ZeRO, cast on the way, many tensors a launch.

A bucket is ``[parts, shard]``. Tensor k, flat, is cut into ``parts`` chunks of ``chunks[k]``
elements; chunk p lies in ``[p, offsets[k] : offsets[k] + chunks[k]]``. For N elements of e bytes
here and b in the bucket, ``pack`` and ``unpack`` move ``N (e + b)`` bytes, one multiplication each
at most; ``sum_parts`` of n parts of k elements moves ``(n e + b) k``. Memory bounds all three. How
programs share the work is told in bucket_kernels.py.

One launch serves all tensors of a dtype: a table on the device holds address, size and place of
each. It goes there from pinned memory, so the host waits for nothing, and is kept for as long as
the same tensors come again. Gradients do come again where the allocator hands out the same
addresses each step; where not, it costs one more copy of 40 bytes a tensor. (One launch a tensor
would need no table, but a launch takes about as long as to move 10 MB.)
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from galvatron_compile.kernels.base import (
    INTERPRETED,
    exact,
    next_power_of_2,
    runs_kernels,
    triton,
)
from galvatron_compile.kernels.bucket_kernels import copy_kernel, sum_kernel

BLOCK = 8192 if INTERPRETED else 4096
SUM_BLOCK = 8192 if INTERPRETED else 2048
WARPS = 8
NUM_FIELDS = 5  # of the table: first block, address, elements, offset, chunk


def pack(
    gradients: Sequence[Tensor],
    out: Tensor,
    offsets: Sequence[int],
    chunks: Sequence[int],
    scale: float = 1.0,
) -> None:
    """Write ``gradients[k] * scale`` into ``out [parts, shard]``, in the dtype of ``out``.

    What is missing of the last chunks becomes 0. What lies between the chunks stays as it is.

    Raises:
        ValueError: lists of different lengths; a gradient of more than parts * chunk elements;
            a chunk that ends behind the shard.
    """
    flat = [gradient.reshape(-1) for gradient in gradients]
    _check(flat, out, offsets, chunks)
    torch.ops.galvatron.bucket_pack_(flat, out, list(offsets), list(chunks), scale)


def unpack(
    gathered: Tensor, regions: Sequence[Tensor], offsets: Sequence[int], chunks: Sequence[int]
) -> None:
    """Write the chunks of ``gathered [parts, shard]`` one behind the other into each region.

    regions: flat and contiguous, of at most parts * chunk elements; they may be of another dtype.

    Raises:
        ValueError: as :func:`pack`, or a region is not contiguous.
    """
    if not all(region.is_contiguous() for region in regions):
        raise ValueError("regions are written in place: they must be contiguous")
    flat = [region.view(-1) for region in regions]
    _check(flat, gathered, offsets, chunks)
    torch.ops.galvatron.bucket_unpack_(gathered, flat, list(offsets), list(chunks))


def sum_parts(parts: Tensor, out: Tensor) -> None:
    """Write the sum over the first dim of ``[n, k]`` into ``out [k]``, one part after the other.

    Added up in float32 (float64 for float64), so that it repeats bit for bit.

    Raises:
        ValueError: out is not contiguous, or not ``[k]``.
    """
    if out.shape != parts.shape[1:] or not out.is_contiguous():
        raise ValueError(f"out must be {list(parts.shape[1:])} and contiguous, not {out.shape}")
    torch.ops.galvatron.sum_parts_(parts, out)


def pack_reference(
    gradients: Sequence[Tensor],
    parts: int,
    shard: int,
    offsets: Sequence[int],
    chunks: Sequence[int],
    scale: float = 1.0,
) -> Tensor:
    """``[parts, shard]`` in float64, 0 between the chunks."""
    out = torch.zeros(parts, shard, dtype=torch.float64)
    for gradient, offset, chunk in zip(gradients, offsets, chunks, strict=True):
        for part in range(parts):
            piece = gradient.flatten()[part * chunk : (part + 1) * chunk].double()
            out[part, offset : offset + piece.numel()] = piece * scale
    return out


def moved_bytes(numel: int, itemsize: int, bucket_numel: int, bucket_itemsize: int) -> int:
    """Of pack or unpack: the tensors' elements once, those of all chunks of the bucket once."""
    return numel * itemsize + bucket_numel * bucket_itemsize


def sum_moved_bytes(num_parts: int, k: int, itemsize: int, out_itemsize: int) -> int:
    return k * (num_parts * itemsize + out_itemsize)


def flops(num_parts: int, k: int) -> int:
    """Of sum_parts; pack does one multiplication an element."""
    return num_parts * k


def ahead() -> list[tuple[Any, dict[str, Any], int]]:
    """(kernel, arguments, warps): bfloat16 gradients packed in float32, weights, 8 parts."""
    table: dict[str, Any] = {"table": "*i64", "shard": "i64", "scale": "fp32", "BLOCK": 4096}
    table |= {"TENSORS": 64}
    cases: list[tuple[Any, dict[str, Any], int]] = [
        (kernel, table | {"tensor": "*bf16", "bucket": bucket, "TO_BUCKET": packs}, WARPS)
        for kernel, bucket, packs in ((copy_kernel, "*fp32", True), (copy_kernel, "*bf16", False))
    ]
    sums = {"parts": "*bf16", "out": "*fp32", "num_parts": "i32", "k": "i32:16"}
    cases.append((sum_kernel, sums | {"stride": "i32:16", "BLOCK": 2048}, WARPS))
    return cases


@torch.library.custom_op("galvatron::bucket_pack_", mutates_args=("out",))
def _pack(
    gradients: Sequence[Tensor],
    out: Tensor,
    offsets: Sequence[int],
    chunks: Sequence[int],
    scale: float,
) -> None:
    if not runs_kernels(out, *gradients) or out.stride(1) != 1:
        for gradient, offset, chunk in zip(gradients, offsets, chunks, strict=True):
            target = out[:, offset : offset + chunk]
            wanted = exact(gradient) * scale
            padded = wanted.new_zeros(out.shape[0] * chunk)
            padded[: wanted.numel()] = wanted
            target.copy_(padded.view(target.shape))
        return
    # Copies of those that are not contiguous live until after the launch.
    dense = [gradient.contiguous() for gradient in gradients]
    _launch(dense, out, offsets, chunks, scale, to_bucket=True)


@_pack.register_fake
def _(
    gradients: Sequence[Tensor],
    out: Tensor,
    offsets: Sequence[int],
    chunks: Sequence[int],
    scale: float,
) -> None:
    return None


@torch.library.custom_op("galvatron::bucket_unpack_", mutates_args=("regions",))
def _unpack(
    gathered: Tensor, regions: Sequence[Tensor], offsets: Sequence[int], chunks: Sequence[int]
) -> None:
    if gathered.stride(1) != 1:
        gathered = gathered.contiguous()
    if runs_kernels(gathered, *regions):
        _launch(regions, gathered, offsets, chunks, 1.0, to_bucket=False)
        return
    for region, offset, chunk in zip(regions, offsets, chunks, strict=True):
        region.copy_(gathered[:, offset : offset + chunk].reshape(-1)[: region.numel()])


@_unpack.register_fake
def _(
    gathered: Tensor, regions: Sequence[Tensor], offsets: Sequence[int], chunks: Sequence[int]
) -> None:
    return None


@torch.library.custom_op("galvatron::sum_parts_", mutates_args=("out",))
def _sum_parts(parts: Tensor, out: Tensor) -> None:
    if not out.numel() or not runs_kernels(parts, out):
        out.copy_(exact(parts).sum(0))
        return
    rows = parts if parts.stride(1) == 1 else parts.contiguous()
    k = out.numel()
    sum_kernel[triton.cdiv(k, SUM_BLOCK),](
        rows, out, rows.shape[0], k, rows.stride(0), BLOCK=SUM_BLOCK, num_warps=WARPS
    )


@_sum_parts.register_fake
def _(parts: Tensor, out: Tensor) -> None:
    return None


def _check(
    flat: list[Tensor], bucket: Tensor, offsets: Sequence[int], chunks: Sequence[int]
) -> None:
    if not len(flat) == len(offsets) == len(chunks):
        raise ValueError(
            f"{len(flat)} tensors, {len(offsets)} offsets and {len(chunks)} chunks: give as many"
        )
    parts, shard = bucket.shape
    for tensor, offset, chunk in zip(flat, offsets, chunks, strict=True):
        if tensor.numel() > parts * chunk:
            raise ValueError(
                f"{tensor.numel()} elements do not fit {parts} chunks of {chunk} elements"
            )
        if offset + chunk > shard:
            raise ValueError(f"offset {offset} + chunk {chunk} is behind a shard of {shard}")


def _launch(
    tensors: Sequence[Tensor],
    bucket: Tensor,
    offsets: Sequence[int],
    chunks: Sequence[int],
    scale: float,
    *,
    to_bucket: bool,
) -> None:
    """One launch for all tensors of a dtype."""
    places = list(zip(tensors, offsets, chunks, strict=True))
    stream = torch.cuda.current_stream(bucket.device).cuda_stream if bucket.is_cuda else 0
    for dtype in dict.fromkeys(tensor.dtype for tensor in tensors):
        rows, num_blocks = [], 0
        for tensor, offset, chunk in places:
            if tensor.dtype == dtype and chunk:
                rows.append((num_blocks, tensor.data_ptr(), tensor.numel(), offset, chunk))
                num_blocks += triton.cdiv(chunk, BLOCK)
        if not num_blocks or not bucket.shape[0]:
            continue
        table = _table(tuple(rows), bucket.device, stream)
        like = next(tensor for tensor in tensors if tensor.dtype == dtype)
        copy_kernel[num_blocks, bucket.shape[0]](
            like, bucket, table, bucket.stride(0), scale,
            TENSORS=table.shape[1], TO_BUCKET=to_bucket, BLOCK=BLOCK, num_warps=WARPS,
        )  # fmt: skip


@lru_cache(maxsize=256)
def _table(rows: tuple[tuple[int, ...], ...], device: torch.device, stream: int) -> Tensor:
    """``[5, tensors]`` on the device. All that is in it is in the key, so no entry can be stale.

    stream: it is filled on this one, and safe to read on this one only.
    """
    width = next_power_of_2(len(rows))
    behind = (2**62, *([0] * (NUM_FIELDS - 1)))  # begins behind every block: counts for none
    table = torch.tensor([*rows, *([behind] * (width - len(rows)))], dtype=torch.int64)
    table = table.t().contiguous()
    return table.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else table
