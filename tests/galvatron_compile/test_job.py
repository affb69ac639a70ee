"""Ranks fail together."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from typing import Any

import torch

from galvatron_compile.errors import PeerError, PlanError, ShapeError
from galvatron_compile.job import Job
from galvatron_compile.work import Cores


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


def measure_then_compile(port: int) -> tuple[bool, bool]:
    """As a script under torchrun that makes no process group itself."""
    import os

    import torch.distributed as dist

    from galvatron_compile import profiling
    from galvatron_compile.job import Job

    place = {"RANK": dist.get_rank(), "WORLD_SIZE": dist.get_world_size(), "MASTER_PORT": port}
    dist.destroy_process_group()
    os.environ.update({"MASTER_ADDR": "127.0.0.1"}, **{k: str(v) for k, v in place.items()})
    try:
        profile = profiling.measure(sizes=profiling.Sizes((16, 32), (8,), 2, 2**16, (1024,), 0.005))
        made = dist.group.WORLD
        job = Job.current(torch.nn.Linear(1, 1))
    finally:
        for name in ("MASTER_ADDR", *place):
            del os.environ[name]
    return made is not None and made is dist.group.WORLD, job.world_size == profile.world_size == 2


def test_measuring_and_compiling_share_one_group(ranks: Callable[[int], Any]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    assert ranks(2).run(measure_then_compile, port) == [(True, True)] * 2


def test_the_error_of_one_rank_reaches_all(ranks: Callable[[int], Any]) -> None:
    errors = ranks(2).errors(one_fails)
    assert isinstance(errors[0], PeerError)
    assert "rank 1" in str(errors[0]) and "three into two" in str(errors[0])
    assert isinstance(errors[1], ShapeError)


def test_what_must_be_the_same_is_compared(ranks: Callable[[int], Any]) -> None:
    errors = ranks(2).errors(they_differ)
    assert all(isinstance(error, PlanError) for error in errors)
    assert "rank 1 differs from rank 0" in str(errors[0])


def crowd(apart: bool) -> Any:
    job = Job.current(torch.nn.Linear(1, 1))
    before = os.sched_getaffinity(0)
    all_cores = sorted(before)
    try:
        os.sched_setaffinity(0, {all_cores[job.rank % 2] if apart else all_cores[0]})
        return job.cores()
    finally:
        os.sched_setaffinity(0, before)


def one_cannot_read() -> Any:
    from unittest.mock import patch

    from galvatron_compile.seats import Seat

    job = Job.current(torch.nn.Linear(1, 1))
    own = Seat.own

    def read() -> Seat:
        if job.rank == 1:
            raise PermissionError("no control groups for you")
        return own()

    with patch.object(Seat, "own", read):
        return job.cores()


def test_a_rank_that_cannot_read_its_limits_tells_the_others(
    ranks: Callable[[int], Any],
) -> None:
    errors = ranks(2).errors(one_cannot_read)
    assert isinstance(errors[0], PeerError) and "no control groups for you" in str(errors[0])
    assert isinstance(errors[1], PermissionError)


def test_ranks_on_one_machine_share_the_cores_they_may_use(ranks: Callable[[int], Any]) -> None:
    """The ranks of the pool have one thread each."""
    one_core = Cores(0, 1, 1)
    assert ranks(2).run(crowd, False) == [(one_core, one_core)] * 2
    assert Job(0, 1, torch.device("cpu")).cores() == ()
    if len(os.sched_getaffinity(0)) > 1:
        assert ranks(2).run(crowd, True) == [(), ()]  # nobody has to share
        pools = [found.pool for found in ranks(4).run(crowd, True)[0]]
        assert pools == [0, 1, 0, 1]
