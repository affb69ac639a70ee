"""attention: Graph → Graph in which a mask that only says "causal" is the operator's own flag.

Models that compute their mask (transformers does, whenever it is traced) hand attention a tensor of
``[batch, 1, queries, keys]``. Kernels that need none, FlashAttention among them, refuse it, and
every layer reads it. Where the mask depends on nothing but sizes it is computed here, once, and
compared: equal to the lower triangle it becomes ``is_causal``, all true it goes.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_map_only

from galvatron_compile.graph import Graph, copy_annotated
from galvatron_compile.passes.arguments import concrete_size

_ATTENTION = torch.ops.aten.scaled_dot_product_attention.default
_MASK = 3  # place among the arguments; aten takes no mask beside is_causal
# A mask of more is left as it is: computing it takes some bytes of this machine for each element.
_MOST_ELEMENTS = 2**28
_BATCH_SIZE = 2  # more than one sample, so that a mask that differs among them is seen


def attention(graph: Graph) -> Graph:
    """See the module's docstring; the graph itself where there is nothing to do."""
    calls = [n for n in graph.module.graph.nodes if n.target is _ATTENTION and _mask_of(n)]
    if not calls:
        return graph
    module = copy_annotated(graph.module)
    known: dict[fx.Node, str | None] = {}
    for node in list(module.graph.nodes):
        if node.target is _ATTENTION and (mask := _mask_of(node)):
            if mask not in known:
                known[mask] = _kind(mask, node, graph.batch_symbol)
            if kind := known[mask]:
                _without_mask(node, causal=kind == "causal")
    for mask in known:
        _erase(module.graph, mask)
    module.recompile()
    return replace(graph, module=module)


def _mask_of(node: fx.Node) -> fx.Node | None:
    mask: Any = node.args[_MASK] if len(node.args) > _MASK else node.kwargs.get("attn_mask")
    return mask if isinstance(mask, fx.Node) else None


def _kind(mask: fx.Node, node: fx.Node, symbol: Any) -> str | None:
    """"causal", "all" (nothing is masked), or None: anything else."""
    queries, keys = (n.meta["val"].shape[-2] for n in node.args[:2])  # type: ignore[union-attr]
    if not (isinstance(queries, int) and isinstance(keys, int)):
        return None
    if queries * keys > _MOST_ELEMENTS or (order := _sources(mask)) is None:
        return None
    found = _computed(order, symbol)
    triangle = torch.ones(queries, keys, dtype=torch.bool).tril()
    if _allows_only(found, triangle):
        return "causal"
    return "all" if _allows_only(found, torch.ones_like(triangle)) else None


def _allows_only(mask: Tensor, allowed: Tensor) -> bool:
    """Whether a mask, boolean or to be added, lets exactly ``allowed`` through unchanged."""
    if mask.dtype == torch.bool:
        return bool((mask == allowed).all())
    blocked = mask <= torch.finfo(mask.dtype).min
    return bool(((mask == 0) == allowed).all() and (blocked != allowed).all())


def _sources(mask: fx.Node) -> list[fx.Node] | None:
    """What the mask is computed by, in order; None if values of the batch, parameters, buffers or
    random numbers are among it."""
    needed: set[fx.Node] = set()
    todo = [mask]
    while todo:
        node = todo.pop()
        if node in needed:
            continue
        tags = getattr(node.target, "tags", ())
        if node.op != "call_function" or torch.Tag.nondeterministic_seeded in tags:
            return None
        needed.add(node)
        if not _is_size(node):
            todo += node.all_input_nodes
    return [node for node in mask.graph.nodes if node in needed]


def _is_size(node: fx.Node) -> bool:
    return node.target is torch.ops.aten.sym_size.int


def _computed(order: list[fx.Node], symbol: Any) -> Tensor:
    """The value of the last of ``order`` for a batch of ``_BATCH_SIZE``, on the CPU."""
    values: dict[fx.Node, Any] = {}
    last = {source: node for node in order for source in node.all_input_nodes}
    for node in order:
        if _is_size(node):
            values[node] = concrete_size(node.meta["val"], symbol, _BATCH_SIZE)
            continue
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: values[n])
        args, kwargs = tree_map_only(torch.device, lambda _: torch.device("cpu"), (args, kwargs))
        values[node] = node.target(*args, **kwargs)  # type: ignore[operator]
        for source in node.all_input_nodes:
            if last[source] is node:
                del values[source]
    found: Tensor = values[order[-1]]
    return found


def _without_mask(node: fx.Node, *, causal: bool) -> None:
    query, key, value, *rest = node.args
    dropout = rest[1] if len(rest) > 1 else node.kwargs.get("dropout_p", 0.0)
    named = {k: v for k, v in node.kwargs.items() if k in ("scale", "enable_gqa")}
    node.args, node.kwargs = (query, key, value, None, dropout, causal), named


def _erase(graph: fx.Graph, mask: fx.Node) -> None:
    """The mask, and what only it was computed from."""
    todo, erased = [mask], set[fx.Node]()
    while todo:
        node = todo.pop()
        if not node.users and node.op == "call_function" and node not in erased:
            todo += node.all_input_nodes
            graph.erase_node(node)
            erased.add(node)
