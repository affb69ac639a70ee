"""pieces: StageGraph → one PieceGraph a layer, and StageProgram → Outline."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import fx

from galvatron_compile.actions import LayerOutline, Outline, UnitOutline
from galvatron_compile.graph import noted
from galvatron_compile.pieces import Piece, PieceGraph
from galvatron_compile.program import StageGraph, StageProgram
from galvatron_compile.seeds import layer_seed


def pieces(program: StageProgram, stage: StageGraph) -> tuple[PieceGraph, ...]:
    """Cut the stage's graph behind every layer."""
    plan = program.plan
    made = [
        PieceGraph(
            layer=layer,
            name=plan.layers[layer],
            module=training.module(),
            evaluation=evaluation.module(),
            values=training.values,
            differentiable=training.differentiable,
            parameters=training.parameters,
            buffers=training.buffers,
            outputs=training.outputs,
            returns=training.returns,
            drops=(),
            seed=training.seed,
            recompute=plan.strategies[layer].recompute == "full",
            has_trained=any(
                program.units[u].layouts[k].requires_grad for u, k in training.parameters
            ),
        )
        for layer, training, evaluation in zip(
            stage.layers, _cut(stage.module), _cut(stage.evaluation), strict=True
        )
    ]
    return _with_drops(made, stage)


def _with_drops(made: Sequence[PieceGraph], stage: StageGraph) -> tuple[PieceGraph, ...]:
    kept = set(stage.sent_as)
    last = {name: place for place, piece in enumerate(made) for name in piece.values}
    return tuple(
        replace(
            piece,
            drops=tuple(n for n in piece.values if last[n] == place and n not in kept),
        )
        for place, piece in enumerate(made)
    )


def outline(program: StageProgram, found: Mapping[int, Piece]) -> Outline:
    """What the order of a rank's actions depends on. found: the pieces by layer."""
    units = [
        UnitOutline(
            name=unit.name,
            zero=unit.zero,
            trainable=any(layout.requires_grad for layout in unit.layouts),
            shared=unit.shared,
            gathers=unit.gathers,
            varying=unit.tensor.size > 1 and any(x.tensor.kind == "V" for x in unit.layouts),
            tied=unit.tied is not None,
        )
        for unit in program.units
    ]
    layers = {
        layer: LayerOutline(
            piece.graph.name,
            piece.graph.units,
            recompute=piece.graph.recompute,
            differentiable=piece.graph.trains,
            weights_for_weights=piece.weights_for_weights,
        )
        for layer, piece in found.items()
    }
    plan = program.plan
    return Outline(
        chunks=tuple(stage.layers for stage in program.stages),
        layers=layers,
        units=tuple(units),
        num_micro_batches=plan.num_micro_batches,
        schedule=plan.schedule,
        pp=plan.pp,
        group=program.mesh.group,
    )


class _Cut:
    """Collects the nodes of one piece."""

    def __init__(self, root: fx.GraphModule) -> None:
        self.root = root
        self.nodes: list[fx.Node] = []
        self.values: tuple[str, ...] = ()
        self.differentiable: tuple[bool, ...] = ()
        self.parameters: tuple[tuple[int, int], ...] = ()
        self.buffers: tuple[Any, ...] = ()
        self.outputs: tuple[str, ...] = ()
        self.returns: tuple[bool, ...] = ()
        self.seed = (0, 0)

    def finish(self, used_later: set[fx.Node], differentiable: Mapping[fx.Node, bool]) -> None:
        inside = set(self.nodes)
        outside = dict.fromkeys(
            source
            for node in self.nodes
            for source in node.all_input_nodes
            if source not in inside and source.op != "get_attr"
        )
        self.arguments = [node for node in outside if not _is_seed(node)]
        self.values = tuple(node.name for node in self.arguments)
        self.differentiable = tuple(differentiable[node] for node in self.arguments)
        results = [node for node in self.nodes if node in used_later]
        self.results = results
        self.outputs = tuple(node.name for node in results)
        self.returns = tuple(differentiable[node] for node in results)

    def module(self) -> fx.GraphModule:
        graph = fx.Graph()
        copies = {node: graph.placeholder(node.name) for node in self.arguments}
        lifted: dict[Any, fx.Node] = {
            place: graph.placeholder(f"parameter_{place[0]}_{place[1]}")
            for place in self.parameters
        }
        lifted |= {
            id(buffer): graph.placeholder(f"buffer_{number}")
            for number, buffer in enumerate(self.buffers)
        }
        seed = graph.placeholder("seed")
        for node in self.nodes:
            if place := _parameter(node):
                copies[node] = lifted[place]
            elif node.target is layer_seed:
                copies[node] = seed
            elif not _is_unit(node):
                for source in node.all_input_nodes:
                    if source.op == "get_attr" and source not in copies:
                        value = _attribute(self.root, source)
                        copies[source] = lifted.get(id(value)) or graph.node_copy(source)
                copies[node] = graph.node_copy(node, lambda argument: copies[argument])
        graph.output(tuple(copies[node] for node in self.results))
        return fx.GraphModule(self.root, graph, class_name="Piece")


def _cut(root: fx.GraphModule) -> list[_Cut]:
    cuts: list[_Cut] = []
    differentiable: dict[fx.Node, bool] = {}
    current = _Cut(root)
    for node in root.graph.nodes:
        flagged = noted(node, "differentiable")
        sources = (differentiable.get(source, False) for source in node.all_input_nodes)
        differentiable[node] = any(sources) if flagged is None else bool(flagged)
        if node.op in ("placeholder", "output", "get_attr"):
            continue
        current.nodes.append(node)
        if node.target is layer_seed:
            current.seed = node.args[1:]
        following = node.next
        closed = any(str(n.target).startswith("layers.") for n in current.nodes)
        inside = following.all_input_nodes and following.all_input_nodes[0] in current.nodes
        if closed and not (inside and _is_item(following)):
            cuts.append(current)
            current = _Cut(root)
    for number, cut in enumerate(cuts):
        later = {n for other in cuts[number + 1 :] for x in other.nodes for n in x.all_input_nodes}
        later |= set(root.graph.output_node().all_input_nodes)
        places = [place for node in cut.nodes if (place := _parameter(node))]
        cut.parameters = tuple(dict.fromkeys(places))
        cut.buffers = _buffers(root, cut)
        cut.finish(later, differentiable)
    return cuts


def _buffers(root: fx.GraphModule, cut: _Cut) -> tuple[Any, ...]:
    found = {
        id(value): value
        for node in cut.nodes
        for source in node.all_input_nodes
        if source.op == "get_attr" and str(source.target).startswith("buffer_")
        for value in [_attribute(root, source)]
    }
    return tuple(found.values())


def _attribute(root: fx.GraphModule, node: fx.Node) -> Any:
    return getattr(root, str(node.target))


def _is_unit(node: fx.Node) -> bool:
    return node.op == "call_module" and str(node.target).startswith("units.")


def _is_seed(node: fx.Node) -> bool:
    return node.op == "placeholder" and node.target == "seed"


def _is_item(node: fx.Node) -> bool:
    return node.op == "call_function" and getattr(node.target, "__name__", "") == "getitem"


def _parameter(node: fx.Node) -> tuple[int, int] | None:
    """Unit and place, if the node takes a parameter from its unit."""
    if not _is_item(node) or not isinstance(node.args[0], fx.Node) or not _is_unit(node.args[0]):
        return None
    return int(str(node.args[0].target).split(".")[1]), int(node.args[1])  # type: ignore[call-overload, arg-type]
