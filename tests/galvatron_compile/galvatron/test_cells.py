"""Exact cells against every assignment."""

from __future__ import annotations

from itertools import combinations_with_replacement
from random import Random

import pytest

from galvatron_compile.galvatron.cells import bound, solve
from galvatron_compile.galvatron.labels import Cell, Function, Option


def brute_force(cell: Cell, functions: list[Function]) -> int | None:
    best = None
    for chosen in combinations_with_replacement(cell.options, cell.count):
        if sum(option.w for option in chosen) <= cell.capacity:
            c, s = sum(option.c for option in chosen), sum(option.s for option in chosen)
            value = max(a * c + b * s + g for a, b, g in functions)
            best = value if best is None else min(best, value)
    return best


def random_cell(random: Random) -> tuple[Cell, list[Function]]:
    options = tuple(
        Option(random.randint(0, 40), random.randint(0, 40), random.randint(0, 20))
        for _ in range(random.randint(1, 6))
    )
    count = random.randint(1, 7)
    functions = [
        (random.randint(0, 4), random.randint(0, 3), random.randint(-60, 60))
        for _ in range(random.randint(1, 6))
    ]
    return Cell(options, count, random.randint(0, 14 * count)), functions


@pytest.mark.parametrize("seed", range(600))
def test_equals_brute_force(seed: int) -> None:
    cell, functions = random_cell(Random(seed))
    expected = brute_force(cell, functions)
    answer = solve(cell, functions)
    if expected is None:
        assert answer is None
        return
    assert answer is not None and answer.value == expected
    assert bound(cell, functions) <= expected
    pairs = list(zip(answer.counts, cell.options, strict=True))
    assert sum(answer.counts) == cell.count and min(answer.counts) >= 0
    assert sum(n * option.w for n, option in pairs) <= cell.capacity
    assert (answer.c, answer.s) == (
        sum(n * option.c for n, option in pairs),
        sum(n * option.s for n, option in pairs),
    )
    assert max(a * answer.c + b * answer.s + g for a, b, g in functions) == answer.value


@pytest.mark.parametrize("seed", range(100))
def test_a_limit_keeps_what_is_below_it_and_nothing_else(seed: int) -> None:
    cell, functions = random_cell(Random(seed))
    answer = solve(cell, functions)
    if answer is None:
        return
    assert solve(cell, functions, answer.value) is None
    below = solve(cell, functions, answer.value + 1)
    assert below is not None and below.value == answer.value


@pytest.mark.parametrize("seed", range(100))
def test_without_labels_the_bound_holds(seed: int) -> None:
    cell, functions = random_cell(Random(seed))
    exact = solve(cell, functions)
    rough = solve(cell, functions, None, 0)
    assert (rough is None) == (exact is None)
    if rough is not None and exact is not None:
        assert rough.bound <= exact.value <= rough.value
        assert exact.bound == exact.value


def test_ten_thousand_layers_are_as_exact_as_ten() -> None:
    """Depth costs nothing: two options mix, one deviation fills the remainder."""
    cell = Cell((Option(10, 10, 7), Option(13, 13, 4), Option(11, 11, 6)), 10_000, 55_555)
    answer = solve(cell, [(1, 0, 0)])
    assert answer is not None
    # Every layer that is lighter by 3 costs 3, by 1 costs 1: 70,000 - 55,555 units are needed.
    assert answer.value == 100_000 + 14_445
