"""What bench/gpu.py measures: norms, gates, rotary embedding, cross-entropy. More in gpu_flat.py.

Each with inputs, PyTorch's own way, and the bytes that it must move.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from galvatron_compile.kernels import cross_entropy, layer_norm, rms_norm, rotary, swiglu

OPS: Any = torch.ops.galvatron
EPS = 1e-5
Inputs = tuple[Any, ...]
Function = Callable[..., Any]


@dataclass(frozen=True)
class Sizes:
    """Of inputs: rows of ``features``, heads of ``width``, classes of a vocabulary."""

    rows: int
    features: int
    vocabulary: int
    sequence: int
    heads: int
    width: int


# So large that a launch takes 100 us and more, and no input fits in a cache.
FULL = Sizes(rows=65536, features=4096, vocabulary=128256, sequence=4096, heads=16, width=128)
TINY = Sizes(rows=6, features=96, vocabulary=160, sequence=5, heads=3, width=16)


@dataclass(frozen=True)
class Case:
    """One kernel.

    make: sizes, device → inputs. kernel, eager: of the inputs → tensors that are compared, the
    second in any precision, so that float64 inputs make it the reference. moved_bytes: of the
    inputs; None: no bound of interest. target: share of the copy ceiling that issue 5 asks for.
    forward: for the gradient of something; the inputs are then (what reaches its results, leaves,
    others), and eager's backward alone is timed. num_leaves: how many of them get gradients.
    over_target: how much faster than eager issue 5 asks it to be. eager_is: in words, where it is
    not plain. others: more to compare the time with. roundings: see ``gpu_check.excess``.
    """

    name: str
    make: Callable[[Sizes, torch.device], Inputs]
    kernel: Function
    eager: Function
    moved_bytes: Callable[[Inputs], int] | None
    target: float | None = 0.9
    forward: Function | None = None
    num_leaves: int = 0
    over_target: float | None = None
    eager_is: str = ""
    others: dict[str, Function] = field(default_factory=dict)
    compiles: bool = True
    compares: bool = True
    roundings: int = 1


def backward(
    name: str,
    make: Callable[[Sizes, torch.device], Inputs],
    kernel: Function,
    forward: Function,
    num_leaves: int,
    moved_bytes: Callable[[Inputs], int],
    target: float | None = 0.8,
) -> Case:
    """A case of gradients: the reference is autograd of ``forward(*leaves, *others)``."""

    def eager(dy: Any, *rest: Any) -> Any:
        return prepared_backward(forward, num_leaves, (dy, *rest))()

    return Case(name, make, kernel, eager, moved_bytes, target, forward, num_leaves)


def prepared_backward(forward: Function, num_leaves: int, inputs: Inputs) -> Callable[[], Any]:
    """Runs the forward now; the call that is returned does the backward alone, again and again."""
    dy, *rest = inputs
    leaves = [x.detach().requires_grad_() for x in rest[:num_leaves]]
    with torch.enable_grad():
        y = forward(*leaves, *rest[num_leaves:])
    return lambda: torch.autograd.grad(y, leaves, dy, retain_graph=True)


def randn(device: torch.device, *shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(shape, device=device, dtype=dtype)


def _x_weight(sizes: Sizes, device: torch.device) -> Inputs:
    return randn(device, sizes.rows, sizes.features), randn(device, sizes.features)


def _two_weight(sizes: Sizes, device: torch.device) -> Inputs:
    x, weight = _x_weight(sizes, device)
    return x, torch.randn_like(x), weight


def _two_weight_bias(sizes: Sizes, device: torch.device) -> Inputs:
    return *_two_weight(sizes, device), randn(device, sizes.features)


def _norm(x: Tensor, weight: Tensor, *_: Any) -> Tensor:
    wide = x if x.dtype == torch.float64 else x.float()
    scaled = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)
    return (weight * scaled).to(x.dtype)


def _norm_and_total(total: Tensor, weight: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return _norm(total, weight), total.view_as(total)


def _layer(x: Tensor, weight: Tensor, bias: Tensor, *_: Any) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], weight, bias, EPS)


def _for_rms(sizes: Sizes, device: torch.device) -> Inputs:
    dy, x, weight = _two_weight(sizes, device)
    return dy, x, weight, OPS.rms_norm(x, weight, EPS)[1]


def _for_added_rms(sizes: Sizes, device: torch.device) -> Inputs:
    dy, x, weight, rstd = _for_rms(sizes, device)
    return [dy, torch.randn_like(dy)], x, weight, rstd


def _for_layer(sizes: Sizes, device: torch.device) -> Inputs:
    dy, x, weight, bias = _two_weight_bias(sizes, device)
    _, mean, rstd = OPS.layer_norm(x, weight, bias, EPS)
    return dy, x, weight, bias, mean, rstd


def _gates(sizes: Sizes, device: torch.device) -> Inputs:
    shape = (sizes.rows, sizes.features)
    return randn(device, *shape), randn(device, *shape), randn(device, *shape)


def _rotary(sizes: Sizes, device: torch.device) -> Inputs:
    shape = (max(2, sizes.rows // sizes.sequence), sizes.sequence, sizes.heads, sizes.width)
    tables = (randn(device, 1, 1, sizes.sequence, sizes.width) for _ in range(2))
    return randn(device, *shape).transpose(1, 2), *tables


def _rotary_by_angles(sizes: Sizes, device: torch.device) -> Inputs:
    """So that rotating in place many times does not grow."""
    x, table, _ = _rotary(sizes, device)
    angles = table.float().chunk(2, -1)[0].repeat(1, 1, 1, 2)
    return x, angles.cos().bfloat16(), angles.sin().bfloat16()


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    return x * cos + torch.cat((-x[..., half:], x[..., :half]), -1) * sin


def _for_rotary(sizes: Sizes, device: torch.device) -> Inputs:
    x, cos, sin = _rotary(sizes, device)
    return torch.randn_like(x), x, cos, sin


def _rotate_back(dy: Tensor, _: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return OPS.rotary_backward(dy, cos.squeeze(1), sin.squeeze(1))


def _rotated_bytes(x: Tensor) -> int:
    b, h, s, d = x.shape
    return rotary.moved_bytes(b, h, s, d, x.element_size())


def _logits(sizes: Sizes, device: torch.device) -> Inputs:
    rows = max(2, sizes.rows // 16)
    target = torch.randint(0, sizes.vocabulary, (rows,), device=device)
    return randn(device, rows, sizes.vocabulary), target


def _loss(logits: Tensor, target: Tensor) -> Tensor:
    merged = OPS.cross_entropy_merge(OPS.cross_entropy_statistics(logits, target, 0, -100)[None])
    return (merged[:, 0] - merged[:, 1]).sum()


def _eager_loss(logits: Tensor, target: Tensor, *_: Any) -> Tensor:
    wide = logits if logits.dtype == torch.float64 else logits.float()
    return F.cross_entropy(wide, target, reduction="sum")


def _for_loss(sizes: Sizes, device: torch.device) -> Inputs:
    logits, target = _logits(sizes, device)
    statistics = OPS.cross_entropy_statistics(logits, target, 0, -100)[None]
    log_sum = OPS.cross_entropy_merge(statistics)[:, 0].clone()
    return torch.ones((), device=device), logits, target, log_sum


def _loss_gradient(one: Tensor, logits: Tensor, target: Tensor, log_sum: Tensor) -> Tensor:
    return OPS.cross_entropy_gradient(logits, target, log_sum, one, 0, -100)


def _loss_gradient_(logits: Tensor, target: Tensor) -> Tensor:
    """Loss and its gradient over the logits, as a step of training does them."""
    statistics = OPS.cross_entropy_statistics(logits, target, 0, -100)[None]
    log_sum = OPS.cross_entropy_merge(statistics)[:, 0].clone()
    one = torch.ones((), device=logits.device)
    OPS.cross_entropy_gradient_(logits, target, log_sum, one, 0, -100)
    return logits


def _eager_loss_gradient_(logits: Tensor, target: Tensor) -> Tensor:
    leaf = logits.detach().requires_grad_()
    with torch.enable_grad():
        return torch.autograd.grad(_eager_loss(leaf, target), leaf)[0]


def _rows(x: Tensor) -> tuple[int, int, int]:
    return x.shape[0], x.shape[1], x.element_size()


def _numel(x: Tensor) -> tuple[int, int]:
    return x.numel(), x.element_size()


STREAMING = (
    Case("rms_norm", _x_weight, lambda x, w: rms_norm.rms_norm(x, w, EPS), _norm,
         lambda i: rms_norm.moved_bytes(*_rows(i[0]))),
    backward("rms_norm backward", _for_rms, OPS.rms_norm_backward, _norm, 2,
             lambda i: rms_norm.moved_bytes(*_rows(i[0]), backward=True)),
    Case("add_rms_norm", _two_weight, lambda x, r, w: rms_norm.add_rms_norm(x, r, w, EPS),
         lambda x, r, w: (_norm(x + r, w), x + r),
         lambda i: rms_norm.moved_bytes(*_rows(i[0]), adds=True), roundings=2),
    backward("add_rms_norm backward", _for_added_rms,
             lambda dys, x, w, rstd: OPS.rms_norm_backward(dys[0], x, w, rstd, dys[1]),
             _norm_and_total, 2,
             lambda i: rms_norm.moved_bytes(*_rows(i[1]), adds=True, backward=True)),
    Case("layer_norm", lambda s, d: _two_weight_bias(s, d)[1:],
         lambda x, w, b: layer_norm.layer_norm(x, w, b, EPS), _layer,
         lambda i: layer_norm.moved_bytes(*_rows(i[0]))),
    backward("layer_norm backward", _for_layer,
             lambda dy, x, w, b, m, r: OPS.layer_norm_backward(dy, x, w, m, r, True)[:3],
             _layer, 3, lambda i: layer_norm.moved_bytes(*_rows(i[0]), backward=True)),
    Case("add_layer_norm", _two_weight_bias,
         lambda x, r, w, b: layer_norm.add_layer_norm(x, r, w, b, EPS),
         lambda x, r, w, b: (_layer(x + r, w, b), x + r),
         lambda i: layer_norm.moved_bytes(*_rows(i[0]), adds=True), roundings=2),
    Case("swiglu", lambda s, d: _gates(s, d)[1:], swiglu.swiglu, lambda g, u: F.silu(g) * u,
         lambda i: swiglu.moved_bytes(*_numel(i[0]))),
    backward("swiglu backward", _gates, OPS.swiglu_backward, lambda g, u: F.silu(g) * u, 2,
             lambda i: swiglu.moved_bytes(*_numel(i[0]), backward=True), 0.9),
    Case("rotary", _rotary, rotary.rotary, _rotate, lambda i: _rotated_bytes(i[0])),
    Case("rotary in place", _rotary_by_angles, rotary.rotary_, _rotate,
         lambda i: _rotated_bytes(i[0])),
    backward("rotary backward", _for_rotary, _rotate_back, _rotate, 1,
             lambda i: _rotated_bytes(i[0]), 0.9),
    Case("cross_entropy", _logits, _loss, _eager_loss,
         lambda i: cross_entropy.moved_bytes(*_rows(i[0])), 0.85),
    backward("cross_entropy gradient", _for_loss, _loss_gradient, _eager_loss, 1,
             lambda i: cross_entropy.moved_bytes(*_rows(i[1]), backward=True), 0.85),
    Case("cross_entropy, loss and gradient in place", _logits, _loss_gradient_,
         _eager_loss_gradient_,
         lambda i: cross_entropy.moved_bytes(*_rows(i[0]))
         + cross_entropy.moved_bytes(*_rows(i[0]), backward=True), 0.85),
)  # fmt: skip
