"""What one rank runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from galvatron_compile.graph import InputSpec
from galvatron_compile.layout import ParameterLayout
from galvatron_compile.mesh import Mesh
from galvatron_compile.plans import Plan
from galvatron_compile.printer import format_graph

if TYPE_CHECKING:
    from galvatron_compile.units import ParameterUnit


@dataclass(frozen=True)
class Crossing:
    """A value that travels over a cut between stages, as one rank holds it, per micro-batch."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    differentiable: bool

    @property
    def num_bytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


@dataclass(frozen=True)
class StageGraph:
    """The rewritten graph of one pipeline stage.

    module: ``(batch leaves of one micro-batch…, denominator_0…, received values…, seed: int) ->
        (sent values…,)``, or ``(loss,)`` for the last stage. Inside, ``units.i()`` gives working
        parameters, ``layers.i`` is layer i's graph with its tensor-parallel collectives, ``remade``
        computes again what needs no parameters; between the layers stand the conversions where the
        layout changes. It runs eagerly and autograd goes through.
    evaluation: the same without dropout.
    layers: numbers of the layers, in order.
    received, sent: what crosses the cut before and the cut behind, in order, named as in the whole
        model; ``received_as`` and ``sent_as``: as in ``module``.
    """

    index: int
    layers: tuple[int, ...]
    module: fx.GraphModule
    evaluation: fx.GraphModule
    received: tuple[Crossing, ...] = ()
    sent: tuple[Crossing, ...] = ()

    @property
    def received_as(self) -> tuple[str, ...]:
        placeholders = list(self.module.graph.find_nodes(op="placeholder"))
        first = len(placeholders) - 1 - len(self.received)  # the seed comes last
        return tuple(node.name for node in placeholders[first:-1])

    @property
    def sent_as(self) -> tuple[str, ...]:
        results: Any = self.module.graph.output_node().args[0]
        return tuple(node.name for node in results)


@dataclass(frozen=True)
class StageProgram:
    """The rewritten graphs of one rank's stages, with its slice of the parameters.

    stages: those of this rank's pipeline group, in order.
    units: the parameters of the group, in the order of first use.
    layouts: of every parameter of the model, the lowest pipeline group that holds it and how it
        lies there.
    denominators: batch leaves of one micro-batch -> the loss's weights, see the batch pass.
    unloaded: buffers that were on the meta device: zeros until a state is loaded.
    layer_graphs: every distinct localised layer graph by name, for printing.
    """

    stages: tuple[StageGraph, ...]
    plan: Plan
    mesh: Mesh
    units: tuple[ParameterUnit, ...]
    layouts: Mapping[str, tuple[int, ParameterLayout]]
    denominators: fx.GraphModule | None
    inputs: InputSpec
    buffers: Mapping[str, torch.Tensor]
    tied: Mapping[str, str]
    layer_graphs: Mapping[str, fx.GraphModule] = field(default_factory=dict)
    remarks: tuple[str, ...] = ()
    unloaded: frozenset[str] = frozenset()
    loss_dtype: torch.dtype = torch.float32
    device: torch.device = torch.device("cpu")  # noqa: RUF009 - immutable

    def __str__(self) -> str:
        rank = f"rank {self.mesh.rank} of {self.mesh.world_size}"
        parts = []
        for stage in self.stages:
            where = f", stage {stage.index} of {self.plan.num_stages}" if self.plan.pp > 1 else ""
            parts += [f"// program of {rank}{where}, one micro-batch", format_graph(stage.module)]
        for name, graph in self.layer_graphs.items():
            parts += ["", f"// {name}", format_graph(graph)]
        parts += ["", *(f"// remark: {remark}" for remark in self.remarks)]
        return "\n".join(parts).rstrip() + "\n"
