"""The search against every plan of small instances, and on the profile that Galvatron ships."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import combinations_with_replacement, product
from random import Random

import pytest

from galvatron_compile.errors import PlanError
from galvatron_compile.galvatron.formulas import MB, Workload
from galvatron_compile.galvatron.plans import layer_names
from galvatron_compile.galvatron.pricing import MemoryLimit, price
from galvatron_compile.galvatron.search import best_of, search, uniform
from galvatron_compile.galvatron.space import spaces
from galvatron_compile.plans import Plan, Stage
from galvatron_compile.strategy import Strategy

Make = Callable[..., Workload]


def strategies(ranks: int) -> Iterator[Strategy]:
    """Of a layer on ``ranks``, written anew here; with DDP, which the search leaves out."""
    for tp, ulysses, zero, recompute in product((1, 2, 4), (1, 2, 4), (0, 2, 3), ("none", "full")):
        if ranks % (tp * ulysses) or min(tp, ulysses) > 1:
            continue
        dp = ranks // (tp * ulysses)
        if zero and dp == 1:
            continue
        yield Strategy(tp, dp, tp > 1, zero, recompute, ulysses)  # type: ignore[arg-type]


def every_plan(work: Workload, pp: int, chunks: int) -> Iterator[Plan]:
    """Layers of a stage in one order only: their order costs nothing."""
    menu = list(strategies(work.num_gpus // pp))
    each = work.num_layers // pp
    lengths = [each] * (pp - 1) + [work.num_layers - each * (pp - 1)]
    edges = [0]
    for length in lengths:
        edges.append(edges[-1] + length)
    firsts = [0, *(edge + 1 for edge in edges[1:-1])]
    lasts = [*firsts[1:], work.num_layers + 2]
    stages = tuple(Stage(a, b) for a, b in zip(firsts, lasts, strict=True)) if pp > 1 else ()
    choices = [list(combinations_with_replacement(menu, length)) for length in lengths]
    for ends in menu:
        if ends.recompute != "none":
            continue
        for chosen in product(*choices):
            layers = [strategy for stage in chosen for strategy in stage]
            try:
                yield Plan(
                    "", work.num_gpus, work.global_batch_size, chunks,
                    layer_names(work.num_layers), (ends, *layers, ends), stages,
                )  # fmt: skip
            except PlanError:
                continue  # the batch does not split so far


def sized(work: Workload, random: Random, exact: bool) -> MemoryLimit:
    """Somewhere between what nothing fits in and what everything fits in."""
    whole = 1500 + work.num_layers * 4 * work.model.parameter_mb
    whole += work.num_layers * work.model.activation_mb[1] * work.global_batch_size
    return MemoryLimit(int(random.uniform(0.15, 0.8) * whole) * MB, exact)


def check(work: Workload, limit: MemoryLimit, pps: tuple[int, ...]) -> None:
    for space in spaces(work, limit):
        if space.pp not in pps:
            continue
        costs = [price(work, plan) for plan in every_plan(work, space.pp, space.chunks)]
        best = min((c.step_ms for c in costs if c.fits(limit)), default=None)
        found = best_of(work, space, limit.plan_units).found
        assert (found is None) == (best is None)
        if found is not None and best is not None:
            assert found.step_ps / 1e9 == pytest.approx(best, abs=1e-6)
            cost = price(work, found.plan)
            assert cost.step_ms == pytest.approx(best, abs=1e-6)
            assert cost.fits(limit)


@pytest.mark.parametrize("seed", range(40))
def test_equals_brute_force_on_two_gpus(made_work: Make, seed: int) -> None:
    random = Random(seed)
    work = made_work(2, random.randint(2, 4), random.choice([2, 4, 6]), seed)
    check(work, sized(work, random, exact=seed % 3 == 0), (1, 2))


@pytest.mark.parametrize("seed", range(8))
def test_equals_brute_force_on_four_gpus(made_work: Make, seed: int) -> None:
    random = Random(1000 + seed)
    work = made_work(4, 2, 4, 1000 + seed)
    check(work, sized(work, random, exact=seed % 2 == 0), (1,))


@pytest.mark.parametrize("seed", range(12))
def test_equals_brute_force_on_pipelines(made_work: Make, seed: int) -> None:
    random = Random(2000 + seed)
    work = made_work(4, random.randint(2, 4), 4, 2000 + seed)
    check(work, sized(work, random, exact=seed % 2 == 0), (2, 4) if work.num_layers < 4 else (4,))


@pytest.mark.parametrize("seed", range(8))
def test_equals_brute_force_on_slow_links(made_work: Make, seed: int) -> None:
    """Later stages synchronise for longer than the stages before them compute."""
    random = Random(3000 + seed)
    work = slowed(made_work(4, 2 + seed % 2, 4, 3000 + seed), 10 ** random.uniform(1, 4))
    check(work, sized(work, random, exact=False), (2,))


def test_looking_around_bounds_and_the_enumeration_closes_the_gap(made_work: Make) -> None:
    """Without it later stages' gradients would go unseen, and a worse plan would be taken."""
    differ = 0
    for seed in range(3000, 3008):
        work = slowed(made_work(4, 3, 4, seed), 1e3)
        limit = MemoryLimit(20_000 * MB)
        space = next(s for s in spaces(work, limit) if (s.pp, s.chunks) == (2, 2))
        exact = best_of(work, space, limit.plan_units)
        quick = best_of(work, space, limit.plan_units, prove=False)
        assert exact.is_exact and exact.found and quick.found
        assert quick.bound_ps <= exact.found.step_ps <= quick.found.step_ps
        differ += not quick.is_exact
    assert differ


def slowed(work: Workload, factor: float) -> Workload:
    slow = {key: value / factor for key, value in work.profile.bandwidth.items()}
    return replace(work, profile=replace(work.profile, bandwidth=slow))


def test_a_space_without_room_says_the_least_it_needs(made_work: Make) -> None:
    work = made_work(2, 3, 4, 7)
    least = min(outcome.least_units for outcome in search(work, MemoryLimit(1100 * MB)))
    assert search(work, MemoryLimit(least * MB))[0].found is not None
    assert search(work, MemoryLimit((least - 1) * MB))[0].found is None


def test_degrees_without_measurement_are_left_out_and_named(made_work: Make) -> None:
    work = made_work(4, 2, 4)
    work = replace(work, profile=replace(work.profile, all_to_all={}))
    outcomes = search(work, MemoryLimit(100_000 * MB))
    assert outcomes[0].found is not None
    assert all(s.ulysses == 1 for o in outcomes for s in o.space.strategies)
    assert any("all2all_size_2" in text for o in outcomes for text in o.space.left_out)


@pytest.mark.parametrize(("exact", "step_ms"), [(False, 1085.952), (True, 1085.858)])
def test_the_optimum_for_llama(llama_work: Workload, exact: bool, step_ms: float) -> None:
    limit = MemoryLimit(36 * 1024 * MB, exact)
    best, *others = search(llama_work, limit)
    assert best.found is not None
    cost = price(llama_work, best.found.plan)
    assert cost.step_ms == pytest.approx(step_ms, abs=1e-3)
    assert cost.fits(limit)
    assert best.is_exact and all(other.is_exact for other in others)
    assert len(others) == 13  # every other number of stages and micro-batches
    assert all(o.found and o.found.step_ps > best.found.step_ps for o in others)


def test_uniform_plans_for_llama(llama_work: Workload) -> None:
    limit = MemoryLimit(36 * 1024 * MB)
    found = [uniform(llama_work, space, limit.plan_units) for space in spaces(llama_work, limit)]
    best = min((plan for plan in found if plan), key=lambda plan: plan.step_ps)
    assert best.step_ps / 1e9 == pytest.approx(1117.7, abs=0.05)
    assert price(llama_work, best.plan).step_ms == pytest.approx(best.step_ps / 1e9, abs=1e-6)
    assert len(set(best.plan.strategies[1:-1])) == 1
