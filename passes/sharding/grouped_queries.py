"""share_heads: attention over repeated key heads → attention in which queries share a key head.

Models with grouped queries (Ainslie et al. 2023, arXiv 2305.13245) often repeat keys and values
for every query of a group before they call attention (``repeat_kv`` of transformers). That costs a
copy forward and a sum backward, and attention keeps the repeated ones for backward: eight times as
much in a Llama of 70B. Localised graphs are rewritten, not captured ones: there a key head could
not be divided, and the tensor axis would be limited to as many ranks as there are key heads.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from galvatron_compile.grouped_queries import grouped_query_attention
from galvatron_compile.torch_private import schema_arguments

aten = torch.ops.aten

_ATTENTION = aten.scaled_dot_product_attention.default
_SAME_ORDER = frozenset(  # none moves an element
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
        given = dict(schema_arguments(_ATTENTION))
        given |= dict(zip(given, node.args, strict=False)) | dict(node.kwargs)
        tensors = [given[name] for name in ("query", "key", "value")]
        shapes = [tensor.meta["val"].shape for tensor in tensors]
        if any(given[name] != value for name, value in _UNTOUCHED.items()):
            continue
        if {len(shape) for shape in shapes} != {4} or len({shape[1] for shape in shapes}) > 1:
            continue
        single = [_before_repetition(tensor) for tensor in tensors[1:]]
        if None not in single and len({n.meta["val"].shape[1] for n in single}) == 1:
            _share(module.graph, node, given, single)
    module.recompile()


def _before_repetition(node: fx.Node) -> Any:
    """What every head of ``node`` repeats, ``[batch, key heads, (1,) keys, width]``, or None."""
    if node.target is aten.repeat_interleave.self_int:
        dim = node.args[2] if len(node.args) > 2 else node.kwargs.get("dim")
        return node.args[0] if dim == 1 else None
    repeated: Any = node
    while repeated.target in _SAME_ORDER:
        repeated = repeated.args[0]
    if repeated.target is not aten.expand.default:
        return None
    source = repeated.args[0]
    kept, wide, flat = (list(n.meta["val"].shape) for n in (source, repeated, node))
    is_repeated = kept == [*wide[:2], 1, *wide[3:]]
    is_flattened = flat == [*wide[:1], math.prod(wide[1:3]), *wide[3:]]
    return source if is_repeated and is_flattened else None


def _share(
    graph: fx.Graph, node: fx.Node, given: dict[str, Any], single: Sequence[fx.Node]
) -> None:
    """In place: the node keeps its name, under which its costs are found."""
    with graph.inserting_before(node):
        key, value = (_squeezed(graph, source) for source in single)
    node.target = grouped_query_attention
    node.args = (given["query"], key, value, given["is_causal"], given["scale"])
    node.kwargs = {}
    for repeated in dict.fromkeys((given["key"], given["value"])):
        unread: Any = repeated
        while unread.target in _REPEATS and not unread.users:
            source = unread.args[0]
            graph.erase_node(unread)
            unread = source


def _squeezed(graph: fx.Graph, source: fx.Node) -> fx.Node:
    """``source`` without the dim of size 1 that was expanded."""
    value = source.meta["val"]
    if value.dim() == 4:
        return source
    squeezed = graph.call_function(aten.squeeze.dim, (source, 2))
    squeezed.meta["val"] = value.squeeze(2)
    return squeezed
