"""What the outer graph of a stage program calls: a module per layer, and the parameter units."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import fx

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
from galvatron_compile.units import ParameterUnit, Recompute


class LayerModules:
    """One graph per (class, tp, sp, dp) of the plan, and one module per layer around it."""

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
        self.training: list[torch.nn.Module] = []
        self.evaluation: list[torch.nn.Module] = []
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
            graph = self.graphs[name]
            self.sharded.append(sharded)
            self.training.append(Recompute(graph) if strategy.recompute == "full" else graph)
            self.evaluation.append(evaluation[name])
            remarks |= dict.fromkeys(sharded.remarks)
        self.remarks = tuple(remarks)


def _graph_name(class_name: str, strategy: Strategy) -> str:
    parallel = f"tp{strategy.tp}" + (".sp" if strategy.sequence_parallel else "")
    return f"{class_name} {parallel}.dp{strategy.dp}"


@dataclass(frozen=True)
class Units:
    """The parameter units in order of first use, and where each layer finds its parameters."""

    ordered: tuple[ParameterUnit, ...]
    of_layer: tuple[tuple[int, ...], ...]  # unit numbers that layer i calls
    places: Mapping[str, tuple[int, int]]  # parameter name -> (unit number, index in the unit)


def parameter_units(
    layered: LayeredGraph,
    plan: Plan,
    mesh: Mesh,
    layers: LayerModules,
    precision: Precision,
    device: torch.device,
) -> Units:
    uses = Counter(name for layer in layered.layers for name in dict.fromkeys(layer.parameters))
    units: list[ParameterUnit] = []
    of_layer: list[tuple[int, ...]] = []
    places: dict[str, tuple[int, int]] = {}
    for index, layer in enumerate(layered.layers):
        new = [name for name in dict.fromkeys(layer.parameters) if name not in places]
        for shared in (False, True):
            names = [name for name in new if (uses[name] > 1) == shared]
            if names:
                strategy = plan.strategies[index]
                layouts = _layouts(layered, layer, names, layers.sharded[index], strategy)
                values = [layered.graph.parameters[name] for name in names]
                unit = ParameterUnit(
                    layer.name + (" (shared)" if shared else ""),
                    layouts,
                    values,
                    data=mesh.data(strategy.tp),
                    tensor=mesh.tensor(strategy.tp),
                    precision=precision,
                    device=device,
                    shared=shared,
                )
                places |= {name: (len(units), place) for place, name in enumerate(names)}
                units.append(unit)
        of_layer.append(tuple(dict.fromkeys(places[name][0] for name in layer.parameters)))
    return Units(tuple(units), tuple(of_layer), places)


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
