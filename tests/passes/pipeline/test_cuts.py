"""Partitions against trying all of them, for any times of the stages."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest

from galvatron_compile.passes.pipeline.bounds import FAR
from galvatron_compile.passes.pipeline.closed_form import Objective
from galvatron_compile.passes.pipeline.cuts import Cutter
from galvatron_compile.passes.pipeline.ranges import ranges, runs


def random_cutter(seed: int) -> tuple[Cutter, np.ndarray, list[tuple[int, ...]]]:
    """A cutter, times without any order among them (some never), and all partitions."""
    rng = np.random.default_rng(seed)
    num_layers = int(rng.integers(2, 13))
    num_stages = int(rng.integers(1, min(num_layers, 5) + 1))
    num_kinds = 2 if rng.random() < 0.5 else num_layers
    found = ranges(tuple(rng.integers(0, num_kinds, num_layers).tolist()))
    row_of = rng.integers(0, 3, num_stages).tolist()
    size = int(rng.choice([4, 30, 10**6]))
    times = rng.integers(0, size + 1, (3, found.num))
    if rng.random() < 0.7:  # longer stages take longer: more partitions worth a thought
        times = times + size * found.length
    times[rng.random(times.shape) < rng.choice([0.0, 0.3, 0.7])] = FAR
    objective = Objective(1, int(rng.choice([0, 1, 3, 8])), 1)
    inner = combinations(range(1, num_layers), num_stages - 1)
    partitions = [(0, *edges, num_layers) for edges in inner]
    return Cutter(found, row_of, objective), times.astype(np.int64), partitions


@pytest.mark.parametrize("block", range(5))
def test_the_best_partition_of_all(block: int) -> None:
    for seed in range(block * 100, (block + 1) * 100):
        cutter, times, partitions = random_cutter(seed)
        priced = [p for p in (cutter.price(times, edges) for edges in partitions) if p]
        best = cutter.best(times, None)
        if not priced:
            assert best is None, seed
            assert cutter.lowest_peak(times) is None, seed
            continue
        least = min(partition.value for partition in priced)
        assert best is not None and best.value == least, seed
        assert cutter.price(times, best.edges) == best
        for start in priced[:3]:  # a known partition narrows the search, it does not mislead it
            again = cutter.best(times, start)
            assert again is not None and again.value == least, seed
        peak = cutter.lowest_peak(times)
        assert peak is not None, seed
        assert peak[0] == min(partition.slowest for partition in priced), seed
        at_peak = cutter.price(times, peak[1])
        assert at_peak is not None and at_peak.slowest == peak[0]


def test_a_slower_slowest_stage_can_be_worth_it() -> None:
    """By hand: 4 + 4 with a sum of 8, or 5 + 1; which is better depends on the weights."""
    found = ranges((0, 1, 2))
    times = np.full((1, found.num), FAR)
    for (first, last), time in {(0, 1): 4, (1, 3): 4, (0, 2): 5, (2, 3): 1}.items():
        times[0, found.alike[last, last - first]] = time
    for max_weight, edges in [(1, (0, 2, 3)), (3, (0, 1, 3))]:
        best = Cutter(found, [0, 0], Objective(1, max_weight, 1)).best(times, None)
        assert best is not None and best.edges == edges


def test_ranges_number_what_looks_alike() -> None:
    found = ranges((7, 1, 1, 1, 2))
    assert found.alike[2, 1] == found.alike[3, 1] == found.alike[4, 1]
    assert found.alike[3, 2] == found.alike[4, 2] != found.alike[2, 2]
    assert found.alike[1, 2] == found.num  # no range of two ends after the first layer
    assert (found.length[found.alike[5, 3]], found.first[found.alike[5, 3]]) == (3, 2)
    assert runs((7, 1, 1, 1, 2)) == [(0, 1), (1, 3), (4, 1)]
