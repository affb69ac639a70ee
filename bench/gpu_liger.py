"""Liger's kernels for the same, where it is installed: https://github.com/linkedin/Liger-Kernel.

Its rotary embedding rotates queries and keys in one call and is left out. Not run yet.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

import torch

EPS = 1e-5


def liger_call(name: str, inputs: tuple[Any, ...]) -> Callable[[], Any] | None:
    """A call that does what the case of that name does; None: Liger is absent or has none."""
    make = CALLS.get(name)
    if make is None or importlib.util.find_spec("liger_kernel") is None:
        return None
    return make(*inputs)


def _function(module: str, name: str) -> Any:
    return getattr(importlib.import_module(f"liger_kernel.ops.{module}"), name)


def _rms_norm(x: Any, weight: Any) -> Callable[[], Any]:
    norm = _function("rms_norm", "LigerRMSNormFunction")
    return lambda: norm.apply(x, weight, EPS)


def _layer_norm(x: Any, weight: Any, bias: Any) -> Callable[[], Any]:
    norm = _function("layer_norm", "LigerLayerNormFunction")
    return lambda: norm.apply(x, weight, bias, EPS)


def _swiglu(gate: Any, up: Any) -> Callable[[], Any]:
    product = _function("swiglu", "LigerSiLUMulFunction")
    return lambda: product.apply(gate, up)


def _loss_and_gradient(logits: Any, target: Any) -> Callable[[], Any]:
    """Liger makes the gradient in place in its forward, if the logits want one."""
    loss = _function("cross_entropy", "LigerCrossEntropyFunction")
    leaf = logits.detach().requires_grad_()

    def call() -> Any:
        with torch.enable_grad():
            return loss.apply(leaf, target, None, -100, 0.0, 0.0, "sum")

    return call


CALLS: dict[str, Callable[..., Callable[[], Any]]] = {
    "rms_norm": _rms_norm,
    "layer_norm": _layer_norm,
    "swiglu": _swiglu,
    "cross_entropy, loss and gradient in place": _loss_and_gradient,
}
