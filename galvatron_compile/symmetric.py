"""Symmetric memory for the axes of a program whose products hide communication."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.distributed as dist
from torch import fx

from galvatron_compile import fused
from galvatron_compile.kernels.base import INTERPRETED
from galvatron_compile.mesh import Axis, Mesh
from galvatron_compile.program import StageProgram

_OVERLAPPED = (
    fused.gather_linear,
    fused.linear_reduce_scatter,
    fused.all_reduce_add_rms_norm,
)


def with_peers(program: StageProgram, capacity_bytes: int = 256 << 20) -> StageProgram:
    """Collective over each axis that a fused product communicates along.

    Where ranks cannot address each other's memory, the axis stays as it is, with a remark: the
    operators then run a product and a collective one after the other. On the CPU there is shared
    memory for kernels under Triton's interpreter only.

    capacity_bytes: of one half of the memory that a rank gives; larger operands use collectives.
    """
    if program.device.type != "cuda" and not INTERPRETED:
        return program
    axes, remarks = dict(program.mesh.axes), []
    for name in sorted(_axes(program)):
        axis = axes[name]
        if axis.group is not None:
            axes[name], remark = _with_peers(axis, capacity_bytes, program.device)
            remarks += [remark] if remark else []
    mesh = replace(program.mesh, axes=axes)
    return replace(program, mesh=mesh, remarks=(*program.remarks, *remarks))


def _axes(program: StageProgram) -> set[str]:
    """Names of the axes along which fused products communicate."""
    found = set()
    for graph in program.layer_graphs.values():
        for node in graph.graph.nodes:
            if node.op == "call_function" and node.target in _OVERLAPPED:
                argument = node.args[-1]
                assert isinstance(argument, fx.Node)
                found.add(getattr(graph, str(argument.target)).name)
    return found


def _with_peers(axis: Axis, capacity_bytes: int, device: torch.device) -> tuple[Axis, str]:
    # Here, since only programs that need them pay for their import; it defines the operators.
    from galvatron_compile.kernels import all_gather_matmul, matmul_reduce_scatter  # noqa: F401
    from galvatron_compile.kernels.peers import make_peers, register

    name = f"{axis.name} of ranks {', '.join(map(str, axis.ranks))}"
    peers, why = None, ""
    try:
        peers = make_peers(axis.group, capacity_bytes=capacity_bytes, device=device)
    except RuntimeError as error:  # no peer access, or no memory: every rank must go without
        why = str(error).strip().split("\n", 1)[0]
    everyone: list[str] = [""] * axis.size
    dist.all_gather_object(everyone, why, group=axis.group)
    failed = next((text for text in everyone if text), "")
    if failed or peers is None:
        return axis, f"axis {axis} has no symmetric memory ({failed}); its products hide nothing"
    register(name, peers)
    return replace(axis, peers=name), ""


def look_at_peers(mesh: Mesh) -> None:
    """RuntimeError if a kernel waited for a rank in vain, now or in one of the next steps: on a GPU
    nobody waits for the device to find out."""
    for axis in mesh.axes.values():
        if axis.peers:
            from galvatron_compile.kernels.peers import peers_of

            peers_of(axis.peers, axis.size).glance()
