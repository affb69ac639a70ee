"""Prices by Galvatron's formulas: worked out by hand, and its own price of its own plan."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest

from galvatron_compile import notation
from galvatron_compile.errors import GalvatronError, PlanError, ProfileError, UnsupportedError
from galvatron_compile.galvatron import plans
from galvatron_compile.galvatron.formulas import (
    MB,
    Workload,
    end_times,
    layer_memory,
    layer_time,
    states_share,
)
from galvatron_compile.galvatron.pricing import (
    MemoryLimit,
    exposed_ms,
    pipeline_ms,
    price,
)
from galvatron_compile.galvatron.profile import (
    Ends,
    Exchange,
    GalvatronProfile,
    Line,
    ModelProfile,
)
from galvatron_compile.plans import Plan
from galvatron_compile.strategy import Strategy

Make = Callable[..., Workload]
DEGREES = (1, 2, 4)


@pytest.fixture
def work() -> Workload:
    """Round numbers, so that prices can be worked out by hand. A sample's message is 1 MB."""
    by_degree = {d: 1600.0 / d for d in DEGREES}
    kept = {d: 40.0 / d for d in DEGREES}
    model = ModelProfile(
        layer_ms=Line(2.0, 1.0),
        ends_ms=Line(1.0, 2.0),
        parameter_mb=400.0,
        activation_mb={d: 100.0 / d for d in DEGREES},
        recomputed_mb=8.0,
        whole=Ends(by_degree, kept),
        first=Ends({d: 800.0 / d for d in DEGREES}, {d: 10.0 / d for d in DEGREES}),
        last=Ends({d: 960.0 / d for d in DEGREES}, {d: 30.0 / d for d in DEGREES}),
    )
    profile = GalvatronProfile(
        directory="made",
        model="made",
        precision="bf16",
        num_nodes=1,
        gpus_per_node=4,
        models={1024: model},
        bandwidth={(4, True): 100.0, (2, True): 50.0, (2, False): 25.0},
        p2p={2: 10.0, 4: 5.0},
        all_reduce={d: Exchange({4.0: 3.0}, Line(0.5, 0.25)) for d in (2, 4)},
        all_to_all={d: Exchange({4.0: 0.5}, Line(0.125, 0.0)) for d in (2, 4)},
        overlap=1.5,
        files={"memory": "memory.json", "bandwidth": "b.json", "times": "t.json", "p2p": "p.json"},
        plan_path=None,
    )
    return Workload(profile, 4, 1024, 8, 4, 512)


def strategy(words: str, ranks: int = 4) -> Strategy:
    return notation.parse(words, ["layer"], ranks, 64).strategies[0]


def test_a_message(work: Workload) -> None:
    assert work.message_mb(1) == 1.0


def test_data_parallel_layer(work: Workload) -> None:
    time = layer_time(work, strategy("dp4.zero2"), 1, 1)
    forward = 2.0 * 2 + 1  # two samples on a GPU
    whole = 3 / 4 * 400 / 100  # (d - 1) / d of 2-byte gradients, sent twice
    assert time.unsynchronised_ms == pytest.approx(3 * forward)
    assert time.synchronised_ms == pytest.approx(3 * forward + 0.5 * whole)
    zero3 = layer_time(work, strategy("dp4.zero3.recompute"), 1, 1)
    assert zero3.unsynchronised_ms == pytest.approx(4 * forward + 0.5 * whole)


def test_slow_synchronisation_hides_the_backward(work: Workload) -> None:
    slow = {**work.profile.bandwidth, (4, True): 1.0}
    work = replace(work, profile=replace(work.profile, bandwidth=slow))
    time = layer_time(work, strategy("dp4.zero2"), 1, 1)
    assert time.synchronised_ms == pytest.approx(5 + 300 + 0.5 * 10)


def test_tensor_parallel_layer(work: Workload) -> None:
    time = layer_time(work, strategy("tp2.sp.dp2.zero2"), 1, 1)
    forward = 2.0 * (4 / 2) + 1
    exchange = 6 * (3.0 / 2)  # the table's entry of 4 MB
    assert time.unsynchronised_ms == pytest.approx(3 * forward + exchange)
    whole = 1 / 2 * 200 / 25  # half the parameters, over strided ranks
    assert time.sync_ms == pytest.approx(0.5 * whole)
    again = layer_time(work, strategy("tp2.sp.dp2.zero2.recompute"), 1, 1)
    assert again.exchange_ms == pytest.approx(1.5 * exchange)
    alone = layer_time(work, strategy("tp4.sp"), 1, 1)
    assert alone.exchange_ms == pytest.approx(6 * (0.5 * 8 + 0.25) / 2)  # 8 MB: the fitted line
    assert alone.sync_ms == 0


def test_ulysses_layer(work: Workload) -> None:
    time = layer_time(work, strategy("ulysses2.dp2.zero3"), 1, 1)
    whole = 3 / 4 * 400 / 100  # states divide over all four
    expected = 3 * (2.0 * (4 / 2) + 1) + 4 * 0.5 + 0.5 * whole
    assert time.unsynchronised_ms == pytest.approx(expected)
    assert time.sync_ms == pytest.approx(0.5 * whole)
    assert layer_time(work, strategy("ulysses4"), 1, 1).sync_ms == 0  # dp 1: none


def test_sends_between_stages_spread_over_layers(work: Workload) -> None:
    time = layer_time(work, strategy("dp2.zero2", 2), 2, 4)
    assert time.p2p_ms == pytest.approx(2 * 2 * 1.0 / 10.0 / 4)


def test_embedding_and_head(work: Workload) -> None:
    (time,) = end_times(work, strategy("dp4.zero2"), 1, 1)
    assert time.unsynchronised_ms == pytest.approx(3 * 4.0)
    (zero3,) = end_times(work, strategy("dp4.zero3"), 1, 1)
    message = 0.25 * (3 / 4) * 400 / 100
    assert zero3.unsynchronised_ms == pytest.approx(3 * 4.0 + 2 * message * (1 - 1 / 1.5))
    (tensor,) = end_times(work, strategy("tp2.sp.dp2.zero2"), 1, 1)
    assert tensor.exchange_ms == pytest.approx(2 * 3.0 / 2)
    first, last = end_times(work, strategy("tp2.sp", 2), 2, 2)
    assert first.exchange_ms == last.exchange_ms == pytest.approx(3.0 / 2)
    assert first.computation_ms == pytest.approx(3 * (4 / 2 + 2.0) / 2)


def test_memory_of_a_layer(work: Workload) -> None:
    assert states_share(strategy("dp4.zero0"), 1) == 1
    assert states_share(strategy("dp4.zero2"), 1) == pytest.approx(7 / 8 * 0.253 + 1 / 8)
    assert states_share(strategy("dp4.zero2"), 2) == pytest.approx(6 / 8 * 0.253 + 2 / 8)
    assert states_share(strategy("ulysses2.dp2.zero3"), 1) == pytest.approx(0.253)
    assert states_share(strategy("dp4.zero3"), 2) == pytest.approx(7 / 8 * 0.253 + 1 / 8)
    states, kept = layer_memory(work, strategy("tp2.sp.dp2.zero0"), 1, 3)
    assert (states, kept) == (pytest.approx(800), pytest.approx(50 * 4 * 3))
    _, kept = layer_memory(work, strategy("tp2.sp.dp2.zero0.recompute"), 1, 3)
    assert kept == pytest.approx(8 / 2 * 4 * 3)


@pytest.mark.parametrize(
    ("stages", "chunks", "expected"),
    [
        ([10.0], 4, 40.0),
        ([10.0, 10.0], 2, 30.0),  # balanced: (m + P - 1) stages
        ([10.0, 10.0, 10.0, 10.0], 8, 110.0),
        ([5.0, 20.0], 4, 85.0),  # the last stage is the slowest
        ([20.0, 5.0], 4, 80.0),  # the first is, and it is all that counts
    ],
)
def test_pipeline(stages: list[float], chunks: int, expected: float) -> None:
    assert pipeline_ms(stages, chunks) == pytest.approx(expected)


def test_exposed_synchronisation() -> None:
    assert exposed_ms([10.0, 10.0], [12.0, 15.0]) == 2.0
    assert exposed_ms([10.0, 10.0], [9.0, 25.0]) == 5.0
    assert exposed_ms([10.0], [9.0]) == 0.0


def test_a_whole_plan(work: Workload) -> None:
    plan = parsed(work, "dp4.zero2; 1-2: dp4.zero3.recompute")
    cost = price(work, plan)
    layers = [15.0, 15.0, 21.5, 21.5]
    assert cost.step_ms == pytest.approx(sum(layers) + 12.0)
    assert math.fsum(cost.parts_ms.values()) == pytest.approx(cost.step_ms)
    (stage,) = cost.stages
    two, three = 7 / 8 * 0.253 + 1 / 8, 0.253
    sizes = [1600 * two + 200, 1600 * two + 200, 1600 * three + 16, 1600 * three + 16]
    ends = 1600 * two + 80 + 1024
    assert stage.rounded_mb == sum(map(math.ceil, sizes)) + math.ceil(ends)
    assert stage.exact_bytes == pytest.approx((sum(sizes) + ends) * MB, abs=1)
    assert stage.buffer_mb == 0


def test_the_buffer_of_tensor_parallelism(work: Workload) -> None:
    tensor = price(work, parsed(work, "dp4.zero2; 1: tp2.sp.dp2.zero2"))
    assert tensor.stages[0].buffer_mb == pytest.approx(8 / (4 / 2))
    layers = [200 + 4 * 400 * 0.346375] * 3 + [200 + 4 * 200 * (7 / 8 * 0.503 + 1 / 8)]
    ends = 1600 * 0.346375 + 80 + 1024
    assert tensor.stages[0].rounded_mb == sum(map(math.ceil, [*layers, ends])) + 4
    wider = price(work, parsed(work, "ulysses4; 1: tp2.sp.dp2.zero2"))
    assert wider.stages[0].buffer_mb == pytest.approx(8.0)
    assert price(work, parsed(work, "ulysses4")).stages[0].buffer_mb == 0


@pytest.mark.parametrize("schedule", ["1f1b", "gpipe"])
def test_stages_keep_what_is_in_flight(work: Workload, schedule: str) -> None:
    plan = parsed(work, f"dp2.zero2; pp=2; micro=4; schedule={schedule}")
    cost = price(work, plan)
    first, last = cost.stages
    alive = (2, 1) if schedule == "1f1b" else (4, 4)
    assert first.activations_mb == pytest.approx(2 * 100 * alive[0])
    assert last.activations_mb == pytest.approx(2 * 100 * alive[1])
    assert first.end_activations_mb == pytest.approx(10 * alive[0])
    assert last.end_activations_mb == pytest.approx(30 * alive[1])
    assert math.fsum(cost.parts_ms.values()) == pytest.approx(cost.step_ms)
    assert cost.parts_ms["pipeline bubble and imbalance"] > 0


@pytest.mark.parametrize(
    ("words", "error", "message"),
    [
        ("tp2.dp2", UnsupportedError, "write tp2.sp"),
        ("cp2.dp2", UnsupportedError, "context and expert"),
        ("dp4.zero1", UnsupportedError, "ZeRO-1"),
        ("dp4; 1: dp4.selective", UnsupportedError, "selective"),
        ("dp4; 5: dp4.zero3", UnsupportedError, "embedding and head one strategy"),
        ("dp4.recompute", UnsupportedError, "does not recompute embedding"),
        ("dp2; pp=2; micro=4; schedule=zero-bubble", UnsupportedError, "no schedule"),
        ("dp2; pp=2", PlanError, "do not fill 2 stages; use at least micro=2"),
    ],
)
def test_what_has_no_term_is_refused(
    work: Workload, words: str, error: type[GalvatronError], message: str
) -> None:
    with pytest.raises(error, match=message):
        price(work, parsed(work, words))


def test_a_plan_of_another_model_is_refused(work: Workload) -> None:
    plan = notation.parse("dp4", plans.layer_names(5), 4, 8)
    with pytest.raises(PlanError, match="it has 7 layers, this one has 6"):
        price(work, plan)
    with pytest.raises(ProfileError, match="measured on 4 GPUs, not 8"):
        Workload(work.profile, 8, 1024, 8, 4, 512)


def test_memory_as_galvatron_limits_it() -> None:
    limit = MemoryLimit(36 * 1024 * MB)
    assert (limit.gpu_mb, limit.plan_mb, limit.plan_units) == (36864, 29492, 29492)
    assert MemoryLimit(20 * 1024 * MB).plan_mb == 20 * 1024  # nothing is kept of small ones
    exact = MemoryLimit(36 * 1024 * MB, exact=True)
    assert exact.plan_units == 29492 * MB
    assert (limit.units(1.25), exact.units(1.25)) == (2, 1310720)
    for units in (5000, 21503, 21504, 29492, 60001):
        least = limit.gpu_mb_for(units)
        assert MemoryLimit(least * MB).plan_mb >= units > MemoryLimit((least - 1) * MB).plan_mb


def test_galvatrons_own_plan(llama_work: Workload) -> None:
    path = llama_work.profile.plan_path
    assert path is not None
    cost = price(llama_work, plans.load(path, 8))
    assert cost.step_ms == pytest.approx(1086.046124, abs=1e-6)
    assert math.fsum(cost.parts_ms.values()) == pytest.approx(cost.step_ms)
    assert cost.fits(MemoryLimit(36 * 1024 * MB))


def parsed(work: Workload, words: str) -> Plan:
    names = plans.layer_names(work.num_layers)
    return notation.parse(words, names, work.num_gpus, work.global_batch_size)
