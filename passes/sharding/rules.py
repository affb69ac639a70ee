"""All legal ways to run one operator on the ranks of one mesh axis.

A rule gives a placement to every tensor input and output such that running the operator (or what
the rule emits) on local values gives the local outputs, and such that its own backward gives the
gradients as their placements say. Operators without a rule of their own run on whole values.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from galvatron_compile.graph import noted
from galvatron_compile.passes.sharding.rules_base import (
    Emit,
    Emitter,
    Rule,
    RuleFunction,
    Site,
    canonical,
    is_differentiable,
    packet_name,
    tensor_inputs,
)
from galvatron_compile.passes.sharding.rules_elementwise import ELEMENTWISE, pointwise
from galvatron_compile.passes.sharding.rules_index import INDEX
from galvatron_compile.passes.sharding.rules_matmul import MATMUL
from galvatron_compile.passes.sharding.rules_pieces import PIECES
from galvatron_compile.passes.sharding.rules_reduce import REDUCE
from galvatron_compile.passes.sharding.rules_shape import SHAPE
from galvatron_compile.passes.sharding.views import Size, can_shard, map_shard, shape_of
from galvatron_compile.placement import Placement, R, V

__all__ = ["Emit", "Emitter", "Rule", "candidates", "outers_of", "rule_function", "tensor_inputs"]

RULES: dict[str, RuleFunction] = {
    **ELEMENTWISE,
    **MATMUL,
    **SHAPE,
    **PIECES,
    **REDUCE,
    **INDEX,
}

# The largest constant outer taken from a view: fused projections have 2 to 4 pieces. Larger ones
# stem from sharding a head dim, which no operator behind it can use.
MAX_VIEW_OUTER = 8


def candidates(
    node: fx.Node,
    size: int | None,
    batch_symbol: Any = None,
    outers: tuple[Size, ...] | None = None,
) -> list[Rule]:
    """All legal rules for ``node``, the one that keeps everything whole first.

    size: the ranks of the tensor axis; None for the data axis, where exactly the dims whose size
        is a multiple of ``batch_symbol`` may be sharded and no rule emits anything.
    outers: the outer factors to try; by default those that the graph gives rise to
        (:func:`outers_of`), pass them to save the time of collecting them for every node.

    Values without a gradient are never V, it would be the same as R. On the tensor axis they
    are always R, except where an operator with a gradient takes its share of them.
    """
    inputs = tensor_inputs(node)
    n = batch_symbol if size is None else size
    if outers is None:
        outers = _data_outers(inputs) if size is None else outers_of(node.graph, n)
    site = Site(node, n, size is None, outers)
    rules = [Rule("replicate", (R,) * len(inputs), (R,) * site.num_outputs)]
    if is_differentiable(node):
        rules.append(Rule("same", (V,) * len(inputs), (V,) * site.num_outputs))
    function = rule_function(node.target)
    wanted = size is None or (size > 1 and is_differentiable(node))
    if function is not None and (wanted or packet_name(node.target) == "sym_size"):
        rules += function(site)
    found: dict[tuple[object, ...], Rule] = {}
    for rule in rules:
        rule = canonical(rule, inputs, node)
        found.setdefault((rule.inputs, rule.outputs), rule)
    return list(found.values())


def rule_function(target: object) -> RuleFunction | None:
    """The function that makes the rules of an operator; None if there are no special ones."""
    name = packet_name(target)
    if name.endswith("_") and not name.endswith("__"):
        name = name[:-1]  # in place: the same on shards
    if name in RULES:
        return RULES[name]
    if isinstance(target, torch._ops.OpOverload) and torch.Tag.pointwise in target.tags:
        return pointwise
    return None


def outers_of(graph: fx.Graph, n: Size) -> tuple[Size, ...]:
    """1, the piece counts of split, chunk and cat nodes, and what views of shards give."""
    found: dict[Size, None] = {1: None}
    for node in graph.nodes:
        if node.op != "call_function":
            continue
        value = node.meta.get("val")
        name = packet_name(node.target)
        if name in ("split", "split_with_sizes", "chunk") and isinstance(value, list | tuple):
            found[len(value)] = None
        elif name in ("cat", "concat"):
            found[len(node.args[0])] = None
        elif name in ("view", "_unsafe_view", "reshape", "flatten", "unflatten"):
            source, target = shape_of(node.args[0].meta["val"]), shape_of(value)
            for outer in (*_view_outers(source, target, n), *_view_outers(target, source, n)):
                found[outer] = None
    return tuple(found)


def _view_outers(source: tuple[Size, ...], target: tuple[Size, ...], n: Size) -> list[Size]:
    found = []
    for dim, size in enumerate(source):
        mapped = map_shard(source, target, dim, 1, n) if can_shard(size, 1, n) else None
        if mapped and not (isinstance(mapped[1], int) and mapped[1] > MAX_VIEW_OUTER):
            found.append(mapped[1])
    return found


def _data_outers(inputs: list[fx.Node]) -> tuple[Size, ...]:
    """1, and those that the inputs' own placements on the data axis have."""
    found: dict[Size, None] = {1: None}
    for value in inputs:
        placed = noted(value, "data")
        if isinstance(placed, str) and placed.startswith("S"):
            found[Placement.parse(placed).outer] = None
    return tuple(found)
