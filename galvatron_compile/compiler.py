"""compile: a model and a cluster in, a parallel training program out.

Read this file first. :func:`compile` names every step in order; each step is one pass, a function
from noun to noun, in the folder ``passes``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from galvatron_compile.cluster import ClusterProfile
from galvatron_compile.contents import Contents
from galvatron_compile.decisions import Decision, Progress, Setting, decide, obey
from galvatron_compile.graph import Graph, LayeredGraph
from galvatron_compile.job import Job
from galvatron_compile.mesh import Mesh
from galvatron_compile.on_meta import buffers_on_meta, with_buffers
from galvatron_compile.parallel_model import ParallelModel
from galvatron_compile.passes.attention import attention
from galvatron_compile.passes.batch import batch
from galvatron_compile.passes.capture_once import capture_once
from galvatron_compile.passes.fuse import Wish
from galvatron_compile.passes.fuse import fuse as fused
from galvatron_compile.passes.layers import find_layers
from galvatron_compile.passes.lower import lower
from galvatron_compile.passes.rewrite import make_mesh, rewrite
from galvatron_compile.plans import Plan
from galvatron_compile.precision import Precision, computing_in
from galvatron_compile.printer import fingerprint
from galvatron_compile.program import StageProgram
from galvatron_compile.symmetric import with_peers
from galvatron_compile.wanted import Wanted

__all__ = ["Decision", "Setting", "build", "compile", "understand"]

Inputs = tuple[Any, ...] | Mapping[str, Any]


def compile(
    model: torch.nn.Module,
    cluster_profile: ClusterProfile,
    *,
    example_inputs: Inputs,
    global_batch_size: int | None = None,
    plan: Plan | str | Path | None = None,
    memory_bytes: int | None = None,
    loss_fn: Callable[[Any, Any], torch.Tensor] | None = None,
    precision: str | None = None,
    measure: bool = True,
    fuse: Wish = "auto",
    seed: int = 0,
    progress: Progress | None = None,
) -> ParallelModel:
    """Plan, rewrite and load ``model`` for the ranks of this job.

    Collective: every rank of the default process group calls it alike (under torchrun the group
    is made if it is not there yet). Without a process group it runs on one device.

    Args:
        model: any ``nn.Module`` that ``torch.export`` captures. Its parameters are broadcast from
            rank 0. What is on the meta device has no values until a state dict is loaded.
        cluster_profile: facts about the hardware, measured or a preset.
        example_inputs: positional arguments as a tuple or keyword arguments as a dict; dim 0 of
            the tensors is the batch, of any size.
        global_batch_size: samples of one optimizer step over all ranks; the example's batch size
            if not given.
        plan: run this plan instead of searching: a :class:`Plan`, the path of a saved one, or the
            compact notation (``"tp2.dp2.zero3"``, see :mod:`galvatron_compile.notation`).
        memory_bytes: memory a rank may use; that of the profile's device if not given.
        loss_fn: ``loss_fn(outputs, batch) -> scalar``, if the model does not return its loss.
        precision: None (the model's dtypes), ``"fp32"`` or ``"bf16"`` (with fp32 masters).
        measure: time the layers on this device (cached on disk) rather than estimate them.
        fuse: "auto" puts in fused kernels and products that hide communication where the cost model
            says that it pays (on GPUs), "always" also where no kernel runs, "never" nowhere.
        seed: of dropout and other random operators.
        progress: called with (what, done, total) while layers are timed.

    Raises:
        GalvatronError: what was asked cannot be done; the message says what to change. It is
            raised within seconds on every rank (PeerError on the ranks that are not at fault).
    """
    wanted = Wanted(
        model, cluster_profile, plan, loss_fn,
        global_batch_size, memory_bytes, precision, measure, fuse, seed,
    )  # fmt: skip
    job = wanted.job()
    job.together(wanted.check, same=lambda _: str(wanted))
    setting = Setting(
        job, cluster_profile, Precision.parse(precision), memory_bytes, measure,
        job.cores() if measure else (), fuse,
    )  # fmt: skip
    layered = job.together(
        lambda: understand(model, example_inputs, loss_fn, setting.precision), same=summary
    )
    batch_size = global_batch_size or layered.graph.example_batch_size
    contents = job.together(lambda: Contents.of(model, layered.graph), same=str)
    broadcast_parameters(layered.graph, contents, job)
    if plan is None:
        decision = decide(layered, batch_size, setting, progress)
    else:
        decision = obey(layered, batch_size, setting, plan, progress)
    mesh = make_mesh(layered, decision.plan, job.world_size, job.rank)
    program = job.together(lambda: build(layered, decision, mesh, setting))
    program, fusions = job.together(lambda: fused(program, cluster_profile, fuse))
    program = with_peers(program)
    lowered = job.together(lambda: lower(program))
    return ParallelModel(
        lowered,
        setting.precision,
        seed=seed,
        search=decision.report,
        contents=contents,
        fusions=fusions,
    )


def understand(
    model: torch.nn.Module,
    example_inputs: Inputs,
    loss_fn: Callable[[Any, Any], Any] | None,
    precision: Precision,
) -> LayeredGraph:
    """capture (once per kind of layer) → attention → batch → layers, in the dtype that will
    compute."""
    with computing_in(model, precision), buffers_on_meta(model) as real:
        graph = capture_once(model, precision.cast_all(example_inputs), loss_fn)
    graph = attention(with_buffers(graph, real))
    return find_layers(batch(graph))


def summary(layered: LayeredGraph) -> str:
    """What every rank must have captured alike."""
    tensors = (*layered.graph.parameters.values(), *layered.graph.buffers.values())
    num_meta = sum(tensor.is_meta for tensor in tensors)
    return (
        f"model {fingerprint(layered)}, {len(layered.layers)} layers, batch of "
        f"{layered.graph.example_batch_size}, {num_meta} of {len(tensors)} tensors on meta"
    )


def build(
    layered: LayeredGraph, decision: Decision, mesh: Mesh, setting: Setting
) -> StageProgram:
    """rewrite: this rank's program."""
    program = rewrite(
        layered, decision.plan, mesh, decision.shardings, setting.precision, setting.job.device
    )
    return replace(program, remarks=(*decision.remarks, *program.remarks))


def broadcast_parameters(graph: Graph, contents: Contents, job: Job) -> None:
    """Give every rank rank 0's parameters and buffers, as DistributedDataParallel does."""
    if job.world_size == 1:
        return
    used = (*graph.parameters.values(), *graph.buffers.values())
    with torch.no_grad():
        for tensor in (*used, *contents.passive.values()):
            if not tensor.is_meta:
                on_device = tensor.detach().to(job.device).contiguous()
                dist.broadcast(on_device, src=0)
                tensor.copy_(on_device)
