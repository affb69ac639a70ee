"""The kernels that normalise rows, for RMS norm and layer norm; row_norms.py launches them.

With ``CENTRED`` the mean of a row is taken away first (layer norm), without it is not (RMS norm)::

    total = x + residual                       (if there is a residual)
    y     = weight * (total - mean) * rstd + bias
    dx    = rstd * (wdy - mean(wdy) - hat * mean(hat * wdy)) + dtotal,   wdy = weight * dy

where ``hat = (total - mean) * rstd`` and the means are over a row. All sums are in float32.

Rows that fit in registers are read once into a tile of ``[ROWS, BLOCK]``; longer ones go in
blocks, several times, the later times from the cache. A program
of the forward owns a tile. Programs of the backward stay, each takes every ``num_programs``-th tile
and sums its part of the gradients of weight and bias; the parts are then added up in a fixed order,
so that a run repeats bit for bit.
"""

from __future__ import annotations

from galvatron_compile.kernels.base import tl, triton


@triton.jit
def _load(pointer, rows, columns, stride, inside):  # type: ignore[no-untyped-def]
    """Float32 ``[ROWS, BLOCK]`` of a matrix; 0 outside."""
    offsets = rows[:, None] * stride + columns[None, :]
    return tl.load(pointer + offsets, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _load_total(x, residual, rows, columns, x_stride, residual_stride, inside, ADDS):  # type: ignore[no-untyped-def]
    """``x + residual``, rounded as it will be stored, so that the backward sees the same rows."""
    total = _load(x, rows, columns, x_stride, inside)
    if ADDS:
        total += _load(residual, rows, columns, residual_stride, inside)
        total = total.to(x.dtype.element_ty).to(tl.float32)
    return total


@triton.jit
def _load_row(pointer, columns, n):  # type: ignore[no-untyped-def]
    """Float32 ``[1, BLOCK]`` of a vector."""
    return tl.load(pointer + columns[None, :], mask=columns[None, :] < n, other=0.0).to(tl.float32)


@triton.jit
def _store(pointer, rows, columns, n, value, inside):  # type: ignore[no-untyped-def]
    offsets = rows[:, None] * n + columns[None, :]
    tl.store(pointer + offsets, value.to(pointer.dtype.element_ty), mask=inside)


@triton.jit
def norm_forward(  # type: ignore[no-untyped-def]
    x, residual, weight, bias, y, total, mean, rstd,
    num_rows, n, x_stride, residual_stride, eps,
    CENTRED: tl.constexpr, ADDS: tl.constexpr, HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A tile of whole rows: every element is read once and written once."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK)
    inside = (rows < num_rows)[:, None] & (columns < n)[None, :]
    hat = _load_total(x, residual, rows, columns, x_stride, residual_stride, inside, ADDS)
    if ADDS:
        _store(total, rows, columns, n, hat, inside)
    if CENTRED:
        row_mean = tl.sum(hat, 1) / n
        tl.store(mean + rows, row_mean, mask=rows < num_rows)
        hat = tl.where(inside, hat - row_mean[:, None], 0.0)
    row_rstd = 1 / tl.sqrt(tl.sum(hat * hat, 1) / n + eps)
    tl.store(rstd + rows, row_rstd, mask=rows < num_rows)
    hat *= row_rstd[:, None]
    if HAS_WEIGHT:
        hat *= _load_row(weight, columns, n)
    if HAS_BIAS:
        hat += _load_row(bias, columns, n)
    _store(y, rows, columns, n, hat, inside)


@triton.jit
def norm_forward_long(  # type: ignore[no-untyped-def]
    x, residual, weight, bias, y, total, mean, rstd,
    num_rows, n, x_stride, residual_stride, eps,
    CENTRED: tl.constexpr, ADDS: tl.constexpr, HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """As ``norm_forward``, rows in blocks: one pass for each statistic, one to write."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    row_mean = tl.zeros([ROWS], tl.float32)
    sums = tl.zeros([ROWS, BLOCK], tl.float32)
    if CENTRED:
        for start in range(0, n, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            inside = (rows < num_rows)[:, None] & (columns < n)[None, :]
            sums += _load_total(x, residual, rows, columns, x_stride, residual_stride, inside, ADDS)
        row_mean = tl.sum(sums, 1) / n
        tl.store(mean + rows, row_mean, mask=rows < num_rows)
        sums = tl.zeros([ROWS, BLOCK], tl.float32)
    for start in range(0, n, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        inside = (rows < num_rows)[:, None] & (columns < n)[None, :]
        block = _load_total(x, residual, rows, columns, x_stride, residual_stride, inside, ADDS)
        block = tl.where(inside, block - row_mean[:, None], 0.0)
        sums += block * block
    row_rstd = 1 / tl.sqrt(tl.sum(sums, 1) / n + eps)
    tl.store(rstd + rows, row_rstd, mask=rows < num_rows)
    for start in range(0, n, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        inside = (rows < num_rows)[:, None] & (columns < n)[None, :]
        block = _load_total(x, residual, rows, columns, x_stride, residual_stride, inside, ADDS)
        if ADDS:
            _store(total, rows, columns, n, block, inside)
        block = (block - row_mean[:, None]) * row_rstd[:, None]
        if HAS_WEIGHT:
            block *= _load_row(weight, columns, n)
        if HAS_BIAS:
            block += _load_row(bias, columns, n)
        _store(y, rows, columns, n, block, inside)


@triton.jit
def norm_backward(  # type: ignore[no-untyped-def]
    dy, dtotal, x, weight, mean, rstd, dx, weight_sums, bias_sums,
    num_rows, n, dy_stride, dtotal_stride, x_stride,
    CENTRED: tl.constexpr, ADDS: tl.constexpr, HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Tiles of whole rows; the sums for weight and bias stay in registers to the end.

    weight_sums, bias_sums: float32 ``[programs, n]``, a row for each program.
    """
    program = tl.program_id(0)
    columns = tl.arange(0, BLOCK)
    weight_sum = tl.zeros([ROWS, BLOCK], tl.float32)
    bias_sum = tl.zeros([ROWS, BLOCK], tl.float32)
    for tile in range(program, tl.cdiv(num_rows, ROWS), tl.num_programs(0)):
        rows = tl.full([ROWS], tile, tl.int64) * ROWS + tl.arange(0, ROWS)
        inside = (rows < num_rows)[:, None] & (columns < n)[None, :]
        hat = _load(x, rows, columns, x_stride, inside)
        grad = _load(dy, rows, columns, dy_stride, inside)
        row_rstd = tl.load(rstd + rows, mask=rows < num_rows, other=0.0)[:, None]
        if CENTRED:
            hat -= tl.load(mean + rows, mask=rows < num_rows, other=0.0)[:, None]
            hat = tl.where(inside, hat, 0.0)
        hat *= row_rstd
        if HAS_BIAS:
            bias_sum += grad
        if HAS_WEIGHT:
            weight_sum += grad * hat
            grad *= _load_row(weight, columns, n)
        along = tl.sum(grad * hat, 1) / n
        if CENTRED:
            hat = hat * along[:, None] + (tl.sum(grad, 1) / n)[:, None]
        else:
            hat *= along[:, None]
        grad = row_rstd * (grad - hat)
        if ADDS:
            grad += _load(dtotal, rows, columns, dtotal_stride, inside)
        _store(dx, rows, columns, n, grad, inside)
    target = program.to(tl.int64) * n + columns
    if HAS_WEIGHT:
        tl.store(weight_sums + target, tl.sum(weight_sum, 0), mask=columns < n)
    if HAS_BIAS:
        tl.store(bias_sums + target, tl.sum(bias_sum, 0), mask=columns < n)


@triton.jit
def _add_to(sums, columns, n, value, first):  # type: ignore[no-untyped-def]
    """Add ``[ROWS, BLOCK]`` over its rows to a program's own sums, which start at nothing."""
    before = tl.load(sums + columns, mask=(columns < n) & (first == 0), other=0.0)
    tl.store(sums + columns, before + tl.sum(value, 0), mask=columns < n)


@triton.jit
def norm_backward_long(  # type: ignore[no-untyped-def]
    dy, dtotal, x, weight, mean, rstd, dx, weight_sums, bias_sums,
    num_rows, n, dy_stride, dtotal_stride, x_stride,
    CENTRED: tl.constexpr, ADDS: tl.constexpr, HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """As ``norm_backward``, rows in blocks; the sums stay in memory (the L2 cache holds them)."""
    program = tl.program_id(0)
    weight_sums += program.to(tl.int64) * n
    bias_sums += program.to(tl.int64) * n
    for tile in range(program, tl.cdiv(num_rows, ROWS), tl.num_programs(0)):
        rows = tl.full([ROWS], tile, tl.int64) * ROWS + tl.arange(0, ROWS)
        row_rstd = tl.load(rstd + rows, mask=rows < num_rows, other=0.0)[:, None]
        row_mean = tl.zeros([ROWS, 1], tl.float32)
        if CENTRED:
            row_mean += tl.load(mean + rows, mask=rows < num_rows, other=0.0)[:, None]
        products = tl.zeros([ROWS, BLOCK], tl.float32)
        grads = tl.zeros([ROWS, BLOCK], tl.float32)
        for start in range(0, n, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            inside = (rows < num_rows)[:, None] & (columns < n)[None, :]
            hat = (_load(x, rows, columns, x_stride, inside) - row_mean) * row_rstd
            grad = _load(dy, rows, columns, dy_stride, inside)  # 0 outside, whatever hat is there
            if HAS_WEIGHT:
                grad *= _load_row(weight, columns, n)
            products += grad * hat
            grads += grad
        along = (tl.sum(products, 1) / n)[:, None]
        level = (tl.sum(grads, 1) / n)[:, None]
        # Another thread may read a sum that this one wrote for the tile before.
        tl.debug_barrier()
        for start in range(0, n, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            inside = (rows < num_rows)[:, None] & (columns < n)[None, :]
            hat = (_load(x, rows, columns, x_stride, inside) - row_mean) * row_rstd
            grad = _load(dy, rows, columns, dy_stride, inside)
            if HAS_BIAS:
                _add_to(bias_sums, columns, n, grad, tile == program)
            if HAS_WEIGHT:
                _add_to(weight_sums, columns, n, grad * hat, tile == program)
                grad *= _load_row(weight, columns, n)
            hat *= along
            if CENTRED:
                hat += level
            grad = row_rstd * (grad - hat)
            if ADDS:
                grad += _load(dtotal, rows, columns, dtotal_stride, inside)
            _store(dx, rows, columns, n, grad, inside)
