"""AdamW on flat shards in one pass: gradient unscaled and clipped, weights copied to 16 bits.

For each element, with ``g = gradient * scale``, as torch.optim.AdamW does::

    master *= 1 - lr * weight_decay
    exp_avg = beta1 * exp_avg + (1 - beta1) * g;   exp_avg_sq = beta2 * exp_avg_sq + (1 - beta2) g^2
    master -= lr / (1 - beta1^step) * exp_avg / (sqrt(exp_avg_sq / (1 - beta2^step)) + eps)
    copy    = master, rounded

With masters and moments of 4 bytes, gradients of e and copies of c it moves ``24 + e + c`` bytes an
element (PyTorch's own steps, one after the other, more than three times that) and does about 16
flops: memory bounds it. A program owns one block; all but the last move 16 bytes a lane.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from galvatron_compile.kernels.base import INTERPRETED, exact, runs_kernels, tl, triton

BLOCK = 32768 if INTERPRETED else 1024
WARPS = 4


class FlatAdamW(torch.optim.Optimizer):
    """``torch.optim.AdamW`` by one kernel a parameter, in any number of parameter groups.

    State dicts are those of AdamW, both ways. ``norm`` is the norm of the last step's gradients,
    on their device (None without ``max_norm``).

    max_norm: gradients are scaled down to this total norm; the host never waits for the norm. It
        is the norm of the gradients at hand: with shards of them, give ``step`` a scale instead.

    Raises:
        ValueError: lr, betas, eps, weight_decay or max_norm out of range; a loaded state that asks
            for amsgrad or maximize.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        max_norm: float | None = None,
    ) -> None:
        named = {"lr": lr, "eps": eps, "weight_decay": weight_decay, "max_norm": max_norm or 0.0}
        for name, value in named.items():
            if not value >= 0.0:
                raise ValueError(f"{name} must not be negative; it is {value}")
        if not all(0.0 <= beta < 1.0 for beta in betas):
            raise ValueError(f"betas must lie in [0, 1); they are {betas}")
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay))
        self.max_norm = max_norm
        self.norm: Tensor | None = None

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            for name in ("amsgrad", "maximize"):
                if group.get(name):
                    raise ValueError(f"FlatAdamW has no {name}; load a state without it")

    @torch.no_grad()
    def step(  # type: ignore[override]
        self, closure: Callable[[], Any] | None = None, *, scale: Tensor | None = None
    ) -> Any:
        """One step; gradients count as multiplied by ``scale`` (0-d, on their device)."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        pairs = [(g, p) for g in self.param_groups for p in g["params"] if p.grad is not None]
        if not pairs:
            return loss
        if any(p.grad.is_sparse for _, p in pairs):
            raise ValueError("FlatAdamW takes dense gradients; use sparse=False in embeddings")
        if self.max_norm is not None:
            scale = self._clip([p.grad for _, p in pairs], scale, self.max_norm)
        scales: dict[torch.device, Tensor] = {}
        for group, parameter in pairs:
            device = parameter.device
            if device not in scales:
                one = torch.ones((), device=device)
                scales[device] = one if scale is None else scale.to(device)
            self._update(group, parameter, scales[device])
        return loss

    def _clip(self, gradients: list[Tensor], scale: Tensor | None, max_norm: float) -> Tensor:
        """``scale`` times what brings the norm of the scaled gradients down to ``max_norm``."""
        norm = torch.nn.utils.get_total_norm(gradients)
        self.norm = norm if scale is None else norm * scale
        coefficient = (max_norm / (self.norm + 1e-6)).clamp(max=1.0)
        return coefficient if scale is None else coefficient * scale

    def _update(self, group: dict[str, Any], parameter: Tensor, scale: Tensor) -> None:
        state = self.state[parameter]
        if not state:
            state["step"] = torch.tensor(0.0)
            state["exp_avg"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
            state["exp_avg_sq"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
        state["step"] += 1
        mutated = parameter, state["exp_avg"], state["exp_avg_sq"]
        flat = [x.detach().reshape(-1) for x in mutated]  # a view, unless it is not contiguous
        assert parameter.grad is not None
        torch.ops.galvatron.adamw_(
            flat[0], parameter.grad.reshape(-1), flat[1], flat[2], None, scale,
            int(state["step"].item()), float(group["lr"]), *group["betas"], group["eps"],
            group["weight_decay"],
        )  # fmt: skip
        for x, values in zip(mutated, flat, strict=True):
            if not x.is_contiguous():
                x.detach().copy_(values.view(x.shape))


def adamw_reference(
    master: Tensor,
    gradient: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    step: int,
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """(master, exp_avg, exp_avg_sq) after a step, in plain float64."""
    g, (beta1, beta2) = gradient.double(), betas
    first = beta1 * exp_avg.double() + (1 - beta1) * g
    second = beta2 * exp_avg_sq.double() + (1 - beta2) * g * g
    direction = first / (1 - beta1**step) / ((second / (1 - beta2**step)).sqrt() + eps)
    return (1 - lr * weight_decay) * master.double() - lr * direction, first, second


def moved_bytes(numel: int, gradient_itemsize: int, copy_itemsize: int = 0) -> int:
    """Master and two moments in and out, the gradient in, the copy (if any) out."""
    return numel * (3 * 4 * 2 + gradient_itemsize + copy_itemsize)


def flops(numel: int) -> int:
    """Scale 1, decay 2, moments 3 + 4, direction 4 (a root, a quotient), step 2."""
    return 16 * numel


def ahead() -> list[tuple[Any, dict[str, Any], int]]:
    """(kernel, arguments, warps): bfloat16 gradients with a copy, float32 without one."""
    given: dict[str, Any] = dict.fromkeys(("master", "exp_avg", "exp_avg_sq", "scale"), "*fp32")
    given |= dict.fromkeys(_FACTORS, "fp32") | {"n": "i64:16", "BLOCK": 1024}
    cases: list[tuple[Any, dict[str, Any], int]] = []
    for gradient, copies in (("*bf16", True), ("*fp32", False)):
        case = given | {"gradient": gradient, "copy": "*bf16" if copies else "*fp32"}
        case |= {"COPIES": copies}
        cases.append((adamw_kernel, {name: case[name] for name in adamw_kernel.arg_names}, WARPS))
    return cases


_FACTORS = ("decay", "beta1", "one_less_beta1", "beta2", "one_less_beta2", "eps", "rate", "root")


@triton.jit
def _load(pointer, place, n, MASKED: tl.constexpr):  # type: ignore[no-untyped-def]
    """In float32; what lies outside is never stored."""
    if MASKED:
        values = tl.load(pointer + place, mask=place < n, other=0.0)
    else:
        values = tl.load(pointer + place)
    return values.to(tl.float32)


@triton.jit
def _store(pointer, place, n, values, MASKED: tl.constexpr):  # type: ignore[no-untyped-def]
    values = values.to(pointer.dtype.element_ty)
    if MASKED:
        tl.store(pointer + place, values, mask=place < n)
    else:
        tl.store(pointer + place, values)


@triton.jit
def _step(  # type: ignore[no-untyped-def]
    master, gradient, exp_avg, exp_avg_sq, copy, scale, place, n,
    decay, beta1, one_less_beta1, beta2, one_less_beta2, eps, rate, root,
    COPIES: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    g = _load(gradient, place, n, MASKED) * scale
    p = _load(master, place, n, MASKED)
    first = beta1 * _load(exp_avg, place, n, MASKED) + one_less_beta1 * g
    second = beta2 * _load(exp_avg_sq, place, n, MASKED) + one_less_beta2 * g * g
    p -= decay * p
    p -= rate * tl.div_rn(first, tl.sqrt_rn(second) * root + eps)
    _store(master, place, n, p, MASKED)
    _store(exp_avg, place, n, first, MASKED)
    _store(exp_avg_sq, place, n, second, MASKED)
    if COPIES:
        _store(copy, place, n, p, MASKED)


@triton.jit
def adamw_kernel(  # type: ignore[no-untyped-def]
    master, gradient, exp_avg, exp_avg_sq, copy, scale, n,
    decay, beta1, one_less_beta1, beta2, one_less_beta2, eps, rate, root,
    COPIES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """decay: lr * weight_decay; rate: lr / (1 - beta1^step); root: 1 / sqrt(1 - beta2^step)."""
    start = tl.program_id(0).to(tl.int64) * BLOCK
    place = start + tl.arange(0, BLOCK)
    factor = tl.load(scale).to(tl.float32)
    if start + BLOCK <= n:
        _step(
            master, gradient, exp_avg, exp_avg_sq, copy, factor, place, n,
            decay, beta1, one_less_beta1, beta2, one_less_beta2, eps, rate, root, COPIES, False,
        )  # fmt: skip
    else:
        _step(
            master, gradient, exp_avg, exp_avg_sq, copy, factor, place, n,
            decay, beta1, one_less_beta1, beta2, one_less_beta2, eps, rate, root, COPIES, True,
        )  # fmt: skip


@torch.library.custom_op(
    "galvatron::adamw_", mutates_args=("master", "exp_avg", "exp_avg_sq", "copy")
)
def adamw_(
    master: Tensor,
    gradient: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    copy: Tensor | None,
    scale: Tensor,
    step: int,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
) -> None:
    """One step on a flat shard ``[n]``; step counts from 1, scale is 0-d.

    master, exp_avg, exp_avg_sq and copy are contiguous: they are written in place.
    """
    mutated = [x for x in (master, exp_avg, exp_avg_sq, copy) if x is not None]
    assert all(x.is_contiguous() and x.shape == master.shape for x in mutated)
    decay, rate = lr * weight_decay, lr / (1 - beta1**step)
    root = 1 / math.sqrt(1 - beta2**step)
    if not master.numel() or not runs_kernels(*mutated, gradient, scale):
        g = exact(gradient) * scale
        exp_avg.copy_(beta1 * exact(exp_avg) + (1 - beta1) * g)
        exp_avg_sq.copy_(beta2 * exact(exp_avg_sq) + (1 - beta2) * g * g)
        direction = exact(exp_avg) / (exact(exp_avg_sq).sqrt() * root + eps)
        master.copy_(exact(master) - decay * exact(master) - rate * direction)
        if copy is not None:
            copy.copy_(master)
        return
    adamw_kernel[triton.cdiv(master.numel(), BLOCK),](
        master, gradient.contiguous(), exp_avg, exp_avg_sq, copy, scale, master.numel(),
        decay, beta1, 1 - beta1, beta2, 1 - beta2, eps, rate, root,
        COPIES=copy is not None, BLOCK=BLOCK, num_warps=WARPS,
    )  # fmt: skip


@adamw_.register_fake
def _(
    master: Tensor,
    gradient: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    copy: Tensor | None,
    scale: Tensor,
    step: int,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
) -> None:
    return None
