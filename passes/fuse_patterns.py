"""Patterns of memory-bound operators that have a streaming kernel.

A matcher looks at a node that might be the last of its pattern and gives every :class:`Match` that
it sees there, those that gain more first. Norms are in fuse_norms.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from galvatron_compile import fused, operators
from galvatron_compile.passes.fuse_match import (
    Match,
    Node,
    alike,
    is_call,
    is_op,
    is_tensor,
    ordered,
    past_widening,
    val,
)
from galvatron_compile.passes.fuse_norms import layer_norm, rms_norm


def streaming(node: Node) -> Iterator[Match]:
    """The patterns that end at ``node``."""
    for matcher in (rms_norm, layer_norm, swiglu, rotary, cross_entropy):
        yield from matcher(node)


def swiglu(node: Node) -> Iterator[Match]:
    """silu(gate) * up."""
    if not is_op(node, "mul"):
        return
    for silu, up in (node.args[:2], node.args[1::-1]):
        if is_op(silu, "silu") and is_tensor(up) and alike(val(silu), val(up)):
            args = (silu.args[0], up)
            yield Match("swiglu", fused.swiglu, args, (node,), ordered([silu, node]), node)


def rotary(node: Node) -> Iterator[Match]:
    """x * cos + cat(-x₂, x₁) * sin, with x₁ and x₂ the halves of the last dim."""
    if not is_op(node, "add") or not all(is_op(x, "mul") for x in node.args[:2]):
        return
    straight, turned = node.args[:2]
    value, cos = straight.args[:2]
    joined, sin = turned.args[:2]
    if not all(map(is_tensor, (value, cos, sin))) or not is_op(joined, "cat"):
        return
    if val(value).ndim != 4 or joined.args[1:] not in ((-1,), (3,)):
        return
    parts = joined.args[0]
    if len(parts) != 2 or not is_op(parts[0], "neg"):
        return
    second, first = parts[0].args[0], parts[1]
    half = val(value).shape[-1] // 2
    if not _is_slice(first, value, 0, half) or not _is_slice(second, value, half, 2 * half):
        return
    if not all(_is_table(val(table), val(value)) for table in (cos, sin)):
        return
    covers = ordered([straight, first, second, parts[0], joined, turned, node])
    yield Match("rotary", fused.rotary, (value, cos, sin), (node,), covers, node)


def _is_slice(node: Any, value: Node, start: int, end: int) -> bool:
    if not is_op(node, "slice") or node.args[0] is not value or len(node.args) < 4:
        return False
    dim, begins, ends, *step = node.args[1:]
    stops = min(ends, val(value).shape[-1])
    return dim in (-1, 3) and begins == start and stops == end and step in ([], [1])


def _is_table(table: torch.Tensor, x: torch.Tensor) -> bool:
    """``[b or 1, 1, s, d]`` for x ``[b, h, s, d]``: one row for each position, of all heads."""
    if table.ndim != 4 or table.shape[1] != 1 or table.shape[2:] != x.shape[2:]:
        return False
    return bool(table.shape[0] == 1 or table.shape[0] == x.shape[0])


_LOSS = ("logits", "target", "weight", "ignore_index", "label_smoothing")


def cross_entropy(node: Node) -> Iterator[Match]:
    """The loss of rewritten graphs, whole or over a shard of the vocabulary; of class indices
    without class weights or smoothing. Logits that were cast for it alone are read as they were
    before, if that loses nothing and the loss stays of its dtype."""
    if is_call(node, operators.cross_entropy_sum):
        names: tuple[str, ...] = _LOSS
    elif is_call(node, operators.cross_entropy_sum_shard):
        names = (*_LOSS, "axis")
    else:
        return
    given: dict[str, Any] = dict.fromkeys((*_LOSS, "axis"))
    given |= {"ignore_index": -100, "label_smoothing": 0.0}
    given |= dict(zip(names, node.args, strict=False)) | node.kwargs
    logits, labels = given["logits"], given["target"]
    if given["weight"] is not None or given["label_smoothing"] or val(logits).ndim != 2:
        return
    if val(labels).is_floating_point():
        return
    name = "cross_entropy" if given["axis"] is None else "vocabulary-parallel cross_entropy"
    rest = (labels, given["ignore_index"], given["axis"])
    view = logits if is_op(logits, "view", "reshape") else None
    casts: list[Node] = []
    source = past_widening(logits if view is None else view.args[0], casts)
    if casts and _loss_dtype(val(source)) == val(node).dtype:
        viewed = None if view is None else (source, view)
        covers = ordered([node, *casts] if view is None else [node, view, *casts])
        target = _loss(source, covers)
        yield Match(name, target, (source, *rest), (node,), covers, node, viewed=viewed)
    yield Match(name, _loss(logits, (node,)), (logits, *rest), (node,), (node,), node)


def _loss(logits: Node, covers: tuple[Node, ...]) -> Callable[..., Any]:
    """With its gradient written over the logits where they are a product, which needs its factors
    alone for its own backward, and nothing but the loss reads them."""
    readers = set(covers)
    while is_op(logits, "view", "reshape") and set(logits.users) <= readers:
        readers, logits = {logits}, logits.args[0]
    spare = is_op(logits, "linear", "mm", "addmm", "matmul") and set(logits.users) <= readers
    return fused.cross_entropy_over if spare else fused.cross_entropy


def _loss_dtype(logits: torch.Tensor) -> torch.dtype:
    return torch.promote_types(logits.dtype, torch.float32)


def experts(node: Node) -> tuple[Match, str] | None:
    """The end of a mixture of experts in which each token brings copies of its experts' weights:
    sum over a token's experts of (product of those weights) * gates. As a match of that alone, and
    why it stays."""
    if not is_op(node, "sum") or node.args[1:2] != ([1],):
        return None
    view = node.args[0]
    if not is_op(view, "view", "reshape") or not is_op(view.args[0], "mul"):
        return None
    covers, product = [view.args[0], view, node], view.args[0].args[0]
    while is_op(product, "squeeze", "view", "reshape", "to"):
        covers.append(product)
        product = product.args[0]
    if not is_op(product, "bmm", "matmul") or not is_op(product.args[0], "index"):
        return None
    if val(product.args[0].args[0]).ndim != 3:
        return None
    covers += [product, product.args[0]]
    match = Match("permute, unpermute", node.target, node.args, (node,), ordered(covers), node)
    return match, "tokens are not sorted by expert: each takes copies of its experts' weights"
