"""The pool of ranks itself: a harness that hides failures would make every other test vacuous."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from galvatron_compile.errors import ShapeError


@dataclass(frozen=True)
class Scaled:
    factor: float

    def __call__(self, value: torch.Tensor) -> torch.Tensor:
        return value * self.factor


def summed(value: float) -> tuple[int, int, float, int]:
    total = torch.tensor([value * (dist.get_rank() + 1)])
    dist.all_reduce(total)
    return os.getpid(), dist.get_rank(), total.item(), torch.get_num_threads()


@pytest.mark.parametrize("world_size", [2, 4])
def test_every_rank_runs_with_a_process_group_and_one_thread(ranks, world_size) -> None:
    results = ranks(world_size).run(summed, 1.5)
    assert [rank for _, rank, _, _ in results] == list(range(world_size))
    assert {total for _, _, total, _ in results} == {1.5 * world_size * (world_size + 1) / 2}
    assert {threads for _, _, _, threads in results} == {1}


def test_processes_live_from_case_to_case(ranks) -> None:
    first, second = (ranks(2).run(summed, 1.0) for _ in range(2))
    assert [pid for pid, *_ in first] == [pid for pid, *_ in second]


def test_functions_and_classes_of_the_test_module_travel_by_value(ranks) -> None:
    scaled = Scaled(3.0)
    results = ranks(2).run(lambda x: scaled(x) + Scaled(1.0)(x), torch.ones(2))
    assert torch.equal(results[1], torch.full((2,), 4.0))


def test_groups_of_a_case_end_with_it(ranks) -> None:
    def leak() -> None:
        for _ in range(3):
            dist.new_group([0, 1])

    def count() -> int:
        before = len(dist.distributed_c10d._world.pg_map)
        dist.barrier()
        return before

    ranks(2).run(leak)
    assert ranks(2).run(count) == [1, 1]


def test_an_exception_comes_back_as_itself_with_the_ranks_traceback(ranks) -> None:
    def refuse() -> None:
        if dist.get_rank() == 1:
            raise ShapeError("batch 3 does not divide")
        dist.barrier()

    with pytest.raises(ShapeError, match="batch 3 does not divide") as caught:
        ranks(2).run(refuse)
    assert "on rank 1 of 2" in caught.value.__notes__[0]
    assert "in refuse" in caught.value.__notes__[0]


def test_errors_of_every_rank_can_be_asked_for(ranks) -> None:
    def refuse_odd() -> None:
        if dist.get_rank() % 2:
            raise ShapeError(f"rank {dist.get_rank()}")

    errors = ranks(4).errors(refuse_odd)
    assert [type(error) for error in errors] == [type(None), ShapeError] * 2


def test_a_rank_that_dies_is_named_and_the_pool_starts_again(ranks) -> None:
    def die() -> None:
        if dist.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(60)

    with pytest.raises(RuntimeError, match="rank 1 of 2 died with exit code -9"):
        ranks(2).run(die)
    assert len(ranks(2).run(summed, 1.0)) == 2


def test_a_rank_that_hangs_is_named_and_the_pool_starts_again(ranks) -> None:
    def hang() -> None:
        if dist.get_rank() == 0:
            time.sleep(60)

    with pytest.raises(RuntimeError, match=r"rank 0 of 2 gave no answer in 1 s"):
        ranks(2).run(hang, timeout_s=1.0)
    assert len(ranks(2).run(summed, 1.0)) == 2


def test_ranks_end_when_their_parent_dies(tmp_path: Path) -> None:
    script = tmp_path / "parent.py"
    script.write_text(
        f"import sys, os, signal; sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "from ranks import RankPool\n"
        "pool = RankPool(2)\n"
        "print(*pool.run(os.getpid), flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    out = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=60)
    pids = [int(pid) for pid in out.stdout.split()]
    assert len(pids) == 2, out.stderr
    deadline = time.monotonic() + 10
    while any(map(_alive, pids)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(_alive, pids))


def _alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except OSError:
        return False
    return state != "Z"
