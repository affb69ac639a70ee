"""What the outer graph of a stage program calls: a module per layer, and the parameter units."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import fx

from galvatron_compile.errors import PlanError
from galvatron_compile.graph import Layer, LayeredGraph
from galvatron_compile.layout import ParameterLayout
from galvatron_compile.mesh import Mesh
from galvatron_compile.operators import without_dropout
from galvatron_compile.passes.normalise import retarget_devices
from galvatron_compile.passes.sharding import ShardedLayer, localise
from galvatron_compile.passes.sharding.apply import gather_batch
from galvatron_compile.passes.sharding.table import ShardingTable
from galvatron_compile.plans import Plan
from galvatron_compile.precision import Precision
from galvatron_compile.strategy import Strategy
from galvatron_compile.units import ParameterUnit


class LayerModules:
    """One graph per (class, tp, sp, dp) of the plan; ``training[i]`` is that of layer i."""

    def __init__(
        self,
        layered: LayeredGraph,
        plan: Plan,
        mesh: Mesh,
        shardings: ShardingTable,
        device: torch.device,
    ) -> None:
        self.sharded: list[ShardedLayer] = []
        self.graphs: dict[str, fx.GraphModule] = {}
        self.training: list[fx.GraphModule] = []
        self.evaluation: list[fx.GraphModule] = []
        evaluation: dict[str, fx.GraphModule] = {}
        remarks: dict[str, None] = {}
        for layer, strategy in zip(layered.layers, plan.strategies, strict=True):
            sharded = shardings.get(layer.class_index, strategy)
            name = _graph_name(layered.layer_class(layer).name, strategy)
            if name not in self.graphs:
                graph = localise(sharded, mesh.tensor(strategy.tp))
                retarget_devices(graph, device)
                self.graphs[name] = gather_batch(graph, mesh.data(strategy.tp))
                evaluation[name] = without_dropout(self.graphs[name])
            self.sharded.append(sharded)
            self.training.append(self.graphs[name])
            self.evaluation.append(evaluation[name])
            remarks |= dict.fromkeys(sharded.remarks)
        self.remarks = tuple(remarks)


def _graph_name(class_name: str, strategy: Strategy) -> str:
    parallel = f"tp{strategy.tp}" + (".sp" if strategy.sequence_parallel else "")
    return f"{class_name} {parallel}.dp{strategy.dp}"


@dataclass(frozen=True)
class Units:
    """The parameter units of one rank in order of first use, and where its layers find theirs."""

    ordered: tuple[ParameterUnit, ...]
    of_layer: Mapping[int, tuple[int, ...]]  # layer -> unit numbers that it calls
    places: Mapping[str, tuple[int, int]]  # parameter name -> (unit number, index in the unit)


Layouts = dict[str, tuple[int, ParameterLayout]]


def parameter_units(
    layered: LayeredGraph,
    plan: Plan,
    mesh: Mesh,
    layers: LayerModules,
    precision: Precision,
    device: torch.device,
    tied: Mapping[str, tuple[int, ...]],
) -> tuple[Units, Layouts]:
    """This rank's units, and of every parameter of the model its owner group and layout there."""
    layouts: Layouts = {}
    mine: Units | None = None
    for group in range(plan.pp):
        collector = _Collector(layered, plan, layers, plan.group_layers(group), tied)
        if group == mesh.group:
            mine = collector.units(mesh, precision, device)
        for layout in collector.layouts.values():
            layouts.setdefault(layout.name, (group, layout))
    assert mine is not None
    order = [name for layer in layered.layers for name in layer.parameters]
    return mine, {name: layouts[name] for name in dict.fromkeys(order)}


class _Collector:
    """Which parameters of one pipeline group belong together.

    A layer's own parameters are one unit; those that several layers of the group share another;
    one that other groups hold too is a unit by itself, alike in all of them.
    """

    def __init__(
        self,
        layered: LayeredGraph,
        plan: Plan,
        layers: LayerModules,
        numbers: Sequence[int],
        tied: Mapping[str, tuple[int, ...]],
    ) -> None:
        self.layered, self.plan, self.numbers, self.tied = layered, plan, numbers, tied
        self.layouts: dict[str, ParameterLayout] = {}
        uses = Counter(n for i in numbers for n in dict.fromkeys(layered.layers[i].parameters))
        self.members: list[tuple[int, str, list[str], bool]] = []  # layer, unit, names, shared
        for index in numbers:
            layer = layered.layers[index]
            self._check_tied(index)
            new = [n for n in dict.fromkeys(layer.parameters) if n not in self.layouts]
            strategy, sharded = plan.strategies[index], layers.sharded[index]
            made = _layouts(layered, layer, new, sharded, strategy)
            self.layouts |= {layout.name: layout for layout in made}
            apart = {n: f"{n} (tied across stages)" for n in new if n in tied}
            shared = {n: f"{layer.name} (shared)" for n in new if uses[n] > 1}
            titles = {n: apart.get(n) or shared.get(n) or layer.name for n in new}
            for title in sorted(set(titles.values()), key=lambda t: (t != layer.name, t)):
                names = [n for n in new if titles[n] == title]
                self.members.append((index, title, names, uses[names[0]] > 1))

    def _check_tied(self, index: int) -> None:
        """What layers of one group share lies in one way there."""
        plan, mine = self.plan, set(self.layered.layers[index].parameters)
        for other in self.numbers[: self.numbers.index(index)]:
            shared = mine & set(self.layered.layers[other].parameters)
            if shared and plan.strategies[other] != plan.strategies[index]:
                raise PlanError(
                    f"layers {plan.layers[other]!r} ({plan.strategies[other]}) and "
                    f"{plan.layers[index]!r} ({plan.strategies[index]}) share {min(shared)} on the "
                    "same ranks; give them one strategy, or cut the stages between them"
                )

    def units(self, mesh: Mesh, precision: Precision, device: torch.device) -> Units:
        ordered: list[ParameterUnit] = []
        places: dict[str, tuple[int, int]] = {}
        for index, title, names, shared in self.members:
            strategy = self.plan.strategies[index]
            holders = self.tied.get(names[0])
            unit = ParameterUnit(
                title,
                [self.layouts[name] for name in names],
                [self.layered.graph.parameters[name] for name in names],
                data=mesh.data(strategy.tp),
                tensor=mesh.tensor(strategy.tp),
                precision=precision,
                device=device,
                shared=shared,
                tied=mesh.tied[holders] if holders else None,
            )
            places |= {name: (len(ordered), place) for place, name in enumerate(names)}
            ordered.append(unit)
        of_layer = {
            i: tuple(dict.fromkeys(places[n][0] for n in self.layered.layers[i].parameters))
            for i in self.numbers
        }
        return Units(tuple(ordered), of_layer, places)


def _layouts(
    layered: LayeredGraph,
    layer: Layer,
    names: Sequence[str],
    sharded: ShardedLayer,
    strategy: Strategy,
) -> list[ParameterLayout]:
    placements = dict(zip(layer.parameters, sharded.parameters, strict=True))
    parameters = layered.graph.parameters
    return [
        ParameterLayout(
            name=name,
            shape=tuple(parameters[name].shape),
            tensor=placements[name],
            tp=strategy.tp,
            dp=strategy.dp,
            zero=strategy.zero,
            requires_grad=parameters[name].requires_grad,
        )
        for name in names
    ]
