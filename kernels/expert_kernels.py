"""The kernels that bring rows in the order of experts and sum them back; experts.py launches them.

Kernels go by token: each knows where its k rows lie, so a token is read (or written) once, sums
are in float32 in the order of the slots, and nothing needs atomics: a run repeats bit for bit. A
program owns a block of one token; with gradients of gates, a whole token, in blocks.
"""

from __future__ import annotations

from galvatron_compile.kernels.base import tl, triton


@triton.jit
def _block(h, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """(token, columns) of this program."""
    num_blocks = tl.cdiv(h, BLOCK)
    program = tl.program_id(0)
    return (program // num_blocks).to(tl.int64), program % num_blocks * BLOCK + tl.arange(0, BLOCK)


@triton.jit
def spread_kernel(  # type: ignore[no-untyped-def]
    x, places, rows, h, x_stride, K: tl.constexpr, BLOCK: tl.constexpr
):
    """Copy a token to the places of its rows."""
    token, columns = _block(h, BLOCK)
    values = tl.load(x + token * x_stride + columns, mask=columns < h)
    for slot in tl.static_range(K):
        place = tl.load(places + token * K + slot)
        tl.store(rows + place * h + columns, values, mask=columns < h)


@triton.jit
def collect_kernel(  # type: ignore[no-untyped-def]
    rows, places, gates, out, h, rows_stride,
    K: tl.constexpr, GATED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Sum the rows of a token, times their gates if there are some."""
    token, columns = _block(h, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for slot in tl.static_range(K):
        place = tl.load(places + token * K + slot)
        values = tl.load(rows + place * rows_stride + columns, mask=columns < h, other=0.0)
        values = values.to(tl.float32)
        if GATED:
            values *= tl.load(gates + token * K + slot).to(tl.float32)
        total += values
    tl.store(out + token * h + columns, total.to(out.dtype.element_ty), mask=columns < h)


@triton.jit
def spread_weighted_kernel(  # type: ignore[no-untyped-def]
    dout, rows, places, gates, drows, dgates, h, dout_stride, rows_stride,
    K: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """``drow = gate * dout`` and ``dgate = dout . row`` for each row of a token.

    The token is read for each slot, from the cache all times but the first.
    """
    token = tl.program_id(0).to(tl.int64)
    for slot in tl.static_range(K):
        place = tl.load(places + token * K + slot)
        gate = tl.load(gates + token * K + slot).to(tl.float32)
        products = tl.zeros([BLOCK], tl.float32)
        for start in range(0, h, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            inside = columns < h
            d = tl.load(dout + token * dout_stride + columns, mask=inside, other=0.0)
            d = d.to(tl.float32)
            row = tl.load(rows + place * rows_stride + columns, mask=inside, other=0.0)
            products += d * row.to(tl.float32)
            to_row = (d * gate).to(drows.dtype.element_ty)
            tl.store(drows + place * h + columns, to_row, mask=inside)
        dgate = tl.sum(products, 0).to(dgates.dtype.element_ty)
        tl.store(dgates + token * K + slot, dgate)
