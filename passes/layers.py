"""From the captured graph to layers and classes of equal layers.

The module stack proposes the blocks (members of a list-like container that follow one another
and do the same operations); everything before, between and behind them becomes layers of its own.
Every layer is a stretch of the graph's order, so any cut is a valid one.

The head's matrix product and the loss are one layer: a cut between them would have to make the
logits, the largest value of a language model, whole on every rank.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from galvatron_compile.graph import Graph, Layer, LayeredGraph
from galvatron_compile.passes.blocks import find_blocks
from galvatron_compile.passes.cut import crossing, cut, is_scalar, users_through_scalars

aten = torch.ops.aten

_PRODUCTS = frozenset(
    {
        aten.linear.default, aten.addmm.default, aten.mm.default, aten.matmul.default,
        aten.bmm.default, aten.einsum.default, aten.conv1d.default, aten.conv2d.default,
    }
)  # fmt: skip
_BALANCED_LAYERS = 4  # of a model without repeated blocks, at most


@dataclass(frozen=True)
class _Piece:
    name: str
    nodes: tuple[fx.Node, ...]
    prefix: str = ""


def find_layers(graph: Graph) -> LayeredGraph:
    """Divide ``graph`` into layers, and group equal layers into classes."""
    nodes = _ordered(graph)
    heavy = _parameter_users(graph)
    blocks = find_blocks(nodes, heavy)
    pieces = _around(nodes, blocks, heavy) if blocks else _balanced(graph, nodes)
    outputs = crossing(graph, [piece.nodes for piece in pieces])
    cuts = [
        cut(graph, piece.nodes, results, piece.prefix)
        for piece, results in zip(pieces, outputs, strict=True)
    ]
    keys = list(dict.fromkeys(piece.key for piece in cuts))
    first = {key: next(at for at, c in enumerate(cuts) if c.key == key) for key in keys}
    classes = tuple(cuts[first[key]].layer_class(pieces[first[key]].name) for key in keys)
    layers = tuple(
        Layer(
            name=piece.name,
            class_index=keys.index(found.key),
            inputs=found.inputs,
            outputs=found.outputs,
            parameters=found.parameters,
            buffers=found.buffers,
        )
        for piece, found in zip(pieces, cuts, strict=True)
    )
    (loss,) = graph.module.graph.output_node().all_input_nodes
    return LayeredGraph(graph, classes, layers, loss.name)


def _ordered(graph: Graph) -> list[fx.Node]:
    """The computing nodes, numbers left out, the parts of a tuple right behind the tuple."""
    nodes: list[fx.Node] = []
    for node in graph.module.graph.nodes:
        if node.op != "call_function" or is_scalar(node) or node.target is operator.getitem:
            continue
        nodes.append(node)
        if isinstance(node.meta["val"], (tuple, list)):
            nodes.extend(user for user in node.users if user.target is operator.getitem)
    return nodes


def _parameter_users(graph: Graph) -> frozenset[fx.Node]:
    """Nodes with an input that is a parameter, or computed from parameters alone."""
    weights: set[fx.Node] = set()
    users: set[fx.Node] = set()
    for node in graph.module.graph.nodes:
        sources = node.all_input_nodes
        if node.op == "get_attr" and node.target in graph.parameters:
            weights.add(node)
        elif node.op == "call_function" and any(source in weights for source in sources):
            users.add(node)
            if all(source in weights for source in sources):  # a transpose, a cast
                weights.add(node)
    return frozenset(users)


# --- pieces around the blocks -------------------------------------------------------------------


def _around(
    nodes: Sequence[fx.Node], blocks: dict[fx.Node, str], heavy: frozenset[fx.Node]
) -> list[_Piece]:
    """The graph's order divided at block boundaries."""
    runs = _absorb_glue(_merge_interleaved(_runs(nodes, blocks)), heavy)
    last = max(at for at, (path, _) in enumerate(runs) if path is not None)
    pieces: list[_Piece] = []
    for at, (path, held) in enumerate(runs):
        if path is not None:
            pieces.append(_Piece(path, tuple(held), path + "."))
        elif at > last:
            pieces.extend(_tail(held, heavy))
        else:
            bridges = sum(p.name.startswith("bridge") for p in pieces)
            name = "embedding" if at == 0 else "bridge" + (f"_{bridges}" if bridges else "")
            pieces.append(_Piece(name, tuple(held)))
    return pieces


_Run = tuple[str | None, list[fx.Node]]


def _runs(nodes: Sequence[fx.Node], blocks: dict[fx.Node, str]) -> list[_Run]:
    runs: list[_Run] = []
    for node in nodes:
        path = blocks.get(node)
        if not runs or runs[-1][0] != path:
            runs.append((path, []))
        runs[-1][1].append(node)
    return runs


def _merge_interleaved(runs: list[_Run]) -> list[_Run]:
    """What lies between two runs of one block is part of that block."""
    merged: list[_Run] = []
    for path, held in runs:
        seen = [at for at, (other, _) in enumerate(merged) if other == path and path is not None]
        if seen:
            for _, between in merged[seen[0] + 1 :]:
                merged[seen[0]][1].extend(between)
            del merged[seen[0] + 1 :]
            merged[seen[0]][1].extend(held)
        else:
            merged.append((path, list(held)))
    return merged


def _absorb_glue(runs: list[_Run], heavy: frozenset[fx.Node]) -> list[_Run]:
    """Blocks without parameters join the one in front; glue between two blocks the one behind."""
    kept: list[_Run] = []
    glue: list[fx.Node] = []
    for at, (path, held) in enumerate(runs):
        light = heavy.isdisjoint(held)
        between = 0 < at < len(runs) - 1
        if path is None and between and light and _same_container(runs[at - 1], runs[at + 1]):
            glue = held
        elif path is not None and light and kept and kept[-1][0] is not None:
            kept[-1][1].extend([*glue, *held])
            glue = []
        else:
            kept.append((path, [*glue, *held]))
            glue = []
    return kept


def _same_container(a: _Run, b: _Run) -> bool:
    return (a[0] or "").rpartition(".")[0] == (b[0] or "").rpartition(".")[0]


def _tail(nodes: Sequence[fx.Node], heavy: frozenset[fx.Node]) -> list[_Piece]:
    """Final norm, then head and loss: divided in front of the last product with a parameter."""
    products = [at for at, n in enumerate(nodes) if n.target in _PRODUCTS and n in heavy]
    if not products or heavy.isdisjoint(nodes[: products[-1]]):
        return [_Piece("head" if products else "loss", tuple(nodes))]
    norm = tuple(nodes[: products[-1]])
    name = "norm" if len(products) == 1 else "transform"
    return [_Piece(name, norm), _Piece("head", tuple(nodes[products[-1] :]))]


# --- models without blocks ----------------------------------------------------------------------


def _balanced(graph: Graph, nodes: Sequence[fx.Node]) -> list[_Piece]:
    """A few layers of about equally many parameter elements, cut where one value crosses."""
    sizes = _parameter_elements(graph, nodes)
    total = sum(sizes)
    points = _cut_points(nodes)
    pieces: list[_Piece] = []
    start, behind = 0, 0.0
    for at in range(len(nodes)):
        behind += sizes[at]
        share = total * (len(pieces) + 1) / _BALANCED_LAYERS
        enough = sum(sizes[start : at + 1]) > 0 and behind >= share
        more = sum(sizes[at + 1 :]) > 0
        if at in points and enough and more and len(pieces) < _BALANCED_LAYERS - 1:
            pieces.append(_Piece(f"part_{len(pieces)}", tuple(nodes[start : at + 1])))
            start = at + 1
    pieces.append(_Piece(f"part_{len(pieces)}", tuple(nodes[start:])))
    return pieces


def _parameter_elements(graph: Graph, nodes: Sequence[fx.Node]) -> list[int]:
    seen: set[Any] = set()
    sizes = []
    for node in nodes:
        new = [s for s in node.all_input_nodes if s.target in graph.parameters and s not in seen]
        seen.update(new)
        sizes.append(sum(graph.parameters[str(s.target)].numel() for s in new))
    return sizes


def _cut_points(nodes: Sequence[fx.Node]) -> set[int]:
    """Positions behind which exactly one computed tensor is still needed."""
    place = {node: at for at, node in enumerate(nodes)}
    last_use = [
        max((place.get(user, at) for user in users_through_scalars(node)), default=at)
        for at, node in enumerate(nodes)
    ]
    alive: set[int] = set()
    points: set[int] = set()
    for at in range(len(nodes)):
        alive = {a for a in alive if last_use[a] > at}
        if last_use[at] > at:
            alive.add(at)
        single = len(alive) == 1 and isinstance(nodes[min(alive)].meta["val"], torch.Tensor)
        if single:
            points.add(at)
    return points
