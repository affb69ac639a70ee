"""The searcher against brute force, its refusals, and the price that both use."""

from __future__ import annotations

import itertools
import random
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest

from galvatron_compile import notation
from galvatron_compile.costs import CostTable, LayerCost
from galvatron_compile.errors import InfeasibleError, PlanError
from galvatron_compile.passes.chain import Chain, smallest_memory
from galvatron_compile.passes.chain_search import solve
from galvatron_compile.passes.partition import layer_step_ms, partition, price, search
from galvatron_compile.passes.strategies import enumerate_strategies
from galvatron_compile.plans import Plan
from galvatron_compile.strategy import Strategy


def cost(**values: float) -> LayerCost:
    zero = dict.fromkeys(LayerCost.__dataclass_fields__, 0)
    return LayerCost(**{**zero, "source": "analytic", **values})  # type: ignore[arg-type]


def random_cost(rng: random.Random, coarse: bool) -> LayerCost:
    """Coarse numbers make ties, the equal sums and equal maxima that pruning gets wrong."""
    time = (lambda top: rng.randrange(top + 1)) if coarse else (lambda top: rng.random() * top)
    size = (lambda top: rng.randrange(4) * top // 4) if coarse else rng.randrange
    return LayerCost(
        *(time(4) for _ in range(10)),
        parameter_bytes=size(50),
        gradient_bytes=size(50),
        optimizer_bytes=size(100),
        saved_bytes=size(200),
        transient_bytes=size(300),
        source="measured",
    )


def random_table(rng: random.Random) -> CostTable:
    num_layers, num_classes = rng.randint(1, 5), rng.randint(1, 3)
    pool = enumerate_strategies(4)
    strategies = tuple(rng.sample(pool, rng.randint(2, 4)))
    counts = tuple(sorted(rng.sample((1, 2, 4), rng.randint(1, 3))))
    coarse = rng.random() < 0.5
    entries = {
        (index, strategy, count): random_cost(rng, coarse)
        for index in range(num_classes)
        for strategy in strategies
        for count in counts
        if rng.random() < 0.95
    }
    switching = rng.choice((0.0, 0.3, 1.0))
    resharding = {
        (cut, before, after, count): (rng.randrange(4) if coarse else rng.random() * 3)
        for cut in range(num_layers - 1)
        for before in strategies
        for after in strategies
        for count in counts
        if rng.random() < switching
    }
    groups = []
    if num_layers > 1 and rng.random() < 0.5:
        groups = [tuple(sorted(rng.sample(range(num_layers), 2))) for _ in range(rng.randint(1, 2))]
    return CostTable(
        layers=tuple(rng.randrange(num_classes) for _ in range(num_layers)),
        class_names=tuple(f"class{index}" for index in range(num_classes)),
        strategies=strategies,
        micro_batch_counts=counts,
        entries=entries,
        resharding_ms=resharding,
        same_strategy=tuple(groups),
        overlap_slowdown=rng.choice((1.0, 1.13, 1.5)),
        world_size=4,
        global_batch_size=16,
        illegal={},
    )


def make_plan(table: CostTable, strategies: tuple[Strategy, ...], count: int) -> Plan:
    names = tuple(f"layer{index}" for index in range(len(table.layers)))
    return Plan("m", table.world_size, table.global_batch_size, count, names, strategies)


def brute_force(table: CostTable) -> list[tuple[int, int, int]]:
    """(nanoseconds, changes of strategy, bytes) of every assignment, from the definition."""
    found = []
    for count in table.micro_batch_counts:
        for assignment in itertools.product(table.strategies, repeat=len(table.layers)):
            keys = [(i, s, count) for i, s in zip(table.layers, assignment, strict=True)]
            if any(key not in table.entries for key in keys):
                continue
            if any(len({assignment[i] for i in group}) > 1 for group in table.same_strategy):
                continue
            costs = [table.entries[key] for key in keys]
            time = sum(
                round(layer_step_ms(cost, count, table.overlap_slowdown) * 1e6) for cost in costs
            )
            cuts = list(enumerate(itertools.pairwise(assignment)))
            for cut, (before, after) in cuts:
                reshard = table.resharding_ms.get((cut, before, after, count), 0)
                time += count * round(reshard * 1e6)
            changes = sum(before != after for _, (before, after) in cuts)
            memory = sum(cost.state_bytes + cost.saved_bytes for cost in costs)
            found.append((time, changes, memory + max(cost.transient_bytes for cost in costs)))
    return found


def run_partition(table: CostTable, memory_bytes: int) -> Plan:
    names = [f"layer{index}" for index in range(len(table.layers))]
    return partition(table, memory_bytes, model="m", layer_names=names, global_batch_size=16)


def changes(plan: Plan) -> int:
    return sum(before != after for before, after in itertools.pairwise(plan.strategies))


@pytest.mark.parametrize("block", range(10))
def test_the_plan_is_the_optimum_over_all_assignments(block: int) -> None:
    """400 random instances, each at limits from hopeless to generous."""
    for seed in range(40 * block, 40 * block + 40):
        rng = random.Random(seed)
        table = random_table(rng)
        found = brute_force(table)
        if not found:
            with pytest.raises(InfeasibleError, match="no strategy can run every layer"):
                run_partition(table, 10**9)
            continue
        memories = sorted({memory for _, _, memory in found})
        limits = {memories[0], memories[-1], *rng.sample(memories, min(3, len(memories)))}
        for limit in limits:
            plan = run_partition(table, limit)
            time, fewest, _ = min(item for item in found if item[2] <= limit)
            got = (round(plan.predicted["step_ms"] * 1e6), changes(plan))
            assert got == (time, fewest), f"seed {seed}, limit {limit}"
            assert plan.predicted["memory_bytes"] <= limit
        with pytest.raises(InfeasibleError, match=rf"\({memories[0]} bytes\), with the plan"):
            run_partition(table, memories[0] - 1)


def random_chain(rng: np.random.Generator, links: int, options: int) -> Chain:
    """Few kinds of links, so that many assignments have equal sums."""
    kinds = rng.integers(0, 2, links)
    time = rng.integers(1, 40, (2, options))[kinds]
    memory = rng.integers(1, 30, (2, options))[kinds]
    transient = rng.integers(0, 25, (2, options))[kinds]
    switch = np.broadcast_to(rng.integers(0, 6, (options, options)), (links - 1, options, options))
    allowed = np.ones((links, options), dtype=np.bool_)
    groups = ((0, links - 1),) if rng.random() < 0.5 else ()
    return Chain(time, memory, transient, allowed, switch.astype(np.int64), groups)


def dynamic_program(chain: Chain, capacity: int) -> int | None:
    """The optimum by a table over every byte of memory, every peak and every first option."""
    best: int | None = None
    for peak in np.unique(chain.transient_bytes):
        room = capacity - int(peak)
        for first in range(chain.num_options):
            values: dict[tuple[int, int], int] = {}
            for link in range(chain.num_links):
                grown: dict[tuple[int, int], int] = {}
                sources = values.items() if link else [((first, 0), 0)]
                for ((before, used), time), option in itertools.product(
                    sources, range(chain.num_options)
                ):
                    tied = any(link in group for group in chain.groups) or link == 0
                    memory = used + int(chain.memory_bytes[link, option])
                    if tied and option != first and (link == 0 or chain.groups):
                        continue
                    if chain.transient_bytes[link, option] > peak or memory > room:
                        continue
                    total = time + int(chain.time_ns[link, option])
                    total += int(chain.switch_ns[link - 1, before, option]) if link else 0
                    key = (option, memory)
                    grown[key] = min(grown.get(key, total), total)
                values = grown
            times = [*values.values(), *([] if best is None else [best])]
            best = min(times) if times else None
    return best


@pytest.mark.parametrize("seed", range(25))
def test_long_chains_of_equal_layers_agree_with_a_table_over_every_byte(seed: int) -> None:
    rng = np.random.default_rng(seed)
    chain = random_chain(rng, links=int(rng.integers(8, 14)), options=4)
    smallest = smallest_memory(chain)
    assert smallest is not None
    for capacity in (smallest[0], smallest[0] + 17, smallest[0] + 60):
        choice = solve([chain], capacity)
        assert choice is not None
        assert choice.total_ns == dynamic_program(chain, capacity)
        assert choice.memory_bytes <= capacity
    assert solve([chain], smallest[0] - 1) is None


def test_a_step_of_a_layer_adds_up_as_documented() -> None:
    layer = cost(
        **{"forward_ms": 2, "backward_ms": 4, "forward_comm_ms": 0.5, "backward_comm_ms": 0.25},
        **{"forward_gather_ms": 0.1, "backward_gather_ms": 0.2, "step_gather_ms": 0.7},
        **{"micro_reduce_ms": 1, "step_reduce_ms": 6, "optimizer_ms": 0.3},
    )
    # Forward beside its gather: 2 + 0.1 · 0.1. Two backwards beside 1.2 ms of gather and reduction:
    # 4 + 0.1 · 1.2; the last beside 7.2 ms: 7.2 + 0.1 · 4.
    expected = 3 * (2.01 + 0.5 + 0.25) + 2 * 4.12 + 7.6 + 0.7 + 0.3
    assert layer_step_ms(layer, 3, 1.1) == pytest.approx(expected)


def test_the_largest_transient_counts_once_and_the_price_agrees_with_the_search() -> None:
    a, b = Strategy(1, 4), Strategy(2, 2)
    entries = {
        (0, a, 1): cost(forward_ms=1, saved_bytes=10, transient_bytes=100),
        (0, b, 1): cost(forward_ms=2, saved_bytes=12, transient_bytes=5),
    }
    table = CostTable(
        (0, 0, 0), ("x",), (a, b), (1,), entries, {}, (), 1.0, 4, 16, {}
    )  # fmt: skip
    assert run_partition(table, 130).strategies == (a, a, a)
    # One layer of a would not do: its transient is what does not fit.
    plan = run_partition(table, 129)
    assert plan.strategies == (b, b, b)
    assert plan.predicted["memory_bytes"] == 41
    assert price(table, plan) == plan.predicted


def test_tied_layers_share_a_strategy_even_where_it_is_slower() -> None:
    a, b = Strategy(1, 4), Strategy(2, 2)
    entries = {(i, s, 1): cost(forward_ms=1 + (s == (a, b)[i])) for i in (0, 1) for s in (a, b)}
    table = CostTable(
        (0, 0, 1), ("e", "h"), (a, b), (1,), entries, {}, ((0, 2),), 1.0, 4, 16, {}
    )  # fmt: skip
    plan = run_partition(table, 10)
    assert plan.strategies[0] == plan.strategies[2]
    free = run_partition(replace(table, same_strategy=()), 10)
    assert free.strategies[0] != free.strategies[2]
    with pytest.raises(PlanError, match="tied parameters need one strategy"):
        price(table, make_plan(table, free.strategies, 1))


def test_infeasible_quotes_a_plan_that_does_fit_the_smallest_memory() -> None:
    table = random_table(random.Random(3))
    smallest = min(memory for _, _, memory in brute_force(table))
    with pytest.raises(InfeasibleError) as error:
        run_partition(table, smallest - 1)
    text = str(error.value).split("with the plan '")[1].split("'")[0]
    names = [f"layer{index}" for index in range(len(table.layers))]
    plan = notation.parse(text, names, 4, 16)
    assert price(table, plan)["memory_bytes"] == smallest


def test_pricing_refuses_a_strategy_that_the_table_does_not_offer() -> None:
    a, b = Strategy(1, 4), Strategy(2, 2)
    table = CostTable(
        (0,), ("x",), (a, b), (1,), {(0, a, 1): cost(forward_ms=1)}, {}, (), 1.0, 4, 16,
        {(0, b): "3 heads do not divide by tp 2"},
    )  # fmt: skip
    with pytest.raises(PlanError, match=r"tp2\.dp2: 3 heads do not divide by tp 2"):
        price(table, make_plan(table, (b,), 1))
    with pytest.raises(PlanError, match="no costs for 2 micro-batches"):
        price(table, make_plan(table, (a,), 2))


def test_a_table_for_another_batch_or_model_is_refused() -> None:
    table = random_table(random.Random(1))
    names = [f"layer{index}" for index in range(len(table.layers))]
    with pytest.raises(PlanError, match="global batch of 16, not 32"):
        partition(table, 10**9, model="m", layer_names=names, global_batch_size=32)
    with pytest.raises(PlanError, match="annotate this model again"):
        partition(table, 10**9, model="m", layer_names=[*names, "x"], global_batch_size=16)


def test_the_best_plan_is_never_slower_than_a_candidate_that_fits() -> None:
    for seed in range(20):
        table = random_table(random.Random(seed))
        found = brute_force(table)
        if not found:
            continue
        limit = sorted(memory for _, _, memory in found)[len(found) // 2]
        names = [f"layer{index}" for index in range(len(table.layers))]
        report = search(table, limit, model="m", layer_names=names, global_batch_size=16)
        assert len(report.candidates) + report.num_left_out == len(table.strategies)
        for candidate in report.candidates:
            if candidate.fits:
                assert candidate.predicted["step_ms"] >= report.best.predicted["step_ms"]
                assert candidate.predicted["memory_bytes"] <= limit


def test_planning_does_not_import_torch() -> None:
    modules = "costs, errors, notation, plan, search_report, strategy"
    passes = "chain, partition, pricing, strategies"
    code = (
        f"from galvatron_compile import {modules}\nfrom galvatron_compile.passes import {passes}\n"
        "import sys\nassert not {'torch', 'scipy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
