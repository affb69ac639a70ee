"""Patterns of norms over the last dim, alone or with the addition in front of them.

Those of Hugging Face's modules and of torch.nn as torch.export writes them down, after rewriting: a
conversion R → V may stand inside a norm, whose weight is V.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx

from galvatron_compile import collectives, fused
from galvatron_compile.passes.fuse_match import (
    Match,
    Node,
    alike,
    holds,
    is_call,
    is_op,
    is_tensor,
    ordered,
    past_casts,
    past_widening,
    precedes,
    val,
)


def rms_norm(node: Node) -> Iterator[Match]:
    """weight * (x * rsqrt(mean(x²) + eps)), in a wider dtype between casts or not."""
    if is_op(node, "rms_norm"):
        yield from _whole_rms_norm(node)
    if not is_op(node, "mul"):
        return
    for weight, scaled in (node.args[:2], node.args[1::-1]):
        chain: list[Node] = [node]
        product = past_casts(scaled, chain)
        axis = None
        if is_call(product, collectives.all_reduce_gradient):
            chain.append(product)
            axis = product.args[1]
            product = past_casts(product.args[0], chain)
        rounded = [val(cast).dtype for cast in chain[1:] if is_op(cast, "to")]
        found = _normalised(product, chain)
        if found is None:
            continue
        value, eps = found
        # A detour over fewer digits than x has would be lost.
        exact = all(holds(dtype, val(value).dtype) for dtype in rounded)
        if exact and is_parameter_of(weight, value):
            yield from _norms("rms_norm", node, value, (weight, eps), chain, axis)
            return


def _whole_rms_norm(node: Node) -> Iterator[Match]:
    """aten.rms_norm over the last dim, with a weight."""
    value, dims, *given = node.args
    weight, eps = [*given, *(None, None)[len(given) :]][:2]
    if len(dims) == 1 and weight is not None:
        eps = torch.finfo(val(value).dtype).eps if eps is None else eps
        yield from _norms("rms_norm", node, value, (weight, eps), [node], None)


def _normalised(node: Any, chain: list[Node]) -> tuple[Node, float] | None:
    """x and eps of x * rsqrt(mean(pow(x, 2), -1) + eps)."""
    if not is_op(node, "mul"):
        return None
    wide, root = node.args[:2]
    if not is_tensor(wide) or not is_op(root, "rsqrt"):
        return None
    total = root.args[0]
    if not is_op(total, "add") or not isinstance(total.args[1], float):
        return None
    mean = total.args[0]
    if not is_op(mean, "mean") or mean.args[2:] != (True,):
        return None
    if list(mean.args[1]) not in ([-1], [val(wide).ndim - 1]):
        return None
    power = mean.args[0]
    if not is_op(power, "pow") or power.args[1] != 2 or power.args[0] is not wide:
        return None
    chain += [node, root, total, mean, power]
    return past_widening(wide, chain), total.args[1]


def layer_norm(node: Node) -> Iterator[Match]:
    """aten.layer_norm over the last dim."""
    if not is_op(node, "layer_norm"):
        return
    value, dims, *given = node.args
    weight, bias, eps = [*given, *(None, None, 1e-5)[len(given) :]][:3]
    if len(dims) == 1:
        yield from _norms("layer_norm", node, value, (weight, bias, eps), [node], None)


def _norms(
    name: str,
    node: Node,
    value: Node,
    rest: tuple[Any, ...],
    chain: list[Node],
    axis: Any,
) -> Iterator[Match]:
    """The norm of ``value``; before it, as they gain more, that with the addition that makes the
    value and that with the sum over ranks in front of the addition."""
    ahead = [x for x in rest if isinstance(x, fx.Node) and not precedes(x, value)]
    if axis is None and not ahead and _adds(value):
        sums = (x for x in value.args if is_call(x, collectives.all_reduce))
        summed = next(sums, None)
        if summed is not None and name == "rms_norm":
            residual = value.args[1] if summed is value.args[0] else value.args[0]
            args = (summed.args[0], residual, *rest, summed.args[1])
            yield Match(
                "all_reduce + add_rms_norm", fused.all_reduce_add_rms_norm, args, (node, value),
                ordered([*chain, value, summed]), at=value,
            )  # fmt: skip
        yield Match(
            f"add_{name}", getattr(fused, f"add_{name}"), (*value.args[:2], *rest), (node, value),
            ordered([*chain, value]), at=value,
        )  # fmt: skip
    converted = None if axis is None else (value, axis)
    target = getattr(fused, name)
    yield Match(name, target, (value, *rest), (node,), ordered(chain), node, converted)


def _adds(node: Node) -> bool:
    """x + y of equal shapes and dtypes."""
    if not is_op(node, "add") or not all(is_tensor(x) for x in node.args[:2]):
        return False
    return len(node.args) == 2 and alike(val(node.args[0]), val(node.args[1]))


def is_parameter_of(weight: Any, value: Node) -> bool:
    """A vector with a number for each feature of the last dim; a shorter one would spread."""
    if not is_tensor(weight) or not isinstance(val(value), Tensor) or not val(value).ndim:
        return False
    return val(weight).ndim == 1 and bool(val(weight).shape[0] == val(value).shape[-1])
