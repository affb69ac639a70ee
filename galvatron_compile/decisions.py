"""From a layered model to the plan that will run: searched, or given by the caller.

Both take the same road: the sharded forms of the layers, their times on this device, the costs,
and a plan with its price.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

from galvatron_compile import notation, runnable
from galvatron_compile.cluster import ClusterProfile
from galvatron_compile.errors import InfeasibleError
from galvatron_compile.free_memory import free_bytes
from galvatron_compile.graph import LayeredGraph
from galvatron_compile.job import Job
from galvatron_compile.layer_timing import (
    LayerTiming,
    TimingKey,
    default_cache_dir,
    measure_layers,
)
from galvatron_compile.passes.annotate import Workload, annotate, micro_batch_counts
from galvatron_compile.passes.experiments import experiments
from galvatron_compile.passes.fuse import Wish
from galvatron_compile.passes.layer_estimate import Estimator
from galvatron_compile.passes.partition import price, search
from galvatron_compile.passes.sharding.table import ShardingTable, shard
from galvatron_compile.passes.strategies import enumerate_strategies
from galvatron_compile.plans import Plan
from galvatron_compile.precision import Precision
from galvatron_compile.printer import fingerprint
from galvatron_compile.search_report import SearchReport, sources
from galvatron_compile.staged import Staged, stage_strategies
from galvatron_compile.strategy import Strategy
from galvatron_compile.text import mib
from galvatron_compile.work import Cores

Progress = Callable[[str, int, int], None]
Uses = Iterable[tuple[int, Strategy]]  # class index, strategy


@dataclass(frozen=True)
class Setting:
    """What the caller fixed: where to run, and within which limits."""

    job: Job
    cluster: ClusterProfile
    precision: Precision
    memory_limit_bytes: int | None
    measure: bool
    cores: tuple[Cores, ...] = ()  # of every rank, where they share them
    fuse: Wish = "auto"

    @property
    def memory_bytes(self) -> int:
        return self.memory_limit_bytes or self.cluster.memory_bytes


@dataclass(frozen=True)
class Decision:
    """A plan, the tensor-parallel forms it uses, and how it was found (None if it was given).

    remarks: what the caller should know of the plan.
    """

    plan: Plan
    shardings: ShardingTable
    report: SearchReport | None
    remarks: tuple[str, ...] = ()


def decide(
    layered: LayeredGraph, batch_size: int, setting: Setting, progress: Progress | None
) -> Decision:
    """shard → annotate → partition: search the fastest plan that fits."""
    job = setting.job
    counts = micro_batch_counts(batch_size)
    workload = Workload(job.world_size, batch_size, counts, setting.precision)

    def open_choices() -> tuple[tuple[Strategy, ...], tuple[Strategy, ...], ShardingTable]:
        strategies = enumerate_strategies(job.world_size, global_batch_size=batch_size)
        in_stages = stage_strategies(job.world_size, batch_size)
        return strategies, in_stages, shard(layered, (*strategies, *in_stages))

    strategies, in_stages, shardings = job.together(open_choices)
    uses = product(range(len(layered.classes)), (*strategies, *in_stages))
    estimator = Estimator(layered, shardings, setting.cluster)
    timings = time_layers(layered, estimator, uses, workload, setting, progress)

    def choose() -> SearchReport:
        costs = annotate(
            layered, shardings, setting.cluster, strategies, workload, timings, estimator.tallies
        )
        staged = _staged(layered, shardings, setting, workload, timings, estimator)
        pipelines = staged.best()
        try:
            report = search(
                costs,
                setting.memory_bytes,
                model=fingerprint(layered),
                layer_names=[layer.name for layer in layered.layers],
                global_batch_size=batch_size,
            )
        except InfeasibleError:
            if not pipelines:
                raise
            return SearchReport.of_pipelines(costs, setting.memory_bytes, pipelines)
        return report.ranked(staged.with_simulation, pipelines)

    report = job.together(choose, same=lambda found: notation.format(found.best))
    return Decision(report.best, shardings, report)


def _staged(
    layered: LayeredGraph,
    shardings: ShardingTable,
    setting: Setting,
    workload: Workload,
    timings: Mapping[TimingKey, LayerTiming],
    estimator: Estimator,
) -> Staged:
    return Staged.of(
        layered,
        shardings,
        setting.cluster,
        workload,
        timings,
        estimator.tallies,
        memory_bytes=setting.memory_bytes,
        fingerprint=fingerprint(layered),
        cores=setting.cores,
    )


def obey(
    layered: LayeredGraph,
    batch_size: int,
    setting: Setting,
    given: Plan | str | Path,
    progress: Progress | None,
) -> Decision:
    """Read, check and price a plan that the caller gave."""
    job = setting.job
    classes = [layer.class_index for layer in layered.layers]

    def read() -> tuple[Plan, ShardingTable]:
        plan = _read_plan(layered, given, job.world_size, batch_size)
        runnable.check(plan)
        shardings = shard(layered, tuple(dict.fromkeys(plan.strategies)))
        for class_index, strategy in zip(classes, plan.strategies, strict=True):
            shardings.get(class_index, strategy)
        return plan, shardings

    plan, shardings = job.together(read, same=lambda found: notation.format(found[0]))
    strategies = tuple(dict.fromkeys(plan.strategies))
    counts = (plan.num_micro_batches,)
    workload = Workload(job.world_size, batch_size, counts, setting.precision)
    uses = zip(classes, plan.strategies, strict=True)
    estimator = Estimator(layered, shardings, setting.cluster)
    timings = time_layers(layered, estimator, uses, workload, setting, progress)

    def priced() -> Decision:
        staged = _staged(layered, shardings, setting, workload, timings, estimator)
        if plan.pp > 1:
            found = staged.priced(plan)
        else:
            costs = annotate(
                layered, shardings, setting.cluster, strategies, workload, timings,
                estimator.tallies,
            )  # fmt: skip
            found = staged.with_simulation(replace(plan, predicted=price(costs, plan)))
        remarks = (*_memory_remarks(found, setting), sources(found))
        return Decision(found, shardings, None, remarks)

    return job.together(priced)


def time_layers(
    layered: LayeredGraph,
    estimator: Estimator,
    uses: Uses,
    workload: Workload,
    setting: Setting,
    progress: Progress | None,
) -> dict[TimingKey, LayerTiming]:
    """Times of what the layers compute in the forms that are used; none without ``measure``.

    Every rank takes part, and all time the same: the rank with the least memory decides.
    """
    if not setting.measure:
        return {}
    job = setting.job
    num_sharing = int(os.environ.get("LOCAL_WORLD_SIZE", job.world_size))
    free = job.everyone(lambda: free_bytes(job.device, num_sharing))
    limit_bytes = min(setting.memory_bytes, *free)
    runs = job.together(
        lambda: experiments(
            layered, estimator, uses, workload, job.device, limit_bytes, setting.fuse
        ),
        same=lambda runs: str([(run.form, run.sizes, run.first) for run in runs]),
    )
    named = (lambda done, total: progress("timing layers", done, total)) if progress else None
    return measure_layers(runs, job, default_cache_dir(), named)


def _memory_remarks(plan: Plan, setting: Setting) -> tuple[str, ...]:
    """Whether a given plan needs more than it may; InfeasibleError if the caller set the limit."""
    needed, limit = plan.predicted["memory_bytes"], setting.memory_bytes
    if needed <= limit:
        return ()
    what = (
        f"the plan {notation.format(plan)!r} needs {mib(needed)} MiB ({needed} bytes) a rank, more "
        f"than the {mib(limit)} MiB ({limit} bytes) that "
    )
    less = "more micro-batches, a higher ZeRO stage, recompute or more tensor parallel need less"
    if setting.memory_limit_bytes is not None:
        raise InfeasibleError(
            f"{what}memory_bytes allows; {less}; or raise memory_bytes, or leave plan out to "
            "search one that fits"
        )
    return (f"{what}a rank of {setting.cluster.name} has; {less}",)


def _read_plan(
    layered: LayeredGraph, given: Plan | str | Path, world_size: int, batch_size: int
) -> Plan:
    if isinstance(given, str) and not _is_path(given):
        names = [layer.name for layer in layered.layers]
        return notation.parse(given, names, world_size, batch_size, model=fingerprint(layered))
    plan = given if isinstance(given, Plan) else Plan.load(given)
    plan.check_model(fingerprint(layered), len(layered.layers), world_size, batch_size)
    return plan


def _is_path(text: str) -> bool:
    """A file's name rather than notation; a layer's name may hold a slash, before its colon."""
    looks_like_one = text.endswith(".json") or ("/" in text and ":" not in text)
    return looks_like_one or Path(text).is_file()
