"""Alike layers under a capacity, against trying everything."""

from __future__ import annotations

from itertools import combinations_with_replacement

import numpy as np
import pytest

from galvatron_compile.passes.pipeline.knapsack import fill, relax
from galvatron_compile.passes.pipeline.menu import Menu

Points = list[tuple[int, int]]


def menu(points: Points) -> Menu:
    time, memory = np.array(points, dtype=np.int64).T
    return Menu(np.arange(len(points)), time, memory)


def best_of_all(menus: list[Points], counts: list[int], capacity: int) -> int | None:
    sums = {(0, 0)}
    for points, count in zip(menus, counts, strict=True):
        totals = {
            (sum(t for t, _ in chosen), sum(w for _, w in chosen))
            for chosen in combinations_with_replacement(points, count)
        }
        sums = {(a + t, b + w) for a, b in sums for t, w in totals}
    return min((time for time, memory in sums if memory <= capacity), default=None)


def random_case(seed: int) -> tuple[list[Points], list[int], int]:
    rng = np.random.default_rng(seed)
    most = int(rng.choice([5, 20, 1000]))
    menus = [
        [(int(a), int(b)) for a, b in rng.integers(0, most + 1, (rng.integers(1, 6), 2))]
        for _ in range(rng.integers(1, 4))
    ]
    counts = rng.integers(1, 5, len(menus)).tolist()
    return menus, counts, int(rng.integers(0, most * sum(counts) + 1))


@pytest.mark.parametrize("block", range(4))
def test_equal_to_trying_everything(block: int) -> None:
    for seed in range(block * 200, (block + 1) * 200):
        points, counts, capacity = random_case(seed)
        menus = [menu(each) for each in points]
        best = best_of_all(points, counts, capacity)
        filling = fill(menus, counts, capacity)
        if best is None:
            assert filling is None and relax(menus, counts, capacity) is None, seed
            continue
        assert filling is not None and filling.time_ns == best, seed
        assert [sum(chosen.values()) for chosen in filling.picks] == counts
        picked = [
            (points[j][option], n)
            for j, chosen in enumerate(filling.picks)
            for option, n in chosen.items()
        ]
        assert sum(time * n for (time, _), n in picked) == best
        assert sum(memory * n for (_, memory), n in picked) <= capacity
        relaxed = relax(menus, counts, capacity)
        assert relaxed is not None and relaxed.bound <= best * (1 + 1e-12)
        # A limit excludes what is not below it, and nothing else.
        assert fill(menus, counts, capacity, best) is None
        below = fill(menus, counts, capacity, best + 1)
        assert below is not None and below.time_ns == best


def test_a_menu_keeps_what_nothing_beats() -> None:
    kept = menu([(9, 1), (5, 4), (5, 5), (6, 4), (8, 2), (1, 9), (7, 9)])
    assert kept.options.tolist() == [0, 4, 1, 5]  # by rising memory
    assert [kept.time_ns[i] for i in kept.hull] == [9, 5, 1]  # (8, 2) lies above the line
    assert kept.slopes == [pytest.approx(4 / 3), pytest.approx(4 / 5)]


def test_the_answer_may_need_two_deviations() -> None:
    """Hand-made: the hull mixes (0, 10) and (10, 0); 13 bytes are best used by the odd ones."""
    menus = [menu([(0, 10), (10, 0), (5, 6)]), menu([(0, 10), (10, 0), (4, 7)])]
    filling = fill(menus, [1, 1], 13)
    assert filling is not None and filling.time_ns == 9
    assert filling.picks == ({2: 1}, {2: 1})


def test_many_layers_are_as_quick_as_few() -> None:
    """A million alike layers: work that grew with their number would not end."""
    options = menu([(1000, 10), (1300, 7), (1520, 5), (2100, 3)])
    filling = fill([options], [10**6], 6 * 10**6 + 1)
    assert filling is not None
    [picks] = filling.picks
    memory = {0: 10, 1: 7, 2: 5, 3: 3}
    assert sum(memory[option] * n for option, n in picks.items()) <= 6 * 10**6 + 1
    assert sum(picks.values()) == 10**6
    relaxed = relax([options], [10**6], 6 * 10**6 + 1)
    assert relaxed is not None and filling.time_ns - relaxed.bound < 200
