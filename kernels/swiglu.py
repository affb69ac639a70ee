"""SwiGLU: ``silu(gate) * up``, element by element, and its gradients.

For N elements of e bytes the forward moves ``3Ne`` bytes and does about 5 flops an element; the
backward moves ``5Ne`` and does about 11. Memory bounds both. A program owns one block of one row;
dense tensors count as one long row, and halves of a wider matrix are read where they are.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from galvatron_compile.kernels.base import INTERPRETED, as_rows, exact, runs_kernels, tl, triton

BLOCK = 32768 if INTERPRETED else 2048
WARPS = 4


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """``silu(gate) * up``, computed in float32. gate, up: ``[..., n]``; of their promoted dtype.

    Raises:
        ValueError: gate and up differ in shape.
    """
    if gate.shape != up.shape:
        raise ValueError(f"gate is {list(gate.shape)}, up is {list(up.shape)}: they must agree")
    return torch.ops.galvatron.swiglu(gate, up)


def swiglu_reference(gate: Tensor, up: Tensor) -> Tensor:
    """In plain float64."""
    gate, up = gate.double(), up.double()
    return gate / (1 + torch.exp(-gate)) * up


def moved_bytes(numel: int, itemsize: int, *, backward: bool = False) -> int:
    """Forward: gate and up in, product out. Backward: the three in, two gradients out."""
    return (5 if backward else 3) * numel * itemsize


def flops(numel: int, *, backward: bool = False) -> int:
    """Exponential, sum, quotient, two products; the backward: six more."""
    return (11 if backward else 5) * numel


def ahead() -> list[tuple[Any, dict[str, Any], int]]:
    """(kernel, arguments, warps) as launched for bfloat16 halves of a matrix."""
    pointers = dict.fromkeys(("out", "dout", "gate", "up", "dgate", "dup"), "*bf16")
    sizes = dict.fromkeys(("n", "gate_stride", "up_stride", "dout_stride"), "i32:16")
    given: dict[str, Any] = {**pointers, **sizes, "BLOCK": 2048}
    kernels = swiglu_kernel, swiglu_backward_kernel
    return [(kernel, {name: given[name] for name in kernel.arg_names}, WARPS) for kernel in kernels]


@triton.jit
def _place(n, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """(row, columns, which columns are inside) of this program."""
    num_blocks = tl.cdiv(n, BLOCK)
    program = tl.program_id(0)
    row = (program // num_blocks).to(tl.int64)
    columns = (program % num_blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    return row, columns, columns < n


@triton.jit
def swiglu_kernel(  # type: ignore[no-untyped-def]
    gate, up, out, n, gate_stride, up_stride, BLOCK: tl.constexpr
):
    row, columns, inside = _place(n, BLOCK)
    g = tl.load(gate + row * gate_stride + columns, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(up + row * up_stride + columns, mask=inside, other=0.0).to(tl.float32)
    product = g / (1 + tl.exp(-g)) * u
    tl.store(out + row * n + columns, product.to(out.dtype.element_ty), mask=inside)


@triton.jit
def swiglu_backward_kernel(  # type: ignore[no-untyped-def]
    dout, gate, up, dgate, dup, n, dout_stride, gate_stride, up_stride, BLOCK: tl.constexpr
):
    row, columns, inside = _place(n, BLOCK)
    d = tl.load(dout + row * dout_stride + columns, mask=inside, other=0.0).to(tl.float32)
    g = tl.load(gate + row * gate_stride + columns, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(up + row * up_stride + columns, mask=inside, other=0.0).to(tl.float32)
    sigmoid = 1 / (1 + tl.exp(-g))
    silu = g * sigmoid
    to_gate = d * u * (sigmoid + silu * (1 - sigmoid))
    place = row * n + columns
    tl.store(dgate + place, to_gate.to(dgate.dtype.element_ty), mask=inside)
    tl.store(dup + place, (d * silu).to(dup.dtype.element_ty), mask=inside)


@torch.library.custom_op("galvatron::swiglu", mutates_args=())
def _swiglu(gate: Tensor, up: Tensor) -> Tensor:
    out = _empty(gate, up)
    if not out.numel() or not runs_kernels(gate, up):
        wide = exact(gate)
        return out.copy_(wide * torch.sigmoid(wide) * exact(up))
    rows = _rows(gate, up)
    num_rows, n = rows[0].shape
    swiglu_kernel[num_rows * triton.cdiv(n, BLOCK),](
        *rows, out, n, *(row.stride(0) for row in rows), BLOCK=BLOCK, num_warps=WARPS
    )
    return out


@_swiglu.register_fake
def _empty(gate: Tensor, up: Tensor) -> Tensor:
    return gate.new_empty(gate.shape, dtype=torch.promote_types(gate.dtype, up.dtype))


@torch.library.custom_op("galvatron::swiglu_backward", mutates_args=())
def _swiglu_backward(dout: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """(dgate, dup)."""
    dgate, dup = _empty_grads(dout, gate, up)
    if not dout.numel() or not runs_kernels(dout, gate, up):
        d, g, u = exact(dout), exact(gate), exact(up)
        sigmoid = torch.sigmoid(g)
        return dgate.copy_(d * u * sigmoid * (1 + g * (1 - sigmoid))), dup.copy_(d * g * sigmoid)
    rows = _rows(dout, gate, up)
    num_rows, n = rows[0].shape
    swiglu_backward_kernel[num_rows * triton.cdiv(n, BLOCK),](
        *rows, dgate, dup, n, *(row.stride(0) for row in rows), BLOCK=BLOCK, num_warps=WARPS
    )
    return dgate, dup


@_swiglu_backward.register_fake
def _empty_grads(dout: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    return gate.new_empty(gate.shape), up.new_empty(up.shape)


def _rows(*tensors: Tensor) -> list[Tensor]:
    """All as matrices with contiguous rows: one row if all are dense."""
    if all(x.is_contiguous() for x in tensors):
        return [x.reshape(1, -1) for x in tensors]
    return [as_rows(x) for x in tensors]


def _save(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, dout: Tensor) -> tuple[Tensor, Tensor]:
    return torch.ops.galvatron.swiglu_backward(dout, *ctx.saved_tensors)


_swiglu.register_autograd(_backward, setup_context=_save)
