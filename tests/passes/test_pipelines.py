"""Which pipelines are worth pricing."""

from __future__ import annotations

import itertools

import pytest

from galvatron_compile.constraints import Constraints
from galvatron_compile.passes.pipelines import Space, families
from galvatron_compile.schedules import bubble_share, in_flight, why_not


def texts(space: Space, constraints: str = "") -> list[str]:
    return [str(family) for family in families(space, Constraints.parse(constraints))]


def test_small_space() -> None:
    assert texts(Space(4, 4, 2)) == [
        "pp 1, 1 micro-batches, 1f1b",
        "pp 1, 2 micro-batches, 1f1b",
        "pp 2, 1 micro-batches, gpipe",
        "pp 2, 2 micro-batches, 1f1b",
        "pp 2, 2 micro-batches, interleaved, 2 stages a group",
        "pp 2, 2 micro-batches, zero-bubble",
        "pp 4, 1 micro-batches, gpipe",
        "pp 4, 2 micro-batches, gpipe",
    ]


@pytest.mark.parametrize(
    ("constraints", "number"),
    [
        ("pp=2; micro=2; schedule=1f1b", 1),
        ("pp=2; micro=2; schedule=gpipe", 1),  # without 1f1b it is the best there is
        ("pp=3", 0),
        ("micro=5", 0),
        ("virtual=1; pp=2; micro=2", 2),
        ("schedule=interleaved; pp>=2", 1),
        ("schedule=interleaved", 1),  # one stage has no schedule, so not that one either
    ],
)
def test_constraints_choose(constraints: str, number: int) -> None:
    assert len(texts(Space(4, 4, 2), constraints)) == number


def test_gpipe_is_never_better_than_1f1b_where_both_run() -> None:
    assert bubble_share("gpipe") == bubble_share("1f1b")
    for pp, m in itertools.product(range(1, 6), range(1, 9)):
        if why_not("1f1b", pp, m) is None:
            for group in range(pp):
                (ours,) = in_flight("1f1b", pp, m, 1, group)
                (theirs,) = in_flight("gpipe", pp, m, 1, group)
                assert ours <= theirs
