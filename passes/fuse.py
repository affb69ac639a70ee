"""fuse: StageProgram → StageProgram, with operators and collectives that are one kernel together.

It finds patterns in the rewritten graphs of the layers, replaces those that the cost model expects
to gain, and tells what it replaced, what it declined, and why.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import fx

from galvatron_compile import collectives
from galvatron_compile.cluster import ClusterProfile
from galvatron_compile.fusions import Fusion, Fusions
from galvatron_compile.graph import copy_annotated
from galvatron_compile.passes.fuse_match import (
    Match,
    Node,
    is_op,
    read_outside,
    reads_itself,
    val,
)
from galvatron_compile.passes.fuse_overlap import near_miss, overlapping
from galvatron_compile.passes.fuse_patterns import experts, streaming
from galvatron_compile.passes.fuse_prices import Prices
from galvatron_compile.program import StageGraph, StageProgram

Wish = Literal["auto", "always", "never"]


def fuse(
    program: StageProgram, cluster: ClusterProfile | None, wish: Wish = "auto"
) -> tuple[StageProgram, Fusions]:
    """Graphs with the operators of :mod:`galvatron_compile.fused` in them.

    cluster: what the cost model asks; needed for "auto". wish: "always" replaces whatever can be,
        also where no kernel runs and the operators compute the same in PyTorch; "never" nothing.
    """
    if wish == "never":
        return program, Fusions()
    prices = Prices.of(program, cluster, wish)
    made: dict[int, tuple[fx.GraphModule, tuple[Fusion, ...]]] = {}
    found: dict[int, tuple[list[str], tuple[Fusion, ...]]] = {}

    def fused(module: fx.GraphModule, name: str | None) -> fx.GraphModule:
        if id(module) not in made:
            made[id(module)] = fuse_graph(module, prices)
        graph, fusions = made[id(module)]
        if name is not None:
            found.setdefault(id(module), ([], fusions))[0].append(name)
        return graph

    names = list(program.plan.layers)
    stages = tuple(_stage(stage, fused, names) for stage in program.stages)
    graphs = {name: fused(graph, None) for name, graph in program.layer_graphs.items()}
    report = Fusions(tuple((tuple(layers), each) for layers, each in found.values()))
    return replace(program, stages=stages, layer_graphs=graphs), report


Fused = Callable[[fx.GraphModule, str | None], fx.GraphModule]


def _stage(stage: StageGraph, fused: Fused, names: list[str]) -> StageGraph:
    """The stage with other graphs in the places of its layers'."""
    changed = []
    for module, is_training in ((stage.module, True), (stage.evaluation, False)):
        copied = copy_annotated(module)
        layers = copied.get_submodule("layers")
        for key, layer in list(layers._modules.items()):  # children() leaves out shared ones
            assert isinstance(layer, fx.GraphModule)
            layers.add_module(key, fused(layer, names[int(key)] if is_training else None))
        changed.append(copied)
    return replace(stage, module=changed[0], evaluation=changed[1])


def fuse_graph(
    module: fx.GraphModule, prices: Prices
) -> tuple[fx.GraphModule, tuple[Fusion, ...]]:
    """One layer's graph, and what was found in it."""
    module = copy_annotated(module)
    fusions = []
    became: dict[Node, Node] = {}
    for match, impossible in list(_found(module.graph)):
        why_not, saves_ms = (impossible, None) if impossible else prices.judge(match)
        covers = tuple(node.name for node in match.covers)
        fusions.append(Fusion(match.name, covers, why_not, saves_ms))
        if not why_not:
            became |= _replace(module.graph, match, became)
    module.graph.lint()
    module.recompile()
    return module, tuple(fusions)


def _found(graph: fx.Graph) -> Iterator[tuple[Match, str]]:
    """Matches that share no node, in order, with the reason where one cannot be replaced.

    Those that end later go first: a norm takes the addition in front of it.
    """
    taken: set[Node] = set()
    found: list[tuple[Match, str]] = []
    for node in reversed(graph.nodes):
        if node in taken:
            continue
        free = [
            match
            for match in (*streaming(node), *overlapping(node))
            if taken.isdisjoint(match.covers) and not reads_itself(match)
        ]
        whole = next((match for match in free if not read_outside(match)), None)
        if whole is not None:
            taken |= set(whole.covers)
            found.append((whole, ""))
        elif free:
            found.append((free[-1], f"{read_outside(free[-1])} is read elsewhere too"))
        elif (missed := near_miss(node) or experts(node)) is not None:
            found.append(missed)
    yield from reversed(found)


def _replace(graph: fx.Graph, match: Match, became: Mapping[Node, Node]) -> dict[Node, Node]:
    """Put the call in; returns what stands for its outputs now. ``became``: for those of others."""
    args = _now(match.args, became)
    with graph.inserting_before(match.at):
        if match.converted is not None:
            value, axis = _now(match.converted, became)
            turned = graph.call_function(collectives.all_reduce_gradient, (value, axis))
            turned.meta = _meta(value, val(value))
            args = _now(args, {value: turned})
        if match.viewed is not None:
            value, view = _now(match.viewed, became)
            viewed = graph.call_function(torch.ops.aten.reshape.default, (value, *view.args[1:]))
            viewed.meta = _meta(view, val(view).to(val(value).dtype))
            args = _now(args, {value: viewed})
        call = graph.call_function(match.target, args)
        results = [call]
        if len(match.outputs) > 1 or match.several:
            call.meta = _meta(match.outputs[0], tuple(val(node) for node in match.outputs))
            places = range(len(match.outputs))
            results = [graph.call_function(operator.getitem, (call, place)) for place in places]
        for result, node in zip(results, match.outputs, strict=True):
            result.meta = _meta(node, val(node))
    for result, node in zip(results, match.outputs, strict=True):
        node.replace_all_uses_with(result, delete_user_cb=lambda user: user not in match.covers)
        if match.several and len(results) > 1:
            _reshape_views(result)
    for node in reversed(match.covers):
        graph.erase_node(node)
    return dict(zip(match.outputs, results, strict=True))


# What may still look at the memory of a value, which is a part of a wider matrix now.
_LOOKS = (
    "view", "transpose", "permute", "t", "unsqueeze", "squeeze", "slice", "select", "unflatten",
    "chunk", "split", "split_with_sizes", "unbind",
)  # fmt: skip


def _reshape_views(node: Node) -> None:
    """Views that need whole rows one behind the other copy where these are not."""
    for user in node.users:
        if is_op(user, *_LOOKS) or user.target is operator.getitem:
            _reshape_views(user)
            if is_op(user, "view"):
                user.target = torch.ops.aten.reshape.default


def _now(args: tuple[Any, ...], became: Mapping[Node, Node]) -> tuple[Any, ...]:
    """Arguments with nodes that are gone replaced by what stands for them."""
    found: tuple[Any, ...] = fx.map_arg(args, lambda node: became.get(node, node))
    return found


def _meta(node: Node, value: Any) -> dict[str, Any]:
    return {**node.meta, "val": value}
