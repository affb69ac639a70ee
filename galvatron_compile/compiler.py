"""compile: a model and a cluster in, a parallel training program out.

Read this file first. :func:`compile` names every step in order; each step is one pass, a function
from noun to noun, in the folder ``passes``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from galvatron_compile import notation, runnable
from galvatron_compile.cluster import ClusterProfile
from galvatron_compile.contents import Contents
from galvatron_compile.errors import InfeasibleError, ShapeError
from galvatron_compile.graph import Graph, LayeredGraph
from galvatron_compile.job import Job
from galvatron_compile.layer_timing import default_cache_dir, measure_layers
from galvatron_compile.mesh import Mesh
from galvatron_compile.on_meta import buffers_on_meta, with_buffers
from galvatron_compile.parallel_model import ParallelModel
from galvatron_compile.passes.annotate import Workload, annotate, micro_batch_counts
from galvatron_compile.passes.batch import batch
from galvatron_compile.passes.capture_once import capture_once
from galvatron_compile.passes.experiments import experiments
from galvatron_compile.passes.layers import find_layers
from galvatron_compile.passes.partition import price, search
from galvatron_compile.passes.rewrite import mesh_degrees, rewrite
from galvatron_compile.passes.sharding.table import ShardingTable, shard
from galvatron_compile.passes.strategies import enumerate_strategies
from galvatron_compile.plan import Plan
from galvatron_compile.precision import Precision, computing_in
from galvatron_compile.printer import fingerprint
from galvatron_compile.program import StageProgram
from galvatron_compile.search_report import SearchReport

Inputs = tuple[Any, ...] | Mapping[str, Any]
Progress = Callable[[str, int, int], None]


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
        seed: of dropout and other random operators.
        progress: called with (what, done, total) while layers are timed.

    Raises:
        GalvatronError: what was asked cannot be done; the message says what to change. It is
            raised within seconds on every rank (PeerError on the ranks that are not at fault).
    """
    job = Job.current(model)
    wanted = Wanted(global_batch_size, memory_bytes, precision, measure, seed, plan is not None)
    job.together(wanted.check, same=lambda _: str(wanted))
    setting = Setting(job, cluster_profile, Precision.parse(precision), memory_bytes, measure)
    layered = job.together(
        lambda: understand(model, example_inputs, loss_fn, setting.precision), same=summary
    )
    batch_size = global_batch_size or layered.graph.example_batch_size
    contents = job.together(lambda: Contents.of(model, layered.graph), same=str)
    broadcast_parameters(layered.graph, contents, job)
    if plan is None:
        decision = decide(layered, batch_size, setting, progress)
    else:
        decision = obey(layered, batch_size, setting, plan)
    mesh = Mesh.create(job.world_size, job.rank, mesh_degrees(decision.plan))
    program = job.together(lambda: build(layered, decision, mesh, setting))
    return ParallelModel(
        program,
        setting.precision,
        device=job.device,
        seed=seed,
        search=decision.report,
        contents=contents,
    )


@dataclass(frozen=True)
class Wanted:
    """Arguments of :func:`compile` that must be the same on every rank."""

    global_batch_size: int | None
    memory_bytes: int | None
    precision: str | None
    measure: bool
    seed: int
    has_plan: bool

    def check(self) -> None:
        Precision.parse(self.precision)
        if self.global_batch_size is not None and self.global_batch_size < 1:
            raise ShapeError(
                f"global_batch_size is {self.global_batch_size}; give the number of samples of "
                "one optimizer step over all ranks, at least 1"
            )
        if self.memory_bytes is not None and self.memory_bytes < 1:
            raise InfeasibleError(
                f"memory_bytes is {self.memory_bytes}; give the bytes that a rank may use, or "
                "leave it out to use the memory of the profile's device"
            )


@dataclass(frozen=True)
class Setting:
    """What the caller fixed: where to run, and within which limits."""

    job: Job
    cluster: ClusterProfile
    precision: Precision
    memory_limit_bytes: int | None
    measure: bool

    @property
    def memory_bytes(self) -> int:
        return self.memory_limit_bytes or self.cluster.memory_bytes


@dataclass(frozen=True)
class Decision:
    """A plan, the tensor-parallel forms it uses, and how it was found (None if it was given)."""

    plan: Plan
    shardings: ShardingTable
    report: SearchReport | None


def understand(
    model: torch.nn.Module,
    example_inputs: Inputs,
    loss_fn: Callable[[Any, Any], Any] | None,
    precision: Precision,
) -> LayeredGraph:
    """capture (once per kind of layer) → batch → layers, in the dtype that will compute."""
    with computing_in(model, precision), buffers_on_meta(model) as real:
        graph = capture_once(model, precision.cast_all(example_inputs), loss_fn)
    graph = batch(with_buffers(graph, real))
    return find_layers(graph)


def summary(layered: LayeredGraph) -> str:
    """What every rank must have captured alike."""
    tensors = (*layered.graph.parameters.values(), *layered.graph.buffers.values())
    num_meta = sum(tensor.is_meta for tensor in tensors)
    return (
        f"model {fingerprint(layered)}, {len(layered.layers)} layers, batch of "
        f"{layered.graph.example_batch_size}, {num_meta} of {len(tensors)} tensors on meta"
    )


def decide(
    layered: LayeredGraph, batch_size: int, setting: Setting, progress: Progress | None
) -> Decision:
    """shard → annotate → partition: search the fastest plan that fits."""
    job = setting.job
    workload = Workload(
        job.world_size, batch_size, micro_batch_counts(batch_size), setting.precision
    )

    def open_choices() -> tuple[Any, ShardingTable]:
        strategies = enumerate_strategies(job.world_size, global_batch_size=batch_size)
        return strategies, shard(layered, strategies)

    strategies, shardings = job.together(open_choices)
    timings = {}
    if setting.measure:
        runs = job.together(
            lambda: experiments(layered, shardings, strategies, workload, job.device)
        )
        timings = measure_layers(
            runs, job, default_cache_dir(), progress and _named(progress, "timing layers")
        )

    def choose() -> SearchReport:
        costs = annotate(layered, shardings, setting.cluster, strategies, workload, timings)
        return search(
            costs,
            setting.memory_bytes,
            model=fingerprint(layered),
            layer_names=[layer.name for layer in layered.layers],
            global_batch_size=batch_size,
        )

    report = job.together(choose, same=lambda found: notation.format(found.best))
    return Decision(report.best, shardings, report)


def obey(
    layered: LayeredGraph, batch_size: int, setting: Setting, given: Plan | str | Path
) -> Decision:
    """Read, check and price a plan that the caller gave."""
    world_size = setting.job.world_size

    def read() -> Decision:
        plan = _read_plan(layered, given, world_size, batch_size)
        runnable.check(plan)
        strategies = tuple(dict.fromkeys(plan.strategies))
        shardings = shard(layered, strategies)
        for layer, strategy in zip(layered.layers, plan.strategies, strict=True):
            shardings.get(layer.class_index, strategy)
        workload = Workload(
            world_size, batch_size, (plan.num_micro_batches,), setting.precision
        )
        costs = annotate(layered, shardings, setting.cluster, strategies, workload, {})
        return Decision(replace(plan, predicted=price(costs, plan)), shardings, None)

    return setting.job.together(read, same=lambda decision: notation.format(decision.plan))


def build(
    layered: LayeredGraph, decision: Decision, mesh: Mesh, setting: Setting
) -> StageProgram:
    """rewrite: this rank's program."""
    return rewrite(
        layered, decision.plan, mesh, decision.shardings, setting.precision, setting.job.device
    )


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


def _read_plan(
    layered: LayeredGraph, given: Plan | str | Path, world_size: int, batch_size: int
) -> Plan:
    if isinstance(given, str) and not (given.endswith(".json") or Path(given).is_file()):
        names = [layer.name for layer in layered.layers]
        return notation.parse(given, names, world_size, batch_size, model=fingerprint(layered))
    plan = given if isinstance(given, Plan) else Plan.load(given)
    plan.check_model(fingerprint(layered), len(layered.layers), world_size, batch_size)
    return plan


def _named(progress: Progress, what: str) -> Callable[[int, int], None]:
    return lambda done, total: progress(what, done, total)


