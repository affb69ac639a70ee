"""share_heads: attention over repeated key heads → attention in which queries share a key head.

Models with grouped queries (Ainslie et al. 2023, arXiv 2305.13245) often repeat keys and values
for every query of a group before they call attention (``repeat_kv`` of transformers). That costs a
copy forward and a sum backward, and attention keeps the repeated ones for backward: eight times as
much in a Llama of 70B. Localised graphs are rewritten, not captured ones: there a key head could
not be divided, and the tensor axis would be limited to as many ranks as there are key heads.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from galvatron_compile.operators import grouped_query_attention

aten = torch.ops.aten

_ATTENTION = aten.scaled_dot_product_attention.default
_SAME_ORDER = frozenset(  # neither moves an element
    {
        aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.clone.default,
        aten.contiguous.default,
    }
)  # fmt: skip
_REPEATS = _SAME_ORDER | {aten.expand.default, aten.repeat_interleave.self_int}
_UNTOUCHED = {"attn_mask": None, "dropout_p": 0.0, "enable_gqa": False}


def share_heads(module: fx.GraphModule) -> None:
    """Rewrite attention without mask and dropout where both keys and values are repeated; nodes
    need their ``meta["val"]``."""
    for node in module.graph.find_nodes(op="call_function", target=_ATTENTION):
        given = _arguments(node)
        if any(given[name] != value for name, value in _UNTOUCHED.items()):
            continue
        shapes = [given[name].meta["val"].shape for name in ("query", "key", "value")]
        if {len(shape) for shape in shapes} != {4} or len({shape[1] for shape in shapes}) > 1:
            continue
        key, value = (_before_repetition(given[name]) for name in ("key", "value"))
        if key is None or value is None:
            continue
        if key[0].meta["val"].shape[1] == value[0].meta["val"].shape[1]:
            single = [_without(module.graph, node, *found) for found in (key, value)]
            _share(module.graph, node, given, single)
    module.recompile()


def _arguments(node: fx.Node) -> dict[str, Any]:
    schema = _ATTENTION._schema.arguments
    given = {argument.name: argument.default_value for argument in schema}
    given |= dict(zip(given, node.args, strict=False))
    return given | dict(node.kwargs)


def _before_repetition(node: fx.Node) -> tuple[fx.Node, int | None] | None:
    """A value whose every head ``node`` repeats, and its dim of size 1 that is too many.

    None: ``node`` is something else.
    """
    repeated = node
    while repeated.target in _SAME_ORDER:
        repeated = repeated.args[0]  # type: ignore[assignment]
    if repeated.target is aten.repeat_interleave.self_int and repeated is node:
        return (node.args[0], None) if _dim(node) == 1 else None  # type: ignore[return-value]
    if repeated.target is not aten.expand.default:
        return None
    source: Any = repeated.args[0]
    kept, wide, flat = (list(n.meta["val"].shape) for n in (source, repeated, node))
    if len(kept) != 5 or len(wide) != 5 or len(flat) != 4:
        return None
    is_repeated = kept == [*wide[:2], 1, *wide[3:]]
    is_flattened = flat == [wide[0], wide[1] * wide[2], *wide[3:]]
    return (source, 2) if is_repeated and is_flattened else None


def _dim(node: fx.Node) -> Any:
    return node.args[2] if len(node.args) > 2 else node.kwargs.get("dim")


def _without(graph: fx.Graph, node: fx.Node, source: fx.Node, dim: int | None) -> fx.Node:
    """``source`` without its dim, made in front of ``node``."""
    if dim is None:
        return source
    with graph.inserting_before(node):
        squeezed = graph.call_function(aten.squeeze.dim, (source, dim))
    squeezed.meta["val"] = source.meta["val"].squeeze(dim)
    return squeezed


def _share(graph: fx.Graph, node: fx.Node, given: dict[str, Any], single: list[fx.Node]) -> None:
    """In place: the node keeps its name, under which its costs are found."""
    node.target = grouped_query_attention
    node.args = (given["query"], *single, given["is_causal"], given["scale"])
    node.kwargs = {}
    for repeated in dict.fromkeys((given["key"], given["value"])):
        unread: Any = repeated
        while unread.target in _REPEATS and not unread.users:
            source = unread.args[0]
            graph.erase_node(unread)
            unread = source
