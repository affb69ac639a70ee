"""shard: LayeredGraph → ShardingTable, the tensor-parallel form of every class at every degree."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import networkx

from galvatron_compile.errors import ShapeError, UnsupportedError
from galvatron_compile.graph import LayeredGraph
from galvatron_compile.passes.sharding.sharded_layer import ShardedLayer
from galvatron_compile.passes.sharding.tied import shard_layers
from galvatron_compile.strategy import Strategy

Key = tuple[int, int, bool]  # class index, tensor-parallel degree, sequence parallel


@dataclass(frozen=True)
class ShardingTable:
    """forms: how a class runs on tp ranks. illegal: why a form is missing.

    tied: groups of layer indices that share a parameter and so must share a strategy.
    """

    forms: Mapping[Key, ShardedLayer]
    illegal: Mapping[Key, str]
    tied: tuple[tuple[int, ...], ...]

    def get(self, class_index: int, strategy: Strategy) -> ShardedLayer:
        """The form a strategy needs. Raises UnsupportedError with the reason if there is none."""
        key = (class_index, strategy.tp, strategy.sequence_parallel)
        if key not in self.forms:
            why = self.illegal.get(key, "it was not among the strategies considered")
            raise UnsupportedError(
                f"strategy {strategy} is not possible for layer class {class_index}: {why}"
            )
        return self.forms[key]

    def why_not(self, class_index: int, strategy: Strategy) -> str | None:
        return self.illegal.get((class_index, strategy.tp, strategy.sequence_parallel))


def shard(layered: LayeredGraph, strategies: Iterable[Strategy]) -> ShardingTable:
    """Solve every (class, tp, sequence parallel) that the strategies need.

    A tensor-parallel degree that splits no parameter anywhere in the model is illegal: it would
    only repeat the same work on every rank.
    """
    tied = tied_layers(layered)
    forms: dict[Key, ShardedLayer] = {}
    illegal: dict[Key, str] = {}
    for tp, sp in sorted({(s.tp, s.sequence_parallel) for s in strategies}):
        for group in _class_groups(layered, tied):
            keys = [(index, tp, sp) for index in group]
            try:
                forms |= zip(keys, shard_layers(layered, group, tp, sp), strict=True)
            except (ShapeError, UnsupportedError) as error:
                illegal |= dict.fromkeys(keys, str(error))
        _forbid_useless(tp, sp, forms, illegal)
    return ShardingTable(forms, illegal, tied)


def _forbid_useless(
    tp: int, sp: bool, forms: dict[Key, ShardedLayer], illegal: dict[Key, str]
) -> None:
    mine = [key for key in forms if key[1:] == (tp, sp)]
    splits = any(place.is_shard for key in mine for place in forms[key].parameters)
    if tp > 1 and not splits:
        reason = (
            f"tp{tp} splits no parameter of this model (heads, hidden sizes and vocabulary must "
            f"divide by {tp}); choose a degree that divides them"
        )
        for key in mine:
            del forms[key]
            illegal[key] = reason


def tied_layers(layered: LayeredGraph) -> tuple[tuple[int, ...], ...]:
    """Groups of layers connected by parameters that they share, each group in layer order."""
    graph = networkx.Graph()
    first: dict[str, int] = {}
    for index, layer in enumerate(layered.layers):
        for name in layer.parameters:
            if first.setdefault(name, index) != index:
                graph.add_edge(first[name], index)
    groups = (tuple(sorted(group)) for group in networkx.connected_components(graph))
    return tuple(sorted(groups))


def _class_groups(
    layered: LayeredGraph, tied: tuple[tuple[int, ...], ...]
) -> list[tuple[int, ...]]:
    """Classes that must be solved together since their layers share a parameter, then the rest."""
    graph = networkx.Graph()
    graph.add_nodes_from(range(len(layered.classes)))
    for group in tied:
        indices = [layered.layers[layer].class_index for layer in group]
        networkx.add_path(graph, indices)
    return sorted(tuple(sorted(group)) for group in networkx.connected_components(graph))


