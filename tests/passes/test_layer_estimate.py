"""Time of a layer from its operators: kernels, and the host that dispatches them."""

from __future__ import annotations

from dataclasses import replace

import pytest

from galvatron_compile.cluster import ClusterProfile
from galvatron_compile.compiler import understand
from galvatron_compile.facts import Device, Fact
from galvatron_compile.graph import LayeredGraph
from galvatron_compile.models import DecoderShape, load_shape
from galvatron_compile.passes.fusion import fuse
from galvatron_compile.passes.layer_estimate import Estimator, Execution, Tallies
from galvatron_compile.passes.sharding.table import ShardingTable, shard
from galvatron_compile.precision import Precision
from galvatron_compile.strategy import Strategy

BLOCK = 1
ALONE, DIVIDED = Strategy(1, 2), Strategy(2, 1)
Model = tuple[LayeredGraph, ShardingTable, Tallies]


@pytest.fixture(scope="module")
def model() -> Model:
    made = load_shape("tiny", DecoderShape(256, 2, 4, 4, 512, 512, 128))
    layered = understand(made.module, made.example_inputs, None, Precision.parse("bf16"))
    return layered, shard(layered, [ALONE, DIVIDED]), {}


def cluster(host_ms: float) -> ClusterProfile:
    found = ClusterProfile.preset("2xA100-80GB")
    return replace(found, launch_overhead_ms=Fact(host_ms, "measured in a test"))


def estimator(model: Model, host_ms: float) -> Estimator:
    layered, shardings, counts = model
    return Estimator(layered, shardings, cluster(host_ms), counts)


def test_a_phase_takes_the_longer_of_kernels_and_host(model: Model) -> None:
    free, slow = estimator(model, 0.0), estimator(model, 1.0)
    kernels, host = (e.computation(BLOCK, ALONE, 1) for e in (free, slow))
    small, _ = slow.tallies_of(BLOCK, ALONE)
    assert host.forward_ms == len(small.forward) and host.backward_ms == len(small.backward) / 2
    assert 0 < kernels.forward_ms < host.forward_ms
    # A host that takes as long as half of the kernels hides under them.
    hidden = kernels.forward_ms / len(small.forward) / 2
    assert estimator(model, hidden).computation(BLOCK, ALONE, 1).forward_ms == kernels.forward_ms
    # Kernels grow with the batch, dispatching does not.
    assert slow.computation(BLOCK, ALONE, 4).forward_ms == host.forward_ms
    assert free.computation(BLOCK, ALONE, 4).forward_ms > kernels.forward_ms


def test_collectives_hide_the_host_as_kernels_do(model: Model) -> None:
    slow = estimator(model, 1.0)
    sharded = model[1].get(BLOCK, DIVIDED)
    forward_ms, _ = slow.collectives_ms(sharded, 1)
    small, _ = slow.tallies_of(BLOCK, DIVIDED)
    calls = len([c for c in small.forward if c.num_bytes])
    calls += sum(item.direction == "forward" for item in sharded.collectives)
    assert forward_ms > 0
    found_ms = slow.computation(BLOCK, DIVIDED, 1).forward_ms
    assert found_ms + forward_ms == pytest.approx(calls)


def test_on_the_cpu_every_operator_takes_its_call(model: Model) -> None:
    layered, shardings, _ = model
    profile = replace(cluster(1.0), device=Device("a CPU", "cpu", 2**30))
    found = Estimator(layered, shardings, profile)
    small, _ = found.tallies_of(BLOCK, ALONE)
    assert found.computation(BLOCK, ALONE, 1).forward_ms == len(small.forward)
    assert len(small.forward) > len(estimator(model, 0.0).tallies_of(BLOCK, ALONE)[0].forward)


def test_counts_are_shared_before_fusion(model: Model) -> None:
    layered, shardings, counts = model
    plain = estimator(model, 0.0).tallies_of(BLOCK, ALONE)[0]
    fused = Estimator(layered, shardings, cluster(0.0), counts, Execution(fuse))
    assert len(fused.tallies_of(BLOCK, ALONE)[0].forward) < len(plain.forward)
    assert counts[BLOCK, 1, False][0] is plain
    assert fused.computation(BLOCK, ALONE, 2).forward_ms < estimator(model, 0.0).computation(
        BLOCK, ALONE, 2
    ).forward_ms


def test_the_part_that_selective_recompute_repeats_is_less_than_the_whole(model: Model) -> None:
    for host_ms in (0.0, 0.01, 1.0):
        found = estimator(model, host_ms)
        part = found.part(BLOCK, ALONE, 2, "memory")
        whole = found.computation(BLOCK, ALONE, 2)
        assert 0 < part.forward_ms < whole.forward_ms


def test_products_that_leave_processors_idle_take_longer(model: Model) -> None:
    found = estimator(model, 0.0)
    small, _ = found.tallies_of(BLOCK, ALONE)
    count = next(c for c in small.forward if c.product is not None)
    large = replace(count, flops=10**12, num_bytes=1)
    whole = replace(large, product=(1, 108 * 256, 128 * 64, 8192))
    thin = replace(large, product=(1, 256, 128, 512))
    assert found.operator_ms(thin) > 1.5 * found.operator_ms(whole)
