"""Mixture of experts: rows brought in the order of their experts, and their results summed back.

``permute`` copies each of t tokens to its k experts; ``unpermute`` sums a token's k rows weighted
by its gates. For rows of h elements of e bytes permute moves ``(1 + k) t h e`` bytes, and so do
unpermute and the gradient of permute (which is an unpermute without gates); the gradient of
unpermute moves ``(1 + 2k) t h e``. About 2 flops for each element of a row; memory bounds all. How
programs share the work is told in expert_kernels.py.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from galvatron_compile.kernels.base import (
    INTERPRETED,
    as_rows,
    exact,
    next_power_of_2,
    runs_kernels,
    triton,
    warps_for,
)
from galvatron_compile.kernels.expert_kernels import (
    collect_kernel,
    spread_kernel,
    spread_weighted_kernel,
)

MAX_BLOCK = 8192 if INTERPRETED else 2048


def permute(x: Tensor, experts: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """(rows ``[t * k, h]``, source ``[t * k]``, counts ``[num_experts]``), both int64.

    x: ``[t, h]``; experts: ``[t, k]`` int64, each in ``[0, num_experts)`` (not checked: it would
    make the host wait). Rows come by expert, those of one expert by token; row r is that of token
    ``source[r] // k``, slot ``source[r] % k``; counts tells how many rows each expert has.

    Raises:
        ValueError: experts is not ``[t, k]``.
    """
    if experts.dim() != 2 or experts.shape[0] != x.shape[0]:
        raise ValueError(f"experts must be [{x.shape[0]}, k], not {list(experts.shape)}")
    return torch.ops.galvatron.permute(x, experts, num_experts)


def unpermute(rows: Tensor, source: Tensor, gates: Tensor) -> Tensor:
    """``[t, h]``: for each token the sum of its k rows times gates, in the dtype of rows.

    rows: ``[t * k, h]`` in the order of ``source`` (from :func:`permute`); gates: ``[t, k]``.

    Raises:
        ValueError: gates is not ``[t, k]``; rows, source and gates do not agree on t * k.
    """
    if gates.dim() != 2 or not rows.shape[0] == source.shape[0] == gates.numel():
        raise ValueError(
            f"{rows.shape[0]} rows, {source.shape[0]} sources and gates {list(gates.shape)}: "
            "each must have t * k"
        )
    return torch.ops.galvatron.unpermute(rows, source, gates)


def permute_reference(
    x: Tensor, experts: Tensor, num_experts: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Expert by expert, token by token; rows in float64."""
    k = experts.shape[1]
    flat = experts.flatten().tolist()
    order = [j for expert in range(num_experts) for j, e in enumerate(flat) if e == expert]
    source = torch.tensor(order, dtype=torch.int64)
    counts = torch.tensor([flat.count(expert) for expert in range(num_experts)])
    return x.double()[source // k], source, counts


def unpermute_reference(rows: Tensor, source: Tensor, gates: Tensor) -> Tensor:
    """In plain float64."""
    out = rows.new_zeros((gates.shape[0], rows.shape[1]), dtype=torch.float64)
    weighted = rows.double() * gates.double().flatten()[source][:, None]
    return out.index_add(0, source // gates.shape[1], weighted)


def moved_bytes(t: int, k: int, h: int, itemsize: int, *, weights_gradient: bool = False) -> int:
    """Of permute, unpermute, the gradient of permute; ``weights_gradient``: that of unpermute."""
    return t * h * itemsize * (1 + (2 * k if weights_gradient else k))


def flops(t: int, k: int, h: int, *, weights_gradient: bool = False) -> int:
    """Of unpermute: a product and a sum; its gradient: two products and a sum."""
    return (3 if weights_gradient else 2) * t * k * h


def ahead() -> list[tuple[Any, dict[str, Any], int]]:
    """(kernel, arguments, warps) for bfloat16 tokens of 4096 and 8 experts each."""
    given: dict[str, Any] = dict.fromkeys(("x", "rows", "out", "dout", "drows"), "*bf16")
    given |= dict.fromkeys(("gates", "dgates"), "*fp32")
    given |= dict.fromkeys(("h", "x_stride", "rows_stride", "dout_stride"), "i32:16")
    given |= {"places": "*i64", "K": 8, "BLOCK": 2048}
    cases: list[tuple[Any, dict[str, Any], int]] = []
    for kernel, gated in (
        (spread_kernel, False), (collect_kernel, True), (collect_kernel, False),
        (spread_weighted_kernel, True),
    ):  # fmt: skip
        case = given | {"GATED": gated}
        cases.append((kernel, {name: case[name] for name in kernel.arg_names}, warps_for(2048)))
    return cases


@torch.library.custom_op("galvatron::permute", mutates_args=())
def _permute(x: Tensor, experts: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    k = experts.shape[1]
    # A radix sort passes once for each byte or so of a key: two bytes are enough.
    keys = experts.reshape(-1).to(torch.int16 if num_experts < 2**15 else torch.int64)
    ordered, source = torch.sort(keys, stable=True)
    edges = torch.arange(num_experts + 1, device=x.device, dtype=ordered.dtype)
    counts = torch.searchsorted(ordered, edges).diff()  # bincount would make the host wait
    if not x.numel() or not experts.numel() or not runs_kernels(x):
        return x[source // k], source, counts
    rows, tokens = x.new_empty((source.numel(), x.shape[1])), as_rows(x)
    block, h = _columns(tokens)
    spread_kernel[tokens.shape[0] * triton.cdiv(h, block),](
        tokens, _places(source), rows, h, tokens.stride(0),
        K=k, BLOCK=block, num_warps=warps_for(block),
    )  # fmt: skip
    return rows, source, counts


@_permute.register_fake
def _(x: Tensor, experts: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    rows = experts.shape[0] * experts.shape[1]
    source = x.new_empty(rows, dtype=torch.int64)
    return x.new_empty((rows, x.shape[1])), source, x.new_empty(num_experts, dtype=torch.int64)


@torch.library.custom_op("galvatron::permute_backward", mutates_args=())
def _permute_backward(drows: Tensor, source: Tensor, k: int) -> Tensor:
    """``[t, h]``: the sum of each token's k rows."""
    return _collect(drows, source, None, k)


@_permute_backward.register_fake
def _(drows: Tensor, source: Tensor, k: int) -> Tensor:
    return drows.new_empty((drows.shape[0] // k, drows.shape[1]))


@torch.library.custom_op("galvatron::unpermute", mutates_args=())
def _unpermute(rows: Tensor, source: Tensor, gates: Tensor) -> Tensor:
    return _collect(rows, source, gates, gates.shape[1])


@_unpermute.register_fake
def _(rows: Tensor, source: Tensor, gates: Tensor) -> Tensor:
    return rows.new_empty((gates.shape[0], rows.shape[1]))


@torch.library.custom_op("galvatron::unpermute_backward", mutates_args=())
def _unpermute_backward(
    dout: Tensor, rows: Tensor, source: Tensor, gates: Tensor
) -> tuple[Tensor, Tensor]:
    """(drows, dgates)."""
    t, k = gates.shape
    h = rows.shape[1]
    drows, dgates = rows.new_empty(rows.shape), gates.new_empty(gates.shape)
    places = _places(source)
    if not rows.numel() or not runs_kernels(dout, rows, gates):
        d = exact(dout)[:, None]
        weighted = (d * exact(gates)[:, :, None]).reshape(rows.shape)[source]
        dgates.copy_((d * exact(rows)[places].view(t, k, h)).sum(-1))
        return drows.copy_(weighted), dgates
    dout, rows = as_rows(dout), as_rows(rows)
    block, h = _columns(rows)
    spread_weighted_kernel[t,](
        dout, rows, places, gates.contiguous(), drows, dgates, h, dout.stride(0), rows.stride(0),
        K=k, BLOCK=block, num_warps=warps_for(block),
    )  # fmt: skip
    return drows, dgates


@_unpermute_backward.register_fake
def _(dout: Tensor, rows: Tensor, source: Tensor, gates: Tensor) -> tuple[Tensor, Tensor]:
    return rows.new_empty(rows.shape), gates.new_empty(gates.shape)


def _save_permute(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)
    ctx.k = inputs[1].shape[1]
    ctx.save_for_backward(output[1])


def _differentiate_permute(ctx: Any, drows: Tensor | None, *_: Any) -> tuple[Any, None, None]:
    if drows is None:
        return None, None, None
    [source] = ctx.saved_tensors
    return torch.ops.galvatron.permute_backward(drows, source, ctx.k), None, None


def _save_unpermute(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate_unpermute(ctx: Any, dout: Tensor) -> tuple[Tensor, None, Tensor]:
    drows, dgates = torch.ops.galvatron.unpermute_backward(dout, *ctx.saved_tensors)
    return drows, None, dgates


_permute.register_autograd(_differentiate_permute, setup_context=_save_permute)
_unpermute.register_autograd(_differentiate_unpermute, setup_context=_save_unpermute)


def _places(source: Tensor) -> Tensor:
    """``[t * k]``: the row of each token's each slot, the inverse of ``source``."""
    rows = torch.arange(source.numel(), device=source.device)
    return torch.empty_like(source).scatter_(0, source, rows)


def _columns(rows: Tensor) -> tuple[int, int]:
    """(block, h) of rows ``[n, h]``."""
    h = rows.shape[1]
    return min(MAX_BLOCK, next_power_of_2(h)), h


def _collect(rows: Tensor, source: Tensor, gates: Tensor | None, k: int) -> Tensor:
    t, places = rows.shape[0] // k, _places(source)
    out = rows.new_empty((t, rows.shape[1]))
    given = [x for x in (rows, gates) if x is not None]
    if not rows.numel() or not runs_kernels(*given):
        parts = exact(rows)[places].view(t, k, rows.shape[1])
        return out.copy_((parts if gates is None else parts * exact(gates)[:, :, None]).sum(1))
    rows = as_rows(rows)
    block, h = _columns(rows)
    collect_kernel[t * triton.cdiv(h, block),](
        rows, places, None if gates is None else gates.contiguous(), out, h, rows.stride(0),
        K=k, GATED=gates is not None, BLOCK=block, num_warps=warps_for(block),
    )  # fmt: skip
    return out
