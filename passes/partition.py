"""Cost table in, fastest plan that fits in memory out.

The answer is the optimum of the price in :mod:`galvatron_compile.passes.pricing` over every
assignment of strategies to layers and every number of micro-batches, costs of changing layout
between neighbours included; :mod:`galvatron_compile.passes.chain_search` says how. Of equally fast
plans the one that changes strategy least often is taken.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from galvatron_compile import notation
from galvatron_compile.costs import CostTable
from galvatron_compile.errors import InfeasibleError, PlanError
from galvatron_compile.passes.chain import Chain, Ints, smallest_memory
from galvatron_compile.passes.chain_search import solve
from galvatron_compile.passes.pricing import (
    layer_step_ms,
    layer_step_ns,
    price,
    resharding_step_ns,
    resident_bytes,
)
from galvatron_compile.plans import Plan
from galvatron_compile.search_report import Candidate, SearchReport
from galvatron_compile.strategy import Strategy
from galvatron_compile.text import mib

__all__ = ["layer_step_ms", "partition", "price", "search"]


def partition(
    table: CostTable,
    memory_bytes: int,
    *,
    model: str,
    layer_names: Sequence[str],
    global_batch_size: int,
) -> Plan:
    """The fastest plan whose memory is at most ``memory_bytes`` a rank, priced.

    Raises InfeasibleError with the smallest memory that would do and the plan it would do for;
    PlanError if the table was made for other layers or another batch.
    """
    _check(table, layer_names, global_batch_size)
    counts = table.micro_batch_counts
    switches = _switches(table)
    chains = [_chain(table, count, switches[count]) for count in counts]
    choice = solve(chains, memory_bytes)
    if choice is None:
        raise InfeasibleError(_infeasible(table, chains, memory_bytes, model, layer_names))
    strategies = _strategies(table, choice.path)
    return _priced(table, counts[choice.chain], strategies, model, layer_names)


def search(
    table: CostTable,
    memory_bytes: int,
    *,
    model: str,
    layer_names: Sequence[str],
    global_batch_size: int,
    num_candidates: int = 12,
) -> SearchReport:
    """:func:`partition`, with the uniform plans beside it and why each of them lost."""
    best = partition(
        table,
        memory_bytes,
        model=model,
        layer_names=layer_names,
        global_batch_size=global_batch_size,
    )
    candidates = [
        _candidate(table, strategy, best, memory_bytes, model, layer_names)
        for strategy in table.strategies
    ]
    candidates.sort(key=_rank)
    shown = candidates[:num_candidates]
    num_left_out = len(candidates) - len(shown)
    return SearchReport(best, memory_bytes, tuple(shown), table, num_left_out)


def _check(table: CostTable, layer_names: Sequence[str], global_batch_size: int) -> None:
    if len(layer_names) != len(table.layers):
        raise PlanError(
            f"the cost table has {len(table.layers)} layers, the model {len(layer_names)}; "
            "annotate this model again"
        )
    if global_batch_size != table.global_batch_size:
        raise PlanError(
            f"the cost table is for a global batch of {table.global_batch_size}, not "
            f"{global_batch_size}; annotate again with global_batch_size={global_batch_size}"
        )


def _chain(table: CostTable, count: int, switch_ns: Ints) -> Chain:
    num_classes, num_options = len(table.class_names), len(table.strategies)
    allowed = np.zeros((num_classes, num_options), dtype=np.bool_)
    numbers = np.zeros((3, num_classes, num_options), dtype=np.int64)
    for index in range(num_classes):
        for option, strategy in enumerate(table.strategies):
            cost = table.entries.get((index, strategy, count))
            splits = table.global_batch_size % (count * strategy.dp) == 0
            if cost is not None and splits:
                allowed[index, option] = True
                time = layer_step_ns(cost, count, table.overlap_slowdown)
                numbers[:, index, option] = time, resident_bytes(cost), cost.transient_bytes
    layers = np.asarray(table.layers)
    time_ns, memory, transient = numbers[:, layers]
    groups = _merged(table.same_strategy)
    return Chain(time_ns, memory, transient, allowed[layers], switch_ns, groups)


def _switches(table: CostTable) -> dict[int, Ints]:
    """Number of micro-batches -> [cuts, strategy before, strategy after] nanoseconds a step."""
    num_cuts, num_options = len(table.layers) - 1, len(table.strategies)
    switches = {
        count: np.zeros((num_cuts, num_options, num_options), dtype=np.int64)
        for count in table.micro_batch_counts
    }
    # Hashing a strategy costs more than the rest of the loop, and most are the table's own objects.
    by_id = {id(strategy): option for option, strategy in enumerate(table.strategies)}
    by_value = {strategy: option for option, strategy in enumerate(table.strategies)}
    for (cut, before, after, count), time_ms in table.resharding_ms.items():
        row, column = by_id.get(id(before)), by_id.get(id(after))
        row = by_value.get(before) if row is None else row
        column = by_value.get(after) if column is None else column
        if row is not None and column is not None and count in switches and cut < num_cuts:
            switches[count][cut, row, column] = resharding_step_ns(time_ms, count)
    return switches


def _merged(groups: Sequence[Sequence[int]]) -> tuple[tuple[int, ...], ...]:
    """Groups made disjoint: two that share a layer are one."""
    merged: list[set[int]] = []
    for group in groups:
        touching = [other for other in merged if other & set(group)]
        merged = [other for other in merged if other not in touching]
        merged.append(set(group).union(*touching))
    return tuple(tuple(sorted(group)) for group in merged if len(group) > 1)


def _strategies(table: CostTable, path: Ints) -> tuple[Strategy, ...]:
    return tuple(table.strategies[option] for option in path)


def _priced(
    table: CostTable,
    count: int,
    strategies: tuple[Strategy, ...],
    model: str,
    layer_names: Sequence[str],
) -> Plan:
    plan = Plan(
        model=model,
        world_size=table.world_size,
        global_batch_size=table.global_batch_size,
        num_micro_batches=count,
        layers=tuple(layer_names),
        strategies=strategies,
        classes=tuple(table.class_names[index] for index in table.layers),
    )
    return replace(plan, predicted=price(table, plan))


def _infeasible(
    table: CostTable,
    chains: Sequence[Chain],
    memory_bytes: int,
    model: str,
    layer_names: Sequence[str],
) -> str:
    found = [(smallest_memory(chain), index) for index, chain in enumerate(chains)]
    fitting = [(*best, index) for best, index in found if best is not None]
    if not fitting:
        reasons = {reason: None for reason in table.illegal.values()}
        because = f": {'; '.join(list(reasons)[:3])}" if reasons else ""
        return (
            f"no strategy can run every layer with a global batch of {table.global_batch_size} on "
            f"{table.world_size} ranks{because}; change the batch size or the number of ranks"
        )
    needed, path, index = min(fitting, key=lambda item: item[0])
    count = table.micro_batch_counts[index]
    plan = _priced(table, count, _strategies(table, path), model, layer_names)
    return (
        f"no plan fits in {mib(memory_bytes)} MiB ({memory_bytes} bytes) a rank; the smallest that "
        f"would do is {mib(needed)} MiB ({needed} bytes), with the plan "
        f"{notation.format(plan)!r}; raise memory_bytes, use more ranks or a smaller batch"
    )


def _candidate(
    table: CostTable,
    strategy: Strategy,
    best: Plan,
    memory_bytes: int,
    model: str,
    layer_names: Sequence[str],
) -> Candidate:
    """A strategy for all layers: its fastest count that fits, else the smallest."""
    plans, why = [], "the batch does not split that way"
    for count in table.micro_batch_counts:
        try:
            everywhere = (strategy,) * len(table.layers)
            plans.append(_priced(table, count, everywhere, model, layer_names))
        except PlanError as error:
            why = str(error)
    if not plans:
        return Candidate(strategy, None, False, why)
    fitting = [plan for plan in plans if plan.predicted["memory_bytes"] <= memory_bytes]
    if not fitting:
        plan = min(plans, key=lambda plan: plan.predicted["memory_bytes"])
        excess = plan.predicted["memory_bytes"] - memory_bytes
        return Candidate(strategy, plan, False, f"{mib(excess)} MiB over the limit")
    plan = min(fitting, key=lambda plan: plan.predicted["step_ms"])
    return Candidate(strategy, plan, True, _verdict(plan, best))


def _verdict(plan: Plan, best: Plan) -> str:
    """By how much a plan is slower, and the part of the step that grew most."""
    if plan == best:
        return "is the best plan"
    slower = plan.predicted["step_ms"] - best.predicted["step_ms"]
    if slower == 0:
        return "as fast as the best plan"
    parts = {
        "compute_ms": "computation",
        "tensor_comm_ms": "tensor-parallel communication",
        "data_comm_ms": "exposed data-parallel communication",
        "optimizer_ms": "optimizer",
    }
    grown = {key: plan.predicted[key] - best.predicted[key] for key in parts}
    most = max(grown, key=lambda key: grown[key])
    percent = 100 * slower / best.predicted["step_ms"]
    return f"{percent:.1f} % slower: {grown[most]:+.3f} ms {parts[most]}"


def _rank(candidate: Candidate) -> tuple[int, float, Strategy]:
    """Those that fit by time, then those that do not by memory, then those that cannot run."""
    if candidate.plan is None:
        return 2, 0.0, candidate.strategy
    if not candidate.fits:
        return 1, float(candidate.predicted["memory_bytes"]), candidate.strategy
    return 0, float(candidate.predicted["step_ms"]), candidate.strategy
