"""Measured layer times: which sizes are run, interpolation, and the cache on disk."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from galvatron_compile import layer_timing
from galvatron_compile.job import Job
from galvatron_compile.layer_timing import (
    Experiment,
    LayerTiming,
    interpolate,
    measure_layers,
)
from galvatron_compile.work import Cores

FORM = (0, 2, False)
JOB = Job(0, 1, torch.device("cpu"))
TIMINGS = {(*FORM, 2): LayerTiming(1.0, 2.0), (*FORM, 10): LayerTiming(5.0, 8.0)}


@pytest.mark.parametrize(
    ("batch", "forward_ms", "backward_ms"),
    [(2, 1.0, 2.0), (10, 5.0, 8.0), (6, 3.0, 5.0), (12, 6.0, 9.5)],
)
def test_times_between_and_beyond_are_linear(
    batch: int, forward_ms: float, backward_ms: float
) -> None:
    found = interpolate(TIMINGS, FORM, batch)
    assert found is not None
    assert (found.forward_ms, found.backward_ms) == pytest.approx((forward_ms, backward_ms))


def test_a_form_that_was_not_measured_has_no_time() -> None:
    assert interpolate(TIMINGS, (1, 2, False), 4) is None


def test_one_size_is_scaled_and_noise_never_makes_more_samples_quicker() -> None:
    found = interpolate({(*FORM, 2): LayerTiming(1.0, 2.0)}, FORM, 6)
    assert found is not None
    assert (found.forward_ms, found.backward_ms) == pytest.approx((3.0, 6.0))
    noisy = {(*FORM, 2): LayerTiming(1.0, 2.0), (*FORM, 4): LayerTiming(0.8, 2.0)}
    found = interpolate(noisy, FORM, 16)
    assert found is not None
    assert (found.forward_ms, found.backward_ms) == pytest.approx((3.2, 2.0))


# --- which sizes are timed ----------------------------------------------------------------------


def sizes_of(
    monkeypatch: pytest.MonkeyPatch,
    total_ms: Callable[[int], float],
    wanted: tuple[int, ...],
    first: int,
) -> list[int]:
    """The sizes that are run if one of ``size`` samples takes ``total_ms(size)``."""
    run: list[int] = []

    def means(forward: Callable[[], int], clock: Callable[[], float]) -> tuple[float, float]:
        size = forward()
        if total_ms(size) == math.inf:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate")
        run.append(size)
        return total_ms(size) / 3, total_ms(size) * 2 / 3

    monkeypatch.setattr(layer_timing, "_means", means)
    experiment = Experiment(FORM, "", wanted, first, lambda size: lambda: size)
    timings = measure_layers([experiment], Job(0, 1, torch.device("cpu")), None)
    assert sorted(timings) == [(*FORM, size) for size in sorted(run)]
    return run


@pytest.mark.parametrize(
    ("total_ms", "wanted", "first", "run"),
    [
        (lambda size: 0.01 * size, (4, 8, 512), 4, [4, 512]),  # quick: the ends are enough
        (lambda size: 10.0 * size, (8, 16, 64, 512), 1, [1, 16]),  # 200 ms are 20 samples
        (lambda size: 50.0 * size, (8, 16, 512), 1, [1, 4]),  # all too slow: a small pair
        (lambda size: 300.0 * size, (8, 16, 512), 1, [1]),
        (lambda size: 1.0 + 0.01 * size, (8, 128, 4096), 1, [1, 128, 4096]),  # launches, at first
        (lambda size: 1.0 * size, (8,), 8, [8]),
        (lambda size: 1.0 if size < 8 else math.inf, (8, 16, 512), 1, [1]),  # too large
        (lambda size: math.inf, (8, 16, 512), 8, []),
    ],
)
def test_no_run_is_much_longer_than_wanted_nor_too_large_for_the_memory(
    monkeypatch: pytest.MonkeyPatch,
    total_ms: Callable[[int], float],
    wanted: tuple[int, ...],
    first: int,
    run: list[int],
) -> None:
    assert sizes_of(monkeypatch, total_ms, wanted, first) == run


def test_other_errors_of_a_layer_are_raised() -> None:
    def prepare(size: int) -> Callable[[], Any]:
        raise RuntimeError("no such operator")

    with pytest.raises(RuntimeError, match="no such operator"):
        measure_layers([Experiment(FORM, "", (4,), 4, prepare)], JOB, None)


def one_rank_runs_out() -> list[Any]:
    rank = dist.get_rank()

    def prepare(size: int) -> Callable[[], Any]:
        if rank == 1 and size > 2:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        return doubling(size)

    job = Job(rank, 2, torch.device("cpu"))
    runs = [Experiment((index, 1, False), "", (4, 8), 2, prepare) for index in range(2)]
    return sorted(measure_layers(runs, job, None).items())


def test_where_one_rank_lacks_memory_every_rank_goes_without(ranks: Any) -> None:
    one, other = ranks(2).run(one_rank_runs_out)
    assert one == other
    assert [key for key, _ in one] == [(0, 1, False, 2), (1, 1, False, 2)]


# --- the cache ----------------------------------------------------------------------------------


def one_rank_prepares_longer() -> tuple[float, float]:
    """When this rank was ready, and when it was first timed, on the clock of the machine."""
    when: dict[str, float] = {}

    def prepare(size: int) -> Callable[[], Any]:
        time.sleep(0.3 * dist.get_rank())
        when["ready"] = time.monotonic()

        def forward() -> Callable[[], Any]:
            when.setdefault("timed", time.monotonic())
            return lambda: None

        return forward

    job = Job(dist.get_rank(), dist.get_world_size(), torch.device("cpu"))
    measure_layers([Experiment(FORM, "", (4,), 4, prepare)], job, None)
    return when["ready"], when["timed"]


def test_no_rank_is_timed_while_others_prepare(ranks: Any) -> None:
    """It would have more of a shared machine than in training."""
    found = ranks(2).run(one_rank_prepares_longer)
    assert min(timed for _, timed in found) >= max(ready for ready, _ in found)


def doubling(size: int) -> Callable[[], Any]:
    def forward() -> Callable[[], Any]:
        doubled = torch.ones(size, requires_grad=True) * 2
        return lambda: doubled.sum().backward()

    return forward


def test_a_second_run_reads_the_cache(tmp_path: Path) -> None:
    runs: list[int] = []

    def prepare(size: int) -> Callable[[], Any]:
        runs.append(size)
        return doubling(size)

    experiment = Experiment(FORM, "ones", (3, 4), 3, prepare)
    first = measure_layers([experiment], JOB, tmp_path)
    assert runs == [3, 4]
    assert measure_layers([experiment], JOB, tmp_path) == first
    assert runs == [3, 4]
    measure_layers([replace(experiment, text="another graph")], JOB, tmp_path)
    assert runs == [3, 4, 3, 4]


def test_a_broken_cache_is_measured_again(tmp_path: Path) -> None:
    experiment = Experiment(FORM, "x", (4,), 4, doubling)
    measure_layers([experiment], JOB, tmp_path)
    (path,) = tmp_path.glob("*.json")
    path.write_text("{half")
    assert measure_layers([experiment], JOB, tmp_path)[*FORM, 4].forward_ms > 0


class Clock:
    """Stands for the time module; goes on only as what is timed says."""

    def __init__(self) -> None:
        self.now_s = self.worked_s = 0.0

    def perf_counter(self) -> float:
        return self.now_s

    def process_time(self) -> float:
        return self.worked_s


def run_beside_others(
    monkeypatch: pytest.MonkeyPatch, forward_ms: Callable[[int], float]
) -> tuple[LayerTiming, Clock]:
    """Backward takes 2 ms; run ``k`` of forward as long as told."""
    clock, count = Clock(), 0

    def forward() -> Callable[[], None]:
        nonlocal count
        clock.now_s += forward_ms(count) / 1e3
        count += 1

        def backward() -> None:
            clock.now_s += 2e-3

        return backward

    monkeypatch.setattr(layer_timing, "time", clock)
    found = measure_layers([Experiment(FORM, "", (4,), 4, lambda size: forward)], JOB, None)
    return found[*FORM, 4], clock


def test_runs_that_others_interrupt_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every fifth run waits for another rank's turn on the core; the first one warms up."""
    timing, clock = run_beside_others(
        monkeypatch, lambda run: 50.0 if run == 0 else 13.0 if run % 5 == 0 else 3.0
    )
    assert timing.forward_ms == pytest.approx(3.0, abs=1.5) and timing.forward_ms > 3.5
    assert timing.backward_ms == pytest.approx(2.0)
    assert 0.1 <= clock.now_s < 0.12


def test_short_runs_go_on_for_a_while_and_long_ones_are_few(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    timing, clock = run_beside_others(monkeypatch, lambda run: 1.0)
    assert timing.forward_ms == pytest.approx(1.0) and 0.1 <= clock.now_s < 0.104
    timing, clock = run_beside_others(monkeypatch, lambda run: 18.0)  # nine runs of 20 ms
    assert timing.forward_ms == pytest.approx(18.0) and clock.now_s == pytest.approx(0.18)
    timing, clock = run_beside_others(monkeypatch, lambda run: 298.0)
    assert timing.forward_ms == pytest.approx(298.0) and clock.now_s == pytest.approx(0.6)
    timing, clock = run_beside_others(monkeypatch, lambda run: 1998.0)
    assert timing.forward_ms == pytest.approx(1998.0) and clock.now_s == pytest.approx(2.0)


def timed_among(
    monkeypatch: pytest.MonkeyPatch, cores: tuple[Cores, ...], shares: Iterable[float]
) -> LayerTiming:
    """Rank 0 of these, which has its core for the given shares of the time, one after the other.
    Forward is 3 ms of work, backward 6."""
    clock, turns = Clock(), cycle(shares)

    def work(ms: float) -> None:
        clock.worked_s += ms / 1e3
        clock.now_s += ms / 1e3 / next(turns)

    def forward() -> Callable[[], None]:
        work(3.0)
        return lambda: work(6.0)

    monkeypatch.setattr(layer_timing, "time", clock)
    monkeypatch.setattr(Job, "cores", lambda self: cores)
    found = measure_layers([Experiment(FORM, "", (4,), 4, lambda size: forward)], JOB, None)
    return found[*FORM, 4]


def test_ranks_that_share_cores_are_timed_by_their_work(monkeypatch: pytest.MonkeyPatch) -> None:
    timing = timed_among(monkeypatch, (Cores(0, 2, 1),) * 3, [0.3, 1.0, 0.6])
    assert timing.forward_ms == pytest.approx(3.0 * 3 / 2)
    assert timing.backward_ms == pytest.approx(6.0 * 3 / 2)


def test_a_rank_with_half_a_core_is_timed_by_its_work(monkeypatch: pytest.MonkeyPatch) -> None:
    halves = (Cores(0, 0.5, 1), Cores(1, 0.5, 1), Cores(2, 0.5, 1))
    assert timed_among(monkeypatch, halves, [1.0, 0.25]).forward_ms == pytest.approx(6.0)


@pytest.mark.parametrize(
    "cores",
    [
        (Cores(0, 1, 1), Cores(1, 1, 1), Cores(1, 1, 1)),  # others share, this one does not
        (Cores(0, 4, 4), Cores(0, 4, 4)),  # several threads: how many of them work is not known
    ],
)
def test_other_ranks_are_timed_by_the_clock(
    monkeypatch: pytest.MonkeyPatch, cores: tuple[Cores, ...]
) -> None:
    assert timed_among(monkeypatch, cores, [0.25]).forward_ms == pytest.approx(12.0)


def test_crowded_ranks_do_not_read_times_of_others(tmp_path: Path) -> None:
    measure_layers([Experiment(FORM, "x", (4,), 4, doubling)], JOB, tmp_path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Job, "cores", lambda self: (Cores(0, 1, 1),) * 2)
        measure_layers([Experiment(FORM, "x", (4,), 4, doubling)], JOB, tmp_path)
    assert len(list(tmp_path.glob("*.json"))) == 2
