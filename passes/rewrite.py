"""rewrite: LayeredGraph, Plan → StageProgram. Obeys the plan and decides nothing."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import fx

from galvatron_compile.graph import LayeredGraph, copy_annotated
from galvatron_compile.mesh import Groups, Mesh
from galvatron_compile.passes.arguments import concrete_shape
from galvatron_compile.passes.cross import Cuts, results
from galvatron_compile.passes.normalise import retarget_devices
from galvatron_compile.passes.rewrite_parts import LayerModules, parameter_units
from galvatron_compile.passes.rewrite_stage import StageBuilder
from galvatron_compile.passes.sharding.table import ShardingTable
from galvatron_compile.plans import Plan
from galvatron_compile.precision import Precision
from galvatron_compile.program import Crossing, StageGraph, StageProgram


def mesh_degrees(plan: Plan) -> list[int]:
    """Tensor-parallel degrees that the plan's program needs axes for.

    Besides the layers' own: that of a rank's share of the batch, and the least common multiple of
    degrees that do not divide each other, through which values pass from one to the other.
    """
    degrees = {strategy.tp for strategy in plan.strategies}
    degrees.add(plan.world_size // plan.pp // plan.data_size)
    degrees |= {math.lcm(a, b) for a in degrees for b in degrees}
    return sorted(degrees)


def tied_groups(layered: LayeredGraph, plan: Plan) -> dict[str, tuple[int, ...]]:
    """Parameters that several pipeline groups hold, and which groups."""
    holders: dict[str, set[int]] = {}
    for group in range(plan.pp):
        for index in plan.group_layers(group):
            for name in layered.layers[index].parameters:
                holders.setdefault(name, set()).add(group)
    return {name: tuple(sorted(found)) for name, found in holders.items() if len(found) > 1}


def make_mesh(
    layered: LayeredGraph,
    plan: Plan,
    world_size: int,
    rank: int,
    *,
    dry: bool = False,
    groups: Groups | None = None,
) -> Mesh:
    """The axes that the plan's program needs. Collective unless ``dry``.

    groups: to be shared with programs of other plans, see :meth:`Mesh.create`.
    """
    tied, degrees = tied_groups(layered, plan).values(), mesh_degrees(plan)
    return Mesh.create(
        world_size, rank, degrees, pp=plan.pp, tied=tied, dry=dry, groups=groups
    )


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
    tied = tied_groups(layered, plan)
    units, layouts = parameter_units(layered, plan, mesh, layers, precision, device, tied)
    buffers = {name: _on_device(value, device) for name, value in layered.graph.buffers.items()}
    cuts = Cuts(layered, plan)
    builder = StageBuilder(cuts, mesh, layers, units, buffers)
    shapes = _Shapes(cuts, layers)
    stages = []
    for index in range(mesh.group, plan.num_stages, plan.pp):
        span = cuts.stages[index]
        received = cuts.received(index)
        sent = cuts.received(index + 1) if index + 1 < plan.num_stages else ()
        stages.append(
            StageGraph(
                index=index,
                layers=tuple(range(span.first, span.last)),
                module=builder.build(index, received, sent, layers.training),
                evaluation=builder.build(index, received, sent, layers.evaluation),
                received=tuple(map(shapes.crossing, received)),
                sent=tuple(map(shapes.crossing, sent)),
            )
        )
    return StageProgram(
        stages=tuple(stages),
        plan=plan,
        mesh=mesh,
        units=units.ordered,
        layouts=layouts,
        denominators=_denominators(layered, buffers, device),
        inputs=layered.graph.inputs,
        buffers=buffers,
        tied=layered.graph.tied,
        layer_graphs=layers.graphs,
        remarks=layers.remarks,
        unloaded=frozenset(name for name, b in layered.graph.buffers.items() if b.is_meta),
        loss_dtype=cuts.nodes[layered.loss].meta["val"].dtype,
        device=device,
    )


class _Shapes:
    """What the values between layers look like on one rank."""

    def __init__(self, cuts: Cuts, layers: LayerModules) -> None:
        self.cuts, self.layers = cuts, layers

    def crossing(self, name: str) -> Crossing:
        number, place = self.cuts.made_by[name]
        plan = self.cuts.plan
        value = results(self.layers.training[number])[place].meta["val"]
        local = plan.global_batch_size // plan.num_micro_batches // plan.strategies[number].dp
        symbol = self.cuts.layered.graph.batch_symbol
        shape = concrete_shape(value, symbol, local)
        return Crossing(name, shape, value.dtype, self.cuts.is_differentiable(name))


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
