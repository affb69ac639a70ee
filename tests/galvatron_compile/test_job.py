"""Ranks fail together."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from galvatron_compile.errors import PeerError, PlanError, ShapeError


def one_fails() -> int:
    from galvatron_compile.job import Job

    job = Job.current(torch.nn.Linear(1, 1))

    def step() -> int:
        if job.rank == 1:
            raise ShapeError("three into two does not go")
        return 7

    return job.together(step)


def they_differ() -> int:
    from galvatron_compile.job import Job

    job = Job.current(torch.nn.Linear(1, 1))
    return job.together(lambda: job.rank, same=str)


def test_the_error_of_one_rank_reaches_all(ranks: Callable[[int], Any]) -> None:
    errors = ranks(2).errors(one_fails)
    assert isinstance(errors[0], PeerError)
    assert "rank 1" in str(errors[0]) and "three into two" in str(errors[0])
    assert isinstance(errors[1], ShapeError)


def test_what_must_be_the_same_is_compared(ranks: Callable[[int], Any]) -> None:
    errors = ranks(2).errors(they_differ)
    assert all(isinstance(error, PlanError) for error in errors)
    assert "rank 1 differs from rank 0" in str(errors[0])
