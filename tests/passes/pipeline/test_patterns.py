"""Walks over layouts against every order of layouts, for any switching costs."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise, product

import numpy as np
import pytest

from galvatron_compile.passes.pipeline.patterns import PatternSearch, Run, fold, switching_ns

LAYOUTS, LENGTH = 4, 5


def run(hop: np.ndarray, join: np.ndarray | None, first: int, length: int, menu: int) -> Run:
    return Run(menu, -1, first, length, menu, hop, join)


def random_hops(rng: np.random.Generator) -> np.ndarray:
    """Far from a metric: a way round is often cheaper than the direct one, some are free."""
    hops = rng.choice([0, 1, 2, 5, 20, 90], size=(LAYOUTS, LAYOUTS)).astype(np.int64)
    if rng.random() < 0.5:  # a hub: from leaf to leaf through it is always cheaper
        hops += 200
        hops[0] = rng.integers(0, 9, LAYOUTS)
        hops[:, 0] = rng.integers(0, 9, LAYOUTS)
    np.fill_diagonal(hops, 0)
    return hops


def cheapest_orders(hops: np.ndarray) -> dict[tuple[int, ...], int]:
    """How many layers are in each layout -> the least switching of any order."""
    best: dict[tuple[int, ...], int] = {}
    for order in product(range(LAYOUTS), repeat=LENGTH):
        counts = tuple(order.count(layout) for layout in range(LAYOUTS))
        cost = sum(int(hops[a, b]) for a, b in pairwise(order))
        best[counts] = min(cost, best.get(counts, cost))
    return best


def covers(walk: tuple[int, ...], counts: tuple[int, ...]) -> bool:
    """Whether a walk leaves room for these numbers of layers per layout."""
    visits = Counter(walk)
    return all(
        counts[layout] >= visits[layout] and (counts[layout] == 0 or layout in visits)
        for layout in range(LAYOUTS)
    )


@pytest.mark.parametrize("seed", range(40))
def test_walks_reach_the_cheapest_order_of_any_mix(seed: int) -> None:
    hops = random_hops(np.random.default_rng(seed))
    runs = [run(hops, None, 0, LENGTH, 0)]
    found = list(PatternSearch(runs, [np.zeros(LAYOUTS)], np.inf).patterns())
    for counts, cost in cheapest_orders(hops).items():
        fitting = [
            switching_ns(runs, pattern.walks)
            for pattern in found
            if covers(pattern.walks[0], counts)
        ]
        assert min(fitting) == cost, (counts, hops)


def test_three_leaves_of_a_hub_need_it_twice() -> None:
    hops = np.full((LAYOUTS, LAYOUTS), 90, dtype=np.int64)
    hops[0] = hops[:, 0] = 1
    np.fill_diagonal(hops, 0)
    runs = [run(hops, None, 0, LENGTH, 0)]
    found = PatternSearch(runs, [np.zeros(LAYOUTS)], 4.0).patterns()
    walks = [pattern.walks[0] for pattern in found if covers(pattern.walks[0], (2, 1, 1, 1))]
    assert len(walks) == 1 and walks[0][1::2] == (0, 0)


@pytest.mark.parametrize("seed", range(20))
def test_excess_is_a_lower_bound_and_rises(seed: int) -> None:
    rng = np.random.default_rng(seed)
    runs = fold(
        [
            run(random_hops(rng), random_hops(rng), 0, 1, 0),
            run(random_hops(rng), random_hops(rng), 1, 3, 1),
            run(random_hops(rng), None, 4, 2, 2),
        ]
    )
    excess = [rng.integers(0, 9, LAYOUTS).astype(np.float64) for _ in runs]
    found = list(PatternSearch(runs, excess, np.inf).patterns())
    values = [pattern.excess for pattern in found]
    assert values == sorted(values) and len(set(p.content for p in found)) == len(found)
    cheapest = min(
        sum(
            excess[run_of][layout] for run_of, layout in zip((0, 1, 1, 1, 2, 2), order, strict=True)
        )
        + _switching(runs, order)
        for order in product(range(LAYOUTS), repeat=6)
    )
    assert values[0] == pytest.approx(cheapest)
    limited = list(PatternSearch(runs, excess, values[len(values) // 2]).patterns())
    assert [p.content for p in limited] == [p.content for p in found][: len(limited)]
    assert all(value > values[len(values) // 2] for value in values[len(limited) :])


def _switching(runs: list[Run], order: tuple[int, ...]) -> int:
    total = 0
    for current in runs:
        for layer in range(current.first, current.first + current.length - 1):
            total += int(current.hop_ns[order[layer], order[layer + 1]])
        end = current.first + current.length - 1
        if current.join_ns is not None:
            total += int(current.join_ns[order[end], order[end + 1]])
    return total


def test_single_layers_are_folded_but_never_two_beside_each_other() -> None:
    hops = np.zeros((LAYOUTS, LAYOUTS), dtype=np.int64)
    lengths = [1, 1, 4, 1]
    runs = [
        run(hops, hops if i < 3 else None, sum(lengths[:i]), length, i)
        for i, length in enumerate(lengths)
    ]
    folded = fold(runs)
    assert [each.folded for each in folded] == [True, False, False, True]
    assert folded[0].kinds == (-1, 1) and folded[3].kinds == (2, -1)
    assert not fold(runs[:1])[0].folded
