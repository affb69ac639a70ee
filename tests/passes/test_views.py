"""A shard and a view commute: viewing the blocks gives the blocks of the view (against numpy)."""

from __future__ import annotations

import itertools
import math

import numpy as np
import sympy
from hypothesis import given, settings
from hypothesis import strategies as st

from galvatron_compile.passes.sharding.views import can_shard, map_shard, product, quotient

BATCH = sympy.Symbol("b", integer=True, positive=True)


def block(x: np.ndarray, dim: int, outer: int, n: int, rank: int) -> np.ndarray:
    size = x.shape[dim]
    shape = (*x.shape[:dim], outer, n, size // outer // n, *x.shape[dim + 1 :])
    taken = x.reshape(shape).take(rank, axis=dim + 1)
    return taken.reshape(*x.shape[:dim], size // n, *x.shape[dim + 1 :])


@st.composite
def views(draw: st.DrawFn) -> tuple[tuple[int, ...], tuple[int, ...], int, int, int]:
    primes = draw(st.lists(st.sampled_from([2, 2, 2, 3]), min_size=1, max_size=6))

    def grouped() -> tuple[int, ...]:
        cuts = sorted(draw(st.lists(st.integers(0, len(primes)), max_size=4)))
        bounds = [0, *cuts, len(primes)]
        return tuple(math.prod(primes[a:b]) for a, b in itertools.pairwise(bounds))

    source, target = grouped(), grouped()
    n = draw(st.sampled_from([2, 3, 4]))
    return source, target, draw(st.integers(0, len(source) - 1)), draw(st.integers(1, 4)), n


@settings(max_examples=600, deadline=None)
@given(views())
def test_blocks_of_a_view_are_views_of_blocks(case: tuple) -> None:
    source, target, dim, outer, n = case
    mapped = map_shard(source, target, dim, outer, n)
    if mapped is None:
        return
    full = np.arange(math.prod(source)).reshape(source)
    j, q = mapped
    for rank in range(n):
        viewed = block(full, dim, outer, n, rank).reshape(-1)
        assert (viewed == block(full.reshape(target), j, q, n, rank).reshape(-1)).all()


@settings(max_examples=300, deadline=None)
@given(views())
def test_a_shard_is_mapped_whenever_some_output_dim_fits(case: tuple) -> None:
    source, target, dim, outer, n = case
    if not can_shard(source[dim], outer, n):
        assert map_shard(source, target, dim, outer, n) is None
        return
    full = np.arange(math.prod(source)).reshape(source)
    wanted = [block(full, dim, outer, n, rank).reshape(-1) for rank in range(n)]
    fitting = {
        (j, q)
        for j, size in enumerate(target)
        for q in range(1, size + 1)
        if can_shard(size, q, n)
        and all(
            (block(full.reshape(target), j, q, n, rank).reshape(-1) == wanted[rank]).all()
            for rank in range(n)
        )
    }
    mapped = map_shard(source, target, dim, outer, n)
    assert fitting == ({mapped} if mapped else set())


@settings(max_examples=200, deadline=None)
@given(views(), st.integers(1, 3))
def test_a_symbolic_batch_in_front_changes_nothing_but_the_dim(case: tuple, size: int) -> None:
    source, target, dim, outer, n = case
    plain = map_shard(source, target, dim, outer, n)
    assert map_shard((BATCH, *source), (BATCH, *target), dim + 1, outer, n) == (
        plain and (plain[0] + 1, plain[1])
    )
    for full, viewed in [((BATCH, *source), (product([BATCH, *source]),))]:
        assert map_shard(full, viewed, 0, 1, BATCH) == (0, 1)


def test_merging_batch_and_sequence_makes_the_batch_the_outer_factor() -> None:
    merged = map_shard((BATCH, 8, 4), (BATCH * 8, 4), 1, 1, 2)
    assert merged == (0, BATCH)
    assert map_shard((BATCH * 8, 4), (BATCH, 8, 4), 0, BATCH, 2) == (1, 1)


def test_a_batch_behind_another_dim_keeps_that_dim_outside() -> None:
    assert map_shard((6, BATCH), (6 * BATCH,), 1, 1, BATCH) == (0, 6)


def test_heads_that_do_not_divide_by_the_ranks_are_not_split() -> None:
    assert map_shard((3, 16), (3, 2, 8), 1, 1, 2) == (1, 1)
    assert map_shard((3, 16), (3, 2, 8), 1, 1, 4) is None


def test_quotients_hold_for_every_batch_size() -> None:
    assert quotient(BATCH * 12, BATCH) == 12
    assert quotient(BATCH * 12, 4) == 3 * BATCH
    assert quotient(BATCH * 6, 4) is None
    assert quotient(BATCH + 4, BATCH) is None
    assert quotient(12, BATCH) is None
    assert quotient(BATCH * 4 + 8, 4) == BATCH + 2
