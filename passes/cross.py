"""Which values cross the cuts between pipeline stages, and which are made again behind them.

A value that no parameter and no random number goes into (a mask, positions, rotary tables) is
computed again where it is used: it costs little, and nothing has to travel. Everything else goes
from neighbour to neighbour until its last use.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from torch import fx

from galvatron_compile.graph import LayeredGraph, noted
from galvatron_compile.operators import is_random
from galvatron_compile.plans import Plan, Stage


@dataclass(frozen=True)
class Cuts:
    """Where the values of a layered graph are made and used under a plan's stages."""

    layered: LayeredGraph
    plan: Plan

    @cached_property
    def stages(self) -> tuple[Stage, ...]:
        return self.plan.stages or (Stage(0, len(self.layered.layers)),)

    @cached_property
    def made_by(self) -> Mapping[str, tuple[int, int]]:
        """Value -> (layer, place among its outputs)."""
        return {
            name: (number, place)
            for number, layer in enumerate(self.layered.layers)
            for place, name in enumerate(layer.outputs)
        }

    @cached_property
    def nodes(self) -> Mapping[str, fx.Node]:
        return {node.name: node for node in self.layered.graph.module.graph.nodes}

    def is_differentiable(self, name: str) -> bool:
        return bool(noted(self.nodes[name], "differentiable", False))

    def stage_of(self, layer: int) -> int:
        return next(s for s, stage in enumerate(self.stages) if stage.first <= layer < stage.last)

    def received(self, stage: int) -> tuple[str, ...]:
        """What comes over the cut before ``stage``: values made before, used there or later."""
        first = self.stages[stage].first
        later = dict.fromkeys(
            name for layer in self.layered.layers[first:] for name in layer.inputs
        )
        return tuple(
            name
            for name in later
            if name in self.made_by and self.made_by[name][0] < first and not self.remade(name)
        )

    def remade(self, name: str) -> bool:
        """Whether a value can be computed from the batch and buffers alone."""
        if name not in self.made_by:
            return True  # the batch itself
        return self._remakes[name] is not None

    @cached_property
    def _remakes(self) -> Mapping[str, tuple[str, ...] | None]:
        """For every value the values that it is computed from; None if it cannot be made again."""
        found: dict[str, tuple[str, ...] | None] = {}
        for layer in self.layered.layers:
            graph = self.layered.layer_class(layer).graph
            kinds = self.layered.layer_class(layer).kinds
            places = list(graph.graph.find_nodes(op="placeholder"))
            activations = dict(zip(places, layer.inputs, strict=False))
            parameters = {p for p, kind in zip(places, kinds, strict=True) if kind == "parameter"}
            for name, node in zip(layer.outputs, results(graph), strict=True):
                sources = ancestors(node)
                needed = tuple(activations[p] for p in activations if p in sources)
                possible = (
                    not self.is_differentiable(name)
                    and not sources & parameters
                    and not any(is_random(source) for source in sources)
                    and all(n not in self.made_by or found[n] is not None for n in needed)
                )
                found[name] = needed if possible else None
        return found

    def sources(self, name: str) -> tuple[str, ...]:
        """What a value that is made again is computed from, in its layer."""
        return self._remakes[name] or ()


def results(graph: fx.GraphModule) -> list[fx.Node]:
    return list(graph.graph.output_node().args[0])  # type: ignore[arg-type]


def ancestors(node: fx.Node) -> set[fx.Node]:
    """The node and all that it is computed from."""
    found: set[fx.Node] = set()
    todo = [node]
    while todo:
        current = todo.pop()
        if current not in found:
            found.add(current)
            todo += current.all_input_nodes
    return found


def only(graph: fx.GraphModule, outputs: Sequence[int]) -> tuple[fx.GraphModule, list[int]]:
    """The part of a layer's graph that computes some outputs, and which inputs that part takes."""
    wanted = [results(graph)[place] for place in outputs]
    needed = set[fx.Node]().union(*map(ancestors, wanted))
    made = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    taken = []
    for place, node in enumerate(graph.graph.find_nodes(op="placeholder")):
        if node in needed:
            taken.append(place)
    for node in graph.graph.nodes:
        if node in needed:
            copies[node] = made.node_copy(node, lambda argument: copies[argument])
    made.output(tuple(copies[node] for node in wanted))
    return fx.GraphModule(graph, made, class_name="Remade"), taken
