"""What sequence and expert parallelism need to know of a layer class, read from its graph."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from galvatron_compile.graph import LayerClass
from galvatron_compile.passes.arguments import concrete_shape

aten = torch.ops.aten

_THROUGH = frozenset(
    {
        aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.clone.default,
        aten.contiguous.default, aten.transpose.int, aten.permute.default, aten.to.dtype,
        aten.t.default, aten._to_copy.default, aten.unsqueeze.default,
    }
)  # fmt: skip
_BATCHED_PRODUCTS = frozenset(
    {aten.bmm.default, aten.baddbmm.default, aten.matmul.default, aten.einsum.default}
)


@dataclass(frozen=True)
class AttentionFacts:
    """One fused attention: bytes of a whole sample, its heads, and the length of the sequence.

    key_value_bytes: keys and values before they are repeated for grouped queries.
    """

    query_bytes: int
    key_value_bytes: int
    heads: int
    kv_heads: int
    length: int


@dataclass(frozen=True)
class ExpertFacts:
    """parameters: which of the class's parameters hold one slice per expert, by their order.
    sent_bytes, returned_bytes: tokens to and from all experts, of one sample."""

    num_experts: int
    parameters: frozenset[int]
    sent_bytes: float
    returned_bytes: float


@dataclass(frozen=True)
class ClassFacts:
    attentions: tuple[AttentionFacts, ...]
    experts: ExpertFacts | None

    @staticmethod
    def of(layer_class: LayerClass, batch_symbol: Any) -> ClassFacts:
        nodes = list(layer_class.graph.graph.nodes)
        calls = [n for n in nodes if n.target is aten.scaled_dot_product_attention.default]
        attentions = tuple(_attention(node, batch_symbol) for node in calls)
        return ClassFacts(attentions, _experts(layer_class, nodes, batch_symbol))


def _attention(node: fx.Node, symbol: Any) -> AttentionFacts:
    query, key, value = (n for n in node.args[:3] if isinstance(n, fx.Node))
    shape = concrete_shape(query.meta["val"], symbol, 1)
    kept = [_before_repetition(n) for n in (key, value)]
    kv_heads = concrete_shape(key.meta["val"], symbol, 1)[1]
    if kept[0] is not key and len(kept[0].meta["val"].shape) > 3:
        kv_heads = concrete_shape(kept[0].meta["val"], symbol, 1)[1]
    return AttentionFacts(
        query_bytes=_bytes(query, symbol, 1),
        key_value_bytes=sum(_bytes(n, symbol, 1) for n in kept),
        heads=shape[1],
        kv_heads=kv_heads,
        length=shape[-2],
    )


def _before_repetition(node: fx.Node) -> fx.Node:
    """The keys that an ``expand`` repeats for the queries of a group, or the node itself."""
    found = node
    while found.target in _THROUGH and isinstance(found.args[0], fx.Node):
        found = found.args[0]
    if found.target is aten.expand.default and isinstance(found.args[0], fx.Node):
        return found.args[0]
    return node


def _experts(
    layer_class: LayerClass, nodes: list[fx.Node], symbol: Any
) -> ExpertFacts | None:
    placeholders = [n for n in nodes if n.op == "placeholder"]
    order = [
        node
        for node, kind in zip(placeholders, layer_class.kinds, strict=False)
        if kind == "parameter"
    ]
    found: set[int] = set()
    products: list[tuple[fx.Node, fx.Node]] = []
    for node in nodes:
        if node.target not in _BATCHED_PRODUCTS:
            continue
        operands = list(node.all_input_nodes)
        weights = [_source(n) for n in operands]
        mine = [order.index(w) for w in weights if w in order and _is_expert(node, w)]
        if mine:
            found.update(mine)
            tokens = next(n for n, w in zip(operands, weights, strict=True) if w not in order)
            products.append((tokens, node))
    if not found:
        return None
    return ExpertFacts(
        num_experts=int(order[min(found)].meta["val"].shape[0]),
        parameters=frozenset(found),
        sent_bytes=_per_sample(products[0][0], symbol),
        returned_bytes=_per_sample(products[-1][1], symbol),
    )


def _is_expert(product: fx.Node, weight: fx.Node) -> bool:
    """One matrix per expert: three dims, of which the product keeps the first."""
    if weight.meta["val"].dim() != 3:
        return False
    if product.target is not aten.einsum.default:
        return True
    terms, result = str(product.args[0]).replace(" ", "").split("->")
    operands: Any = product.args[1]
    letters = [term[0] for term, n in zip(terms.split(","), operands, strict=True) if n is weight]
    return bool(letters) and letters[0] in result


def _source(node: fx.Node) -> fx.Node:
    while node.target in _THROUGH and isinstance(node.args[0], fx.Node):
        node = node.args[0]
    return node


def _bytes(node: fx.Node, symbol: Any, batch_size: int) -> int:
    value = node.meta["val"]
    return torch.Size(concrete_shape(value, symbol, batch_size)).numel() * value.dtype.itemsize


def _per_sample(node: fx.Node, symbol: Any) -> float:
    """The slope between two batch sizes: capacities are rounded, so one size may not show it."""
    return (_bytes(node, symbol, 64) - _bytes(node, symbol, 32)) / 32
