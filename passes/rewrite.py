"""rewrite: LayeredGraph, Plan → StageProgram. Obeys the plan and decides nothing."""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping, Sequence

import torch
from torch import fx

from galvatron_compile.graph import LayeredGraph, copy_annotated, note, noted
from galvatron_compile.mesh import Mesh
from galvatron_compile.passes.normalise import retarget_devices
from galvatron_compile.passes.reshard import Layout, Resharder
from galvatron_compile.passes.rewrite_parts import LayerModules, Units, parameter_units
from galvatron_compile.passes.sharding.table import ShardingTable
from galvatron_compile.placement import R, S
from galvatron_compile.plans import Plan
from galvatron_compile.precision import Precision
from galvatron_compile.program import StageProgram
from galvatron_compile.seeds import layer_seed
from galvatron_compile.units import BackwardFence


def mesh_degrees(plan: Plan) -> list[int]:
    """Tensor-parallel degrees that the plan's program needs axes for.

    Besides the layers' own: that of a rank's share of the batch, and the least common multiple of
    degrees that do not divide each other, through which values pass from one to the other.
    """
    degrees = {strategy.tp for strategy in plan.strategies}
    degrees.add(plan.world_size // plan.data_size)
    degrees |= {math.lcm(a, b) for a in degrees for b in degrees}
    return sorted(degrees)


def rewrite(
    layered: LayeredGraph,
    plan: Plan,
    mesh: Mesh,
    shardings: ShardingTable,
    precision: Precision,
    device: torch.device,
) -> StageProgram:
    """Build the program of ``mesh.rank``: its graphs with collectives, its slice of parameters."""
    layers = LayerModules(layered, plan, mesh, shardings, device)
    units = parameter_units(layered, plan, mesh, layers, precision, device)
    builder = _Builder(layered, plan, mesh, layers, units, device)
    return StageProgram(
        module=builder.build(layers.training),
        evaluation=builder.build(layers.evaluation),
        plan=plan,
        mesh=mesh,
        units=units.ordered,
        denominators=_denominators(layered, builder.buffers, device),
        inputs=layered.graph.inputs,
        buffers=builder.buffers,
        tied=layered.graph.tied,
        layer_graphs=layers.graphs,
        remarks=layers.remarks,
        unloaded=frozenset(name for name, b in layered.graph.buffers.items() if b.is_meta),
    )


class _Builder:
    """Writes the outer graph: units, layers, fences, and conversions where the layout changes."""

    def __init__(
        self,
        layered: LayeredGraph,
        plan: Plan,
        mesh: Mesh,
        layers: LayerModules,
        units: Units,
        device: torch.device,
    ) -> None:
        self.layered, self.plan, self.mesh = layered, plan, mesh
        self.layers, self.units = layers, units
        self.buffers = {
            name: _on_device(value, device) for name, value in layered.graph.buffers.items()
        }

    def build(self, modules: Sequence[torch.nn.Module]) -> fx.GraphModule:
        root = torch.nn.Module()
        root.units = torch.nn.ModuleList(self.units.ordered)
        root.layers = torch.nn.ModuleList(modules)
        root.fences = torch.nn.ModuleDict()
        graph = fx.Graph()
        values = self._inputs(graph)
        seed = graph.placeholder("seed")
        resharder = Resharder(graph, root, self.mesh)
        last = len(self.layered.layers) - 1
        for index in range(last + 1):
            self._layer(index, graph, root, values, resharder, seed)
        graph.output((values[self.layered.loss][0],))
        program = fx.GraphModule(root, graph, class_name="StageProgram")
        program.graph.lint()
        return program

    def _inputs(self, graph: fx.Graph) -> dict[str, tuple[fx.Node, Layout]]:
        """A rank is given its share of the batch: as if a layer of that data degree had made it."""
        share = self.plan.world_size // self.plan.data_size
        inputs = self.layered.graph.inputs
        values: dict[str, tuple[fx.Node, Layout]] = {}
        for placeholder in self.layered.graph.module.graph.find_nodes(op="placeholder"):
            name = placeholder.name
            batch_dim = dict(zip(inputs.names, inputs.batch_dims, strict=True)).get(name)
            data = R if batch_dim is None else S(batch_dim)
            node = graph.placeholder(name)
            node.meta.update(placeholder.meta)
            values[name] = (node, Layout(share, R, data))
        return values

    def _layer(
        self,
        index: int,
        graph: fx.Graph,
        root: torch.nn.Module,
        values: dict[str, tuple[fx.Node, Layout]],
        resharder: Resharder,
        seed: fx.Node,
    ) -> None:
        layer = self.layered.layers[index]
        layer_class = self.layered.layer_class(layer)
        strategy, sharded = self.plan.strategies[index], self.layers.sharded[index]
        activations = [
            self._for_degree(
                resharder.convert(*values[name], Layout(strategy.tp, tensor, data)), strategy.dp
            )
            for name, tensor, data in zip(
                layer.inputs, sharded.inputs, layer_class.data_inputs, strict=True
            )
        ]
        parameters = self._parameters(index, graph)
        buffers = [self._buffer(name, graph, root) for name in layer.buffers]
        mine = graph.call_function(layer_seed, (seed, index, self.mesh.data(strategy.tp).index))
        called = graph.call_module(f"layers.{index}", (*activations, *parameters, *buffers, mine))
        called.meta["val"] = tuple(self._value(name) for name in layer.outputs)
        note(called, layer=layer.name, strategy=str(strategy))
        outputs = [
            graph.call_function(operator.getitem, (called, k)) for k in range(len(layer.outputs))
        ]
        outputs = self._fence(index, graph, root, outputs)
        for name, node, tensor, data in zip(
            layer.outputs, outputs, sharded.outputs, layer_class.data_outputs, strict=True
        ):
            node.meta["val"] = self._value(name)
            values[name] = (node, Layout(strategy.tp, tensor, data))

    def _for_degree(self, value: fx.Node, dp: int) -> fx.Node:
        """``value``, but the number of parts is that of a layer whose batch is cut in ``dp``."""
        if not noted(value, "counts_parts") or dp == self.plan.data_size:
            return value
        graph = value.graph
        return graph.call_function(operator.mul, (value, dp / self.plan.data_size))

    def _parameters(self, index: int, graph: fx.Graph) -> list[fx.Node]:
        tuples = {unit: graph.call_module(f"units.{unit}") for unit in self.units.of_layer[index]}
        for unit, node in tuples.items():
            note(node, parameters=self.units.ordered[unit].describe())
        places = [self.units.places[name] for name in self.layered.layers[index].parameters]
        return [graph.call_function(operator.getitem, (tuples[unit], k)) for unit, k in places]

    def _buffer(self, name: str, graph: fx.Graph, root: torch.nn.Module) -> fx.Node:
        attribute = "buffer_" + name.replace(".", "_")
        if not hasattr(root, attribute):
            root.register_buffer(attribute, self.buffers[name], persistent=False)
        return graph.get_attr(attribute)

    def _fence(
        self, index: int, graph: fx.Graph, root: torch.nn.Module, outputs: list[fx.Node]
    ) -> list[fx.Node]:
        own = [self.units.ordered[unit] for unit in self.units.of_layer[index]]
        gathered = [unit for unit in own if unit.zero == 3]
        if not gathered:
            return outputs
        fences = root.fences
        assert isinstance(fences, torch.nn.ModuleDict)
        fences[str(index)] = BackwardFence(gathered)
        called = graph.call_module(f"fences.{index}", tuple(outputs))
        note(called, zero3="frees the parameters here, gathers them again in backward")
        return [graph.call_function(operator.getitem, (called, k)) for k in range(len(outputs))]

    def _value(self, name: str) -> object:
        nodes = self.layered.graph.module.graph.nodes
        return next(node.meta.get("val") for node in nodes if node.name == name)


def _denominators(
    layered: LayeredGraph, buffers: Mapping[str, torch.Tensor], device: torch.device
) -> fx.GraphModule | None:
    """The weights' graph over the program's own buffers, so that it sees what is loaded."""
    if layered.graph.denominators is None:
        return None
    module = copy_annotated(layered.graph.denominators)
    for node in module.graph.find_nodes(op="get_attr"):
        path, _, name = str(node.target).rpartition(".")
        setattr(module.get_submodule(path), name, buffers[str(node.target)])
    retarget_devices(module, device)
    return module


def _on_device(value: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A copy of a buffer: a state that is loaded must not change the caller's model."""
    if value.is_meta:
        return torch.zeros(value.shape, dtype=value.dtype, device=device)
    return value.detach().to(device, copy=True)
