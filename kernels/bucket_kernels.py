"""The kernels that copy between tensors and buckets, and sum parts; buckets.py launches them.

Grid of the copies: (blocks of all chunks, parts). A program finds its tensor by counting the
tensors that begin at or before its block. Blocks inside a chunk move 16 bytes a lane where both
sides begin at a multiple of 16 bytes; the others are masked.
"""

from __future__ import annotations

from galvatron_compile.kernels.base import tl, triton


@triton.jit
def copy_kernel(  # type: ignore[no-untyped-def]
    tensor, bucket, table, shard, scale,
    TENSORS: tl.constexpr, TO_BUCKET: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One block of one chunk. ``tensor`` only tells the dtype; table: ``[5, TENSORS]``."""
    program = tl.program_id(0)
    part = tl.program_id(1).to(tl.int64)
    firsts = tl.load(table + tl.arange(0, TENSORS))
    k = tl.sum((firsts <= program).to(tl.int32), 0) - 1
    start = (program - tl.load(table + k)) * BLOCK
    address = tl.load(table + TENSORS + k)
    numel = tl.load(table + 2 * TENSORS + k)
    offset = tl.load(table + 3 * TENSORS + k)
    chunk = tl.load(table + 4 * TENSORS + k)
    element = part * chunk + start  # of the tensor
    place = part * shard + offset + start  # in the bucket
    size: tl.constexpr = tensor.dtype.element_ty.primitive_bitwidth // 8
    bucket_size: tl.constexpr = bucket.dtype.element_ty.primitive_bitwidth // 8
    address += element * size
    lanes = tl.arange(0, BLOCK)
    whole = (start + BLOCK <= chunk) & (element + BLOCK <= numel)
    if whole & (address % 16 == 0) & (place * bucket_size % 16 == 0):
        # The hint on the pointer too, or it is lost where an integer becomes one.
        here = tl.multiple_of(tl.multiple_of(address, 16).to(tensor.dtype), 16) + lanes
        there = bucket + tl.multiple_of(place, 16 // bucket_size) + lanes
        if TO_BUCKET:
            values = tl.load(here).to(tl.float32) * scale
            tl.store(there, values.to(bucket.dtype.element_ty))
        else:
            values = tl.load(there).to(tl.float32)
            tl.store(here, values.to(tensor.dtype.element_ty))
    else:
        here, there = address.to(tensor.dtype) + lanes, bucket + place + lanes
        in_chunk = start + lanes < chunk
        in_both = in_chunk & (element + lanes < numel)
        if TO_BUCKET:
            values = tl.load(here, mask=in_both, other=0.0).to(tl.float32) * scale
            tl.store(there, values.to(bucket.dtype.element_ty), mask=in_chunk)
        else:
            values = tl.load(there, mask=in_both).to(tl.float32)
            tl.store(here, values.to(tensor.dtype.element_ty), mask=in_both)


@triton.jit
def sum_kernel(parts, out, num_parts, k, stride, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < k
    total = tl.zeros([BLOCK], tl.float32)
    for _ in range(0, num_parts):
        total += tl.load(parts + place, mask=inside, other=0.0).to(tl.float32)
        parts += stride
    tl.store(out + place, total.to(out.dtype.element_ty), mask=inside)
