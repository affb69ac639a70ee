"""What one rank runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import fx

from galvatron_compile.graph import InputSpec
from galvatron_compile.mesh import Mesh
from galvatron_compile.plans import Plan
from galvatron_compile.printer import format_graph

if TYPE_CHECKING:
    from galvatron_compile.units import ParameterUnit


@dataclass(frozen=True)
class StageProgram:
    """The rewritten graph of one rank, with its slice of the parameters.

    module: ``(batch leaves of one micro-batch…, denominator_0…, seed: int) -> (loss,)``. Inside,
        ``units.i()`` gives layer i's working parameters (gathered under ZeRO-3), ``layers.i`` is
        the layer's graph with its tensor-parallel collectives, ``fences.i`` marks where a ZeRO-3
        layer's parameters are freed in forward and gathered again in backward; between the layers
        stand the conversions where the layout changes. It runs eagerly and autograd goes through.
    evaluation: the same program without dropout.
    units: the parameters, in the order of first use.
    denominators: batch leaves of one micro-batch -> the loss's weights, see the batch pass.
    unloaded: buffers that were on the meta device: zeros until a state is loaded.
    layer_graphs: every distinct localised layer graph by name, for printing.
    """

    module: fx.GraphModule
    evaluation: fx.GraphModule
    plan: Plan
    mesh: Mesh
    units: tuple[ParameterUnit, ...]
    denominators: fx.GraphModule | None
    inputs: InputSpec
    buffers: Mapping[str, torch.Tensor]
    tied: Mapping[str, str]
    layer_graphs: Mapping[str, fx.GraphModule]
    remarks: tuple[str, ...] = ()
    unloaded: frozenset[str] = frozenset()

    def __str__(self) -> str:
        rank = f"rank {self.mesh.rank} of {self.mesh.world_size}"
        parts = [f"// program of {rank}, one micro-batch", format_graph(self.module)]
        for name, graph in self.layer_graphs.items():
            parts += ["", f"// {name}", format_graph(graph)]
        parts += ["", *(f"// remark: {remark}" for remark in self.remarks)]
        return "\n".join(parts).rstrip() + "\n"
