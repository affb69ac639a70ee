"""Means over the batch as sums over parts: what the batch pass does to the loss."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from galvatron_compile import operators
from galvatron_compile.errors import UnsupportedError
from galvatron_compile.graph import note, noted
from galvatron_compile.passes.denominators import Denominators
from galvatron_compile.passes.sharding.rules_base import (
    argument_names,
    is_tensor_valued,
    normal_dims,
    packet_name,
    tensor_inputs,
)
from galvatron_compile.passes.sharding.rules_reduce import MEAN, REDUCE, SUM, elementwise_loss
from galvatron_compile.passes.sharding.views import product, quotient, shape_of, size_of
from galvatron_compile.placement import P, Placement

aten = torch.ops.aten


def scalars_as_sums(node: fx.Node, symbol: Any, denominators: Denominators) -> Placement | None:
    """Batch sizes used as numbers: ``x / batch_size`` and ``full([], batch_size)``.

    The first gets the size of the whole batch through a denominator; the second is the part's own
    share, a partial sum, and its placement is returned.
    """
    name = packet_name(node.target)
    numbers = [
        entry
        for entry in node.all_input_nodes
        if not is_tensor_valued(value := entry.meta.get("val"))
        and isinstance(value, torch.SymInt | torch.SymFloat)
        and symbol in getattr(size_of(value), "free_symbols", ())
    ]
    fills = name in ("full", "scalar_tensor") and node.meta["val"].dim() == 0
    tagged = isinstance(node.target, torch._ops.OpOverload) and (
        torch.Tag.pointwise in node.target.tags
    )
    if not numbers or not (fills or tagged):
        return None
    for entry in numbers:
        expression = size_of(entry.meta["val"])
        factor = quotient(expression, symbol)
        if not isinstance(factor, int):
            raise UnsupportedError(
                f"{node.name} computes with {expression}, which is not a multiple of the batch "
                "size; write it as a division by the batch size"
            )
        if not fills:
            with node.graph.inserting_before(node):
                weight = denominators.full(entry)
                total = denominators.sum_of(weight, ("count", expression))
                dtype = node.meta["val"].dtype
                node.replace_input_with(entry, denominators.new(aten.to.dtype, total, dtype))
    return P if fills else None


def constant_in_parts(
    node: fx.Node, placed: list[Placement], denominators: Denominators
) -> fx.Node | None:
    """``P + 1`` would add the 1 once per part: make the number a tensor, to be divided by them.

    Returns that tensor's node, now an input of ``node`` (``1 - P`` becomes a subtraction).
    """
    name = packet_name(node.target)
    scalar = node.args[1] if len(node.args) > 1 else None
    if name not in ("add", "sub", "rsub") or placed != [P] or not isinstance(scalar, int | float):
        return None
    source = node.args[0]
    alpha = _argument(node, "alpha")
    with node.graph.inserting_before(node):
        dtype = node.meta["val"].dtype
        constant = denominators.new(
            aten.full.default, [], scalar, dtype=dtype, device=node.meta["val"].device
        )
    if name == "rsub":
        node.target, node.args = aten.sub.Tensor, (constant, source)
    else:
        node.target = aten.add.Tensor if name == "add" else aten.sub.Tensor
        node.args = (source, constant)
    node.kwargs = {"alpha": alpha}
    return constant


def mean_as_sum(
    node: fx.Node, inputs: list[fx.Node], placed: list[Placement], denominators: Denominators
) -> list[fx.Node]:
    """Write a mean over sharded samples as sum ÷ denominator; the new nodes, or none."""
    function = _MEANS.get(packet_name(node.target))
    shards = [
        (value, place.dim) for value, place in zip(inputs, placed, strict=True) if place.is_shard
    ]
    if function is None or not shards:
        return []
    made = function(node, shards, denominators)
    if made is None:
        return []
    total, denominator = made
    quotient_node = denominators.divide(total, denominator, node)
    differentiable = noted(node, "differentiable")
    for new in (total, quotient_node):
        new.meta = {**node.meta, "val": new.meta["val"], "custom": {}}
        note(new, differentiable=differentiable)
    node.replace_all_uses_with(quotient_node)
    return [total, quotient_node]


Made = tuple[fx.Node, fx.Node] | None
Shards = list[tuple[fx.Node, int]]


def _argument(node: fx.Node, name: str) -> Any:
    names = argument_names(node.target)
    place = names.index(name)
    if place < len(node.args):
        return node.args[place]
    if name in node.kwargs:
        return node.kwargs[name]
    assert isinstance(node.target, torch._ops.OpOverload)
    return node.target._schema.arguments[place].default_value


def _plain_mean(node: fx.Node, shards: Shards, denominators: Denominators) -> Made:
    value, dim = shards[0]
    shape = shape_of(value.meta["val"])
    named = "dim" in argument_names(node.target)
    given = _argument(node, "dim") if named else None
    dims = normal_dims(given, len(shape))
    if dim not in dims:
        return None
    factor = product(size for i, size in enumerate(shape) if i in dims and i != dim)
    if not isinstance(factor, int):
        return None
    with node.graph.inserting_before(node):
        keepdim = bool(named and _argument(node, "keepdim"))
        dtype = _argument(node, "dtype")
        total = denominators.new(aten.sum.dim_IntList, value, dims, keepdim, dtype=dtype)
    return total, denominators.count(value, dim, factor, node)


def _with_sum(node: fx.Node, denominators: Denominators) -> fx.Node:
    """The same loss with ``reduction=sum``."""
    names = argument_names(node.target)
    args, kwargs = list(node.args), dict(node.kwargs)
    place = names.index("reduction")
    if place < len(args):
        args[place] = SUM
    else:
        kwargs["reduction"] = SUM
    with node.graph.inserting_before(node):
        return denominators.new(node.target, *args, **kwargs)  # type: ignore[arg-type]


def _elementwise_mean(node: fx.Node, shards: Shards, denominators: Denominators) -> Made:
    if _argument(node, "reduction") != MEAN:
        return None
    full = tuple(torch.broadcast_shapes(*[v.meta["val"].shape for v in tensor_inputs(node)]))
    value, dim = shards[0]
    own = size_of(value.meta["val"].shape[dim])
    factor = quotient(product(size_of(size) for size in full), own)
    if not isinstance(factor, int):
        return None
    total = _with_sum(node, denominators)
    return total, denominators.count(value, dim, factor, node)


def _cross_entropy_mean(node: fx.Node, shards: Shards, denominators: Denominators) -> Made:
    if _argument(node, "reduction") != MEAN:
        return None
    logits, target, weight = (_argument(node, name) for name in ("self", "target", "weight"))
    shape = shape_of(logits.meta["val"])
    if len(shape) < 2 or (logits, 0) not in shards or not isinstance(shape[1], int):
        return None
    if len(shape_of(target.meta["val"])) == len(shape):  # probabilities: torch divides by rows
        factor = product(size for i, size in enumerate(shape) if i > 1)
        total = _with_sum(node, denominators)
        return total, denominators.count(logits, 0, factor, node)
    ignored = _argument(node, "ignore_index")
    with node.graph.inserting_before(node):
        if packet_name(node.target) == "cross_entropy_loss":
            smoothing = _argument(node, "label_smoothing")
            total = denominators.new(
                operators.cross_entropy_sum, logits, target, weight, ignored, smoothing
            )
        else:
            total = _with_sum(node, denominators)
        weights = denominators.new(
            operators.cross_entropy_weight, target, weight, shape[1], ignored
        )
    if not denominators.can_sum(weights):
        return None
    key = ("cross entropy", target, weight, shape[1], ignored)
    return total, denominators.sum_of(weights, key)


_MEANS: dict[str, Callable[[fx.Node, Shards, Denominators], Made]] = {
    "mean": _plain_mean,
    **{name: _elementwise_mean for name, rule in REDUCE.items() if rule is elementwise_loss},
    **dict.fromkeys(("cross_entropy_loss", "nll_loss", "nll_loss_nd"), _cross_entropy_mean),
}
