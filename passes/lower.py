"""lower: StageProgram → LoweredProgram, graphs that run by themselves and a list of actions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from galvatron_compile.errors import UnsupportedError
from galvatron_compile.lowered import LoweredProgram
from galvatron_compile.lowered_piece import BackwardGraph, LayerGraphs, LoweredPiece
from galvatron_compile.mesh import Axis
from galvatron_compile.passes.halves import Half, Halves, halves
from galvatron_compile.passes.order import order, order_evaluation
from galvatron_compile.passes.pieces import outline, pieces
from galvatron_compile.passes.trace import Recorded, bind, shapes, trace
from galvatron_compile.pieces import EagerPiece, Piece, PieceGraph
from galvatron_compile.printer import full_name
from galvatron_compile.program import StageGraph, StageProgram
from galvatron_compile.torch_private import new_fake_mode


@dataclass
class Traced:
    """What was traced already, by a text that says all that it depends on: layers of one class and
    strategy, and programs of other plans, share it. All its fake tensors are of one ``mode``."""

    found: dict[str, tuple[Recorded, Halves]] = field(default_factory=dict)
    mode: Any = field(default_factory=new_fake_mode)


def lower(
    program: StageProgram, *, eager: bool = False, traced: Traced | None = None
) -> LoweredProgram:
    """See the module's docstring.

    eager: run the rewritten graphs under autograd instead of tracing them (the oracle of tests).
    """
    lowering = _Lowering(program, eager, traced or Traced())
    for stage in program.stages:
        lowering.stage(stage)
    found = outline(program, lowering.pieces)
    return LoweredProgram(
        program=program,
        pieces=lowering.pieces,
        outline=found,
        training=order(found),
        evaluation=order_evaluation(found),
        loss_dtype=program.loss_dtype,
        remarks=tuple(dict.fromkeys(lowering.remarks)),
    )


class _Lowering:
    def __init__(self, program: StageProgram, eager: bool, traced: Traced) -> None:
        self.program, self.eager, self.traced = program, eager, traced
        self.bound: dict[str, LayerGraphs] = {}
        self.pieces: dict[int, Piece] = {}
        self.remarks: list[str] = []
        self.mode = self.traced.mode
        mesh = program.mesh
        self.axes: Mapping[str, Axis] = mesh.axes

    def stage(self, stage: StageGraph) -> None:
        graphs = pieces(self.program, stage)
        if self.eager:
            self.pieces |= {graph.layer: EagerPiece(graph) for graph in graphs}
            return
        values = self._inputs(stage)
        for graph in graphs:
            arguments = self._arguments(graph, values)
            if not graph.trains:
                self.pieces[graph.layer] = EagerPiece(graph)
                outputs = shapes(graph, arguments)
            else:
                self.pieces[graph.layer], outputs = self._piece(graph, arguments)
            values |= dict(zip(graph.outputs, outputs, strict=True))

    def _piece(
        self, graph: PieceGraph, arguments: Sequence[Tensor]
    ) -> tuple[Piece, Sequence[Tensor]]:
        wanted = self._wanted(graph)
        key = _key(graph, arguments, wanted)
        try:
            if key not in self.traced.found:
                self.traced.found[key] = cut_in_two(graph, arguments, wanted)
        except UnsupportedError as error:
            self.remarks.append(f"{error}; it runs under eager autograd")
            return EagerPiece(graph), shapes(graph, arguments)
        recorded, cut = self.traced.found[key]
        if key not in self.bound:
            self.bound[key] = bound(recorded, cut, self.axes)
        return LoweredPiece(graph, self.bound[key]), recorded.examples

    def _wanted(self, graph: PieceGraph) -> list[bool]:
        units = self.program.units
        trained = [units[u].layouts[k].requires_grad for u, k in graph.parameters]
        return [*graph.differentiable, *trained, *(False for _ in graph.buffers)]

    # Shapes.

    def _inputs(self, stage: StageGraph) -> dict[str, Tensor]:
        """The values that a stage begins with, as fake tensors of one micro-batch."""
        inputs, plan = self.program.inputs, self.program.plan
        local = plan.global_batch_size // plan.num_micro_batches // plan.data_size
        found = {}
        for name, dim, shape, dtype in zip(
            inputs.names, inputs.batch_dims, inputs.shapes, inputs.dtypes, strict=True
        ):
            sizes = [local if place == dim else size for place, size in enumerate(shape)]
            found[name] = self._fake(sizes, dtype)
        for node in stage.module.graph.find_nodes(op="placeholder"):
            if node.name.startswith("denominator_"):
                found[node.name] = self._fake([], node.meta["val"].dtype)
        for crossing, name in zip(stage.received, stage.received_as, strict=True):
            found[name] = self._fake(crossing.shape, crossing.dtype)
        return found

    def _fake(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        with self.mode:
            return torch.empty(tuple(shape), dtype=dtype, device=self.program.device)

    def _arguments(self, graph: PieceGraph, values: Mapping[str, Tensor]) -> list[Tensor]:
        working = (self.program.units[u].working[k] for u, k in graph.parameters)
        with torch.no_grad():
            return [
                *(values[name] for name in graph.values),
                *(self._fake(tensor.shape, tensor.dtype) for tensor in working),
                *(self._fake(tensor.shape, tensor.dtype) for tensor in graph.buffers),
            ]


def cut_in_two(
    graph: PieceGraph, arguments: Sequence[Tensor], wanted: Sequence[bool]
) -> tuple[Recorded, Halves]:
    """Trace a piece and cut what was recorded; see :func:`trace`."""
    recorded = trace(graph, arguments, wanted)
    return recorded, halves(recorded, len(graph.values), len(graph.parameters))


def bound(recorded: Recorded, cut: Halves, axes: Mapping[str, Axis]) -> LayerGraphs:
    """The graphs over real axes."""
    places = [place for place, tracked in enumerate(cut.tracked) if tracked]

    def backward(half: Half) -> BackwardGraph:
        module = bind(half.graph, recorded.module, axes)
        return BackwardGraph(module, half.given, tuple(places[at] for at in half.tangents))

    return LayerGraphs(
        forward=bind(cut.forward, recorded.module, axes),
        backward=backward(cut.backward),
        backward_input=backward(cut.backward_input),
        backward_weight=backward(cut.backward_weight),
        outputs=recorded.examples,
        value_gradients=cut.value_gradients,
        parameter_gradients=cut.parameter_gradients,
    )


def _key(graph: PieceGraph, arguments: Sequence[Tensor], wanted: Sequence[bool]) -> str:
    """All that a trace depends on."""
    sizes = [f"{a.dtype}{tuple(a.shape)}{a.stride()}{a.device}" for a in arguments]
    return "\n".join([*_text(graph.module), *sizes, str(wanted)])


def _text(module: fx.GraphModule) -> list[str]:
    """The graph with numbers for the names of its nodes, which differ from layer to layer."""
    lines = []
    number = {node: f"%{place}" for place, node in enumerate(module.graph.nodes)}
    for node in module.graph.nodes:
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda source: number[source])
        name = full_name(node.target) if node.op in ("call_function", "call_method") else ""
        lines.append(f"{node.op} {name} {args} {kwargs}")
        if node.op == "call_module":
            inner = module.get_submodule(str(node.target))
            lines += _text(inner) if isinstance(inner, fx.GraphModule) else [str(id(inner))]
        elif node.op == "get_attr":
            value = getattr(module, str(node.target))
            is_axis = isinstance(value, Axis)
            lines.append(f"{value.name} {value.size} {value.index}" if is_axis else str(id(value)))
    return lines
