"""The kernels of the vocabulary-parallel cross-entropy; cross_entropy.py launches them.

A program of the statistics owns a row and walks along it. Each lane keeps a maximum and a sum of
its own, which are put together at the end of the row: nothing crosses lanes in the loop, and a lane
rescales its sum once for 16 bytes. Programs of the gradient own one block of one row. Rows of an
odd stride begin anywhere, so blocks are counted from the 16-byte boundary before a row: all but the
first and the last block of a row move 16 bytes a lane at any width.

Offsets of rows are of 64 bits: a matrix may have more than 2^31 elements, a row may not.
"""

from __future__ import annotations

from galvatron_compile.kernels.base import tl, triton


@triton.jit
def _accumulate(row, place, begin, end, largest, total, MASKED: tl.constexpr):  # type: ignore[no-untyped-def]
    """Each lane's maximum and sum with one block more; ``row + place`` are the elements."""
    if MASKED:
        inside = (place >= begin) & (place < end)
        values = tl.where(inside, tl.load(row + place, mask=inside).to(tl.float32), float("-inf"))
    else:
        values = tl.load(row + place).to(tl.float32)
    larger = tl.maximum(largest, tl.max(values, 1))
    total = total * tl.exp(largest - larger) + tl.sum(tl.exp(values - larger[:, None]), 1)
    return larger, total


@triton.jit
def statistics_kernel(  # type: ignore[no-untyped-def]
    logits, target, stats, v, stride, first, num_classes, ignore_index,
    LANES: tl.constexpr, GROUP: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    base = row * stride
    begin = 0  # of the row's elements, counted from the boundary before it; they end at ``end``
    if not ALIGNED:
        begin = (base % GROUP).to(tl.int32)
        base = base // GROUP * GROUP
    end = begin + v
    size: tl.constexpr = LANES * GROUP
    place = tl.arange(0, LANES)[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    # A finite floor, so that no difference is infinity minus infinity.
    largest = tl.full([LANES], -3.4028234663852886e38, tl.float32)
    total = tl.zeros([LANES], tl.float32)
    start = 0
    if not ALIGNED:
        largest, total = _accumulate(logits + base, place, begin, end, largest, total, True)
        start = size
    full = end // size * size
    for block in range(start, full, size):
        largest, total = _accumulate(logits + base, block + place, 0, 0, largest, total, False)
    tail = tl.maximum(full, start)
    if tail < end:
        largest, total = _accumulate(logits + base, tail + place, 0, end, largest, total, True)
    row_max = tl.max(largest, 0)
    row_sum = tl.sum(total * tl.exp(largest - row_max), 0)
    label = tl.load(target + row)
    counts = label != ignore_index
    unknown = counts & ((label < 0) | (label >= num_classes))
    column = label - first
    here = (column >= 0) & (column < v) & counts
    picked = tl.load(logits + row * stride + column, mask=here, other=0.0).to(tl.float32)
    tl.store(stats + row * 3, row_max)
    tl.store(stats + row * 3 + 1, tl.where(unknown, float("nan"), row_sum))
    tl.store(stats + row * 3 + 2, picked)


@triton.jit
def _write(  # type: ignore[no-untyped-def]
    source, result, place, begin, end, out_begin, column, log_sum, scale, kept,
    MASKED: tl.constexpr,
):  # fmt: skip
    """``place`` counts from the boundary before the row, ``place - out_begin`` in the result."""
    inside = (place >= begin) & (place < end)
    if MASKED:
        values = tl.load(source + place, mask=inside).to(tl.float32)
    else:
        values = tl.load(source + place).to(tl.float32)
    values = tl.exp(values - log_sum) - tl.where(place - begin == column, 1.0, 0.0)
    values = tl.where(kept, values * scale, 0.0).to(result.dtype.element_ty)
    if MASKED:
        tl.store(result + (place - out_begin), values, mask=inside)
    else:
        tl.store(result + (place - out_begin), values)


@triton.jit
def gradient_kernel(  # type: ignore[no-untyped-def]
    logits, target, log_sum, scale, out,
    v, stride, out_stride, log_stride, scale_stride, first, ignore_index, num_blocks,
    GROUP: tl.constexpr, ALIGNED: tl.constexpr, SAME: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """SAME: rows of ``out`` lie as those of ``logits`` do, with the same boundaries."""
    program = tl.program_id(0)
    row = (program // num_blocks).to(tl.int64)
    block = program % num_blocks
    base, begin = row * stride, 0
    if not ALIGNED:
        begin = (base % GROUP).to(tl.int32)
        base = base // GROUP * GROUP
    end = begin + v
    result, out_begin = out + base, 0
    if not SAME:
        result, out_begin = out + row * out_stride, begin
    label = tl.load(target + row)
    column, kept = label - first, label != ignore_index
    row_log_sum = tl.load(log_sum + row * log_stride).to(tl.float32)
    row_scale = tl.load(scale + row * scale_stride).to(tl.float32)
    start = block * BLOCK
    place = start + tl.arange(0, BLOCK)
    source = logits + base
    if (start >= begin) & (start + BLOCK <= end):
        _write(source, result, place, begin, end, out_begin, column, row_log_sum, row_scale, kept,
               False)  # fmt: skip
    else:
        _write(source, result, place, begin, end, out_begin, column, row_log_sum, row_scale, kept,
               True)  # fmt: skip
