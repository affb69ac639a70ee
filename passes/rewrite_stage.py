"""Writes the graph of one pipeline stage: layers, and conversions where the layout changes."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence

import torch
from torch import fx

from galvatron_compile.graph import note, noted
from galvatron_compile.mesh import Mesh
from galvatron_compile.passes.cross import Cuts, only
from galvatron_compile.passes.reshard import Layout, Resharder
from galvatron_compile.passes.rewrite_parts import LayerModules, Units
from galvatron_compile.placement import R, S
from galvatron_compile.seeds import layer_seed

Values = dict[str, tuple[fx.Node, Layout]]


class StageBuilder:
    """Builds stages of one rank; the parts that they call are made already."""

    def __init__(
        self,
        cuts: Cuts,
        mesh: Mesh,
        layers: LayerModules,
        units: Units,
        buffers: Mapping[str, torch.Tensor],
    ) -> None:
        self.cuts, self.layered, self.plan, self.mesh = cuts, cuts.layered, cuts.plan, mesh
        self.layers, self.units, self.buffers = layers, units, buffers

    def build(
        self,
        stage: int,
        received: Sequence[str],
        sent: Sequence[str],
        modules: Sequence[fx.GraphModule],
    ) -> fx.GraphModule:
        """The graph of ``stage``; see :class:`~galvatron_compile.program.StageGraph`."""
        return _Stage(self, modules).run(stage, received, sent)


class _Stage:
    def __init__(self, builder: StageBuilder, modules: Sequence[fx.GraphModule]) -> None:
        self.made, self.modules = builder, modules
        self.cuts, self.plan, self.mesh = builder.cuts, builder.plan, builder.mesh
        self.layered, self.layers = builder.layered, builder.layers
        self.root = torch.nn.Module()
        self.root.units = torch.nn.ModuleList(builder.units.ordered)
        self.root.layers = torch.nn.Module()
        self.root.remade = torch.nn.Module()
        self.graph = fx.Graph()
        self.values: Values = {}

    def run(self, stage: int, received: Sequence[str], sent: Sequence[str]) -> fx.GraphModule:
        self._inputs()
        for name in received:
            number, _ = self.cuts.made_by[name]
            node = self.graph.placeholder(name)
            self._value(name, node, self._layout(name), self.plan.strategies[number].tp)
        self.seed = self.graph.placeholder("seed")
        self.resharder = Resharder(self.graph, self.root, self.mesh)
        span = self.cuts.stages[stage]
        for index in range(span.first, span.last):
            self._layer(index)
        outputs = sent if stage + 1 < self.plan.num_stages else [self.layered.loss]
        self.graph.output(tuple(self.values[name][0] for name in outputs))
        program = fx.GraphModule(self.root, self.graph, class_name="StageProgram")
        program.graph.lint()
        return program

    def _inputs(self) -> None:
        """A rank is given its share of the batch: as if a layer of that data degree had made it."""
        share = self.mesh.group_size // self.plan.data_size
        inputs = self.layered.graph.inputs
        batch_dims = dict(zip(inputs.names, inputs.batch_dims, strict=True))
        for placeholder in self.layered.graph.module.graph.find_nodes(op="placeholder"):
            batch_dim = batch_dims.get(placeholder.name)
            data = R if batch_dim is None else S(batch_dim)
            node = self.graph.placeholder(placeholder.name)
            node.meta.update(placeholder.meta)
            self.values[placeholder.name] = (node, Layout(share, R, data))

    def _layout(self, name: str) -> Layout:
        """How the layer that makes a value leaves it."""
        number, place = self.cuts.made_by[name]
        layer_class = self.layered.layer_class(self.layered.layers[number])
        tensor = self.layers.sharded[number].outputs[place]
        return Layout(
            self.plan.strategies[number].tp, tensor, layer_class.data_outputs[place]
        )

    def _value(self, name: str, node: fx.Node, layout: Layout, tp: int) -> None:
        node.meta["val"] = self.cuts.nodes[name].meta.get("val")
        note(node, differentiable=self.cuts.is_differentiable(name))
        self.values[name] = (node, layout)

    def _layer(self, index: int) -> None:
        layer = self.layered.layers[index]
        parameters = self._parameters(index)
        strategy = self.plan.strategies[index]
        key = str(index)
        self.root.get_submodule("layers").add_module(key, self.modules[index])
        arguments = (*self._activations(index), *parameters, *self._buffers(index))
        data_index = self.mesh.data(strategy.tp).index
        mine = self.graph.call_function(layer_seed, (self.seed, index, data_index))
        called = self.graph.call_module(f"layers.{key}", (*arguments, mine))
        called.meta["val"] = tuple(self.cuts.nodes[name].meta.get("val") for name in layer.outputs)
        note(called, layer=layer.name, strategy=str(strategy))
        for place, name in enumerate(layer.outputs):
            node = self.graph.call_function(operator.getitem, (called, place))
            self._value(name, node, self._layout(name), strategy.tp)

    def _activations(self, index: int, places: Sequence[int] | None = None) -> list[fx.Node]:
        """The inputs of a layer (those at ``places``) as it wants them."""
        layer, sharded = self.layered.layers[index], self.layers.sharded[index]
        data_inputs = self.layered.layer_class(layer).data_inputs
        strategy = self.plan.strategies[index]
        found = []
        for place in range(len(layer.inputs)) if places is None else places:
            wanted = Layout(strategy.tp, sharded.inputs[place], data_inputs[place])
            value = self.resharder.convert(*self._found(layer.inputs[place]), wanted)
            found.append(self._for_degree(value, strategy.dp))
        return found

    def _found(self, name: str) -> tuple[fx.Node, Layout]:
        if name not in self.values:
            self._remake(name)
        return self.values[name]

    def _remake(self, name: str) -> None:
        """Compute a value of an earlier stage again, as its layer would."""
        number, place = self.cuts.made_by[name]
        layer = self.layered.layers[number]
        graph, taken = only(self.modules[number], [place])
        num_activations = len(layer.inputs)
        activations = self._activations(number, [at for at in taken if at < num_activations])
        first_buffer = num_activations + len(layer.parameters)
        buffers = self._buffers(number)
        kept = [buffers[at - first_buffer] for at in taken if at >= first_buffer]
        key = f"{number}_{place}"
        self.root.get_submodule("remade").add_module(key, graph)
        called = self.graph.call_module(f"remade.{key}", (*activations, *kept))
        called.meta["val"] = (self.cuts.nodes[name].meta.get("val"),)
        note(called, remade=f"{name} of {layer.name}")
        node = self.graph.call_function(operator.getitem, (called, 0))
        self._value(name, node, self._layout(name), self.plan.strategies[number].tp)

    def _for_degree(self, value: fx.Node, dp: int) -> fx.Node:
        """``value``, but the number of parts is that of a layer whose batch is cut in ``dp``."""
        if not noted(value, "counts_parts") or dp == self.plan.data_size:
            return value
        return self.graph.call_function(operator.mul, (value, dp / self.plan.data_size))

    def _parameters(self, index: int) -> list[fx.Node]:
        units = self.made.units
        tuples = {unit: self.graph.call_module(f"units.{unit}") for unit in units.of_layer[index]}
        for unit, node in tuples.items():
            note(node, parameters=units.ordered[unit].describe())
        places = [units.places[name] for name in self.layered.layers[index].parameters]
        return [
            self.graph.call_function(operator.getitem, (tuples[unit], k)) for unit, k in places
        ]

    def _buffers(self, index: int) -> list[fx.Node]:
        return [self._buffer(name) for name in self.layered.layers[index].buffers]

    def _buffer(self, name: str) -> fx.Node:
        attribute = "buffer_" + name.replace(".", "_")
        if not hasattr(self.root, attribute):
            self.root.register_buffer(attribute, self.made.buffers[name], persistent=False)
        return self.graph.get_attr(attribute)
