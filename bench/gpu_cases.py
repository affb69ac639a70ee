"""What bench/gpu.py measures: every kernel with inputs, PyTorch's own way, and bytes moved."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from galvatron_compile.kernels import (
    adamw,
    buckets,
    cross_entropy,
    experts,
    layer_norm,
    rms_norm,
    rotary,
    swiglu,
)

OPS: Any = torch.ops.galvatron
EPS = 1e-5
Inputs = tuple[Any, ...]


@dataclass(frozen=True)
class Sizes:
    """Of inputs: rows of ``features``, heads of 128 and 16 heads, classes of a vocabulary."""

    rows: int
    features: int
    vocabulary: int
    sequence: int


FULL = Sizes(rows=16384, features=4096, vocabulary=128256, sequence=4096)
TINY = Sizes(rows=6, features=96, vocabulary=160, sequence=5)


@dataclass(frozen=True)
class Case:
    """One kernel.

    make: sizes, device → inputs. kernel, eager: of the inputs → tensors that are compared, the
    second in any precision, so that float64 inputs make it the reference. moved_bytes: of the
    inputs. target: share of the copy ceiling that issue 5 asks for; None: none.
    in_place: inputs are changed, and made anew for every check.
    """

    name: str
    make: Callable[[Sizes, torch.device], Inputs]
    kernel: Callable[..., Any]
    eager: Callable[..., Any]
    moved_bytes: Callable[[Inputs], int]
    target: float | None = 0.9
    in_place: bool = False


def randn(device: torch.device, *shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(shape, device=device).to(dtype)


def _x_weight(sizes: Sizes, device: torch.device) -> Inputs:
    return randn(device, sizes.rows, sizes.features), randn(device, sizes.features)


def _two_and_weight(sizes: Sizes, device: torch.device) -> Inputs:
    x, weight = _x_weight(sizes, device)
    return x, torch.randn_like(x), weight


def _norm(x: Tensor, weight: Tensor) -> Tensor:
    wide = x if x.dtype == torch.float64 else x.float()
    scaled = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)
    return (weight * scaled).to(x.dtype)


def _gradients(function: Callable[..., Tensor], dy: Tensor, *inputs: Tensor) -> Any:
    leaves = [x.detach().requires_grad_() for x in inputs]
    with torch.enable_grad():
        return torch.autograd.grad(function(*leaves), leaves, dy)


def _prepared_rms(sizes: Sizes, device: torch.device) -> Inputs:
    dy, x, weight = _two_and_weight(sizes, device)
    return dy, x, weight, OPS.rms_norm(x, weight, EPS)[1]


def _prepared_layer(sizes: Sizes, device: torch.device) -> Inputs:
    dy, x, weight = _two_and_weight(sizes, device)
    bias = torch.randn_like(weight)
    _, mean, rstd = OPS.layer_norm(x, weight, bias, EPS)
    return dy, x, weight, bias, mean, rstd


def _layer(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], weight, bias, EPS)


def _gates(sizes: Sizes, device: torch.device) -> Inputs:
    shape = (sizes.rows, sizes.features)
    return randn(device, *shape), randn(device, *shape), randn(device, *shape)


def _rotary(sizes: Sizes, device: torch.device) -> Inputs:
    heads, width = 16, 128 if sizes is FULL else 16
    x = randn(device, 2, sizes.sequence, heads, width).transpose(1, 2)
    tables = (randn(device, 1, 1, sizes.sequence, width) for _ in range(2))
    return x, *tables


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    return x * cos + torch.cat((-x[..., half:], x[..., :half]), -1) * sin


def _logits(sizes: Sizes, device: torch.device) -> Inputs:
    rows = max(1, sizes.rows // 4)
    target = torch.randint(0, sizes.vocabulary, (rows,), device=device)
    return randn(device, rows, sizes.vocabulary), target


def _loss(logits: Tensor, target: Tensor) -> Tensor:
    merged = OPS.cross_entropy_merge(OPS.cross_entropy_statistics(logits, target, 0, -100)[None])
    return (merged[:, 0] - merged[:, 1]).sum()


def _eager_loss(logits: Tensor, target: Tensor) -> Tensor:
    wide = logits if logits.dtype == torch.float64 else logits.float()
    return F.cross_entropy(wide, target, reduction="sum")


def _logits_and_sums(sizes: Sizes, device: torch.device) -> Inputs:
    logits, target = _logits(sizes, device)
    statistics = OPS.cross_entropy_statistics(logits, target, 0, -100)[None]
    return logits, target, OPS.cross_entropy_merge(statistics)[:, 0].clone()


def _loss_gradient(logits: Tensor, target: Tensor, log_sum: Tensor) -> Tensor:
    one = torch.ones((), device=logits.device)
    return OPS.cross_entropy_gradient(logits, target, log_sum, one, 0, -100)


def _eager_loss_gradient(logits: Tensor, target: Tensor, log_sum: Tensor) -> Tensor:
    (found,) = _gradients(lambda x: _eager_loss(x, target), torch.ones_like(log_sum[0]), logits)
    return found


def _optimizer(sizes: Sizes, device: torch.device) -> Inputs:
    numel = sizes.rows * sizes.features
    wide = [randn(device, numel, dtype=torch.float32) for _ in range(2)]
    second = torch.rand(numel, device=device)
    gradient, copy = randn(device, numel), torch.zeros(numel, device=device).bfloat16()
    return (wide[0], gradient, wide[1], second, copy, torch.full((), 0.5, device=device))


def _fused_adamw(
    master: Tensor, gradient: Tensor, first: Tensor, second: Tensor, copy: Tensor, scale: Tensor
) -> Any:
    OPS.adamw_(
        master, gradient, first, second, copy, scale, 3, 1e-3, 0.9, 0.95, 1e-8, 0.1
    )  # fmt: skip
    return master, first, second, copy


def _unfused_adamw(
    master: Tensor, gradient: Tensor, first: Tensor, second: Tensor, copy: Tensor, scale: Tensor
) -> Any:
    """Unscale and clip, PyTorch's fused AdamW, copy: one after the other."""
    scaled = gradient.to(master.dtype) * scale
    step = torch.full((), 3.0, device=master.device)
    torch._fused_adamw_(
        [master], [scaled], [first], [second], [], [step], lr=1e-3, beta1=0.9, beta2=0.95,
        weight_decay=0.1, eps=1e-8, amsgrad=False, maximize=False,
    )  # fmt: skip
    copy.copy_(master)
    return master, first, second, copy


def _bucket(sizes: Sizes, device: torch.device) -> Inputs:
    shapes = [(sizes.features, sizes.features), (sizes.features,), (3, sizes.features)]
    gradients = [randn(device, *shape) for shape in shapes]
    chunks = [-(-g.numel() // 4) for g in gradients]
    offsets = [sum(-(-c // 32) * 32 for c in chunks[:k]) for k in range(len(chunks))]
    out = torch.zeros(4, offsets[-1] + chunks[-1], device=device)
    return gradients, out, offsets, chunks


def _pack(gradients: list[Tensor], out: Tensor, offsets: list[int], chunks: list[int]) -> Tensor:
    buckets.pack(gradients, out, offsets, chunks)
    return out


def _eager_pack(
    gradients: list[Tensor], out: Tensor, offsets: list[int], chunks: list[int]
) -> Tensor:
    for gradient, offset, chunk in zip(gradients, offsets, chunks, strict=True):
        flat = F.pad(gradient.reshape(-1), (0, 4 * chunk - gradient.numel()))
        out[:, offset : offset + chunk] = flat.view(4, chunk)
    return out


def _packed_bytes(inputs: Inputs) -> int:
    gradients, out, _, chunks = inputs
    read = sum(g.numel() * g.element_size() for g in gradients)
    return read + 4 * sum(chunks) * out.element_size()


def _tokens(sizes: Sizes, device: torch.device) -> Inputs:
    chosen = torch.randint(0, 8, (sizes.rows, 2), device=device)
    gates = torch.rand(sizes.rows, 2, device=device)
    return randn(device, sizes.rows, sizes.features), chosen, gates


def _there_and_back(x: Tensor, chosen: Tensor, gates: Tensor) -> Tensor:
    rows, source, _ = experts.permute(x, chosen, 8)
    return experts.unpermute(rows, source, gates.to(x.dtype))


def _rows(inputs: Inputs) -> tuple[int, int, int]:
    x = inputs[0]
    return x.shape[0], x.shape[1], x.element_size()


CASES = (
    Case("rms_norm", _x_weight, lambda x, w: rms_norm.rms_norm(x, w, EPS), _norm,
         lambda i: rms_norm.moved_bytes(*_rows(i))),
    Case("rms_norm backward", _prepared_rms, OPS.rms_norm_backward,
         lambda dy, x, w, _: _gradients(_norm, dy, x, w),
         lambda i: rms_norm.moved_bytes(*_rows(i), backward=True), 0.8),
    Case("add_rms_norm", _two_and_weight, lambda x, r, w: rms_norm.add_rms_norm(x, r, w, EPS),
         lambda x, r, w: (_norm(x + r, w), x + r),
         lambda i: rms_norm.moved_bytes(*_rows(i), adds=True)),
    Case("layer_norm", lambda s, d: (*_x_weight(s, d), randn(d, s.features)),
         lambda x, w, b: layer_norm.layer_norm(x, w, b, EPS), _layer,
         lambda i: layer_norm.moved_bytes(*_rows(i))),
    Case("layer_norm backward", _prepared_layer,
         lambda dy, x, w, b, mean, rstd: OPS.layer_norm_backward(dy, x, w, mean, rstd, True)[:3],
         lambda dy, x, w, b, *_: _gradients(_layer, dy, x, w, b),
         lambda i: layer_norm.moved_bytes(*_rows(i), backward=True), 0.8),
    Case("swiglu", lambda s, d: _gates(s, d)[1:], swiglu.swiglu, lambda g, u: F.silu(g) * u,
         lambda i: swiglu.moved_bytes(i[0].numel(), i[0].element_size())),
    Case("swiglu backward", _gates, OPS.swiglu_backward,
         lambda dy, g, u: _gradients(lambda a, b: F.silu(a) * b, dy, g, u),
         lambda i: swiglu.moved_bytes(i[0].numel(), i[0].element_size(), backward=True)),
    Case("rotary", _rotary, rotary.rotary, _rotate,
         lambda i: rotary.moved_bytes(*i[0].shape, i[0].element_size())),
    Case("cross_entropy", _logits, _loss, _eager_loss,
         lambda i: cross_entropy.moved_bytes(*_rows(i)), 0.85),
    Case("cross_entropy gradient", _logits_and_sums, _loss_gradient, _eager_loss_gradient,
         lambda i: cross_entropy.moved_bytes(*_rows(i), backward=True), 0.85),
    Case("adamw", _optimizer, _fused_adamw, _unfused_adamw,
         lambda i: adamw.moved_bytes(i[0].numel(), 2, 2), in_place=True),
    Case("bucket pack", _bucket, _pack, _eager_pack, _packed_bytes, in_place=True),
    Case("experts there and back", _tokens, _there_and_back,
         lambda x, chosen, gates: x * gates.sum(1, keepdim=True).to(x.dtype),
         lambda i: 6 * i[0].numel() * i[0].element_size(), None),
)  # fmt: skip
