"""Measured layer times: interpolation and the cache on disk."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from galvatron_compile.job import Job
from galvatron_compile.layer_timing import (
    Experiment,
    LayerTiming,
    interpolate,
    measure_layers,
)

FORM = (0, 2, False)
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


def test_a_second_run_reads_the_cache(tmp_path: Path) -> None:
    runs: list[int] = []

    def forward() -> list[torch.Tensor]:
        runs.append(1)
        return [torch.ones(3, requires_grad=True) * 2]

    job = Job(0, 1, torch.device("cpu"))
    experiment = Experiment((0, 1, False, 4), "three ones", forward)
    first = measure_layers([experiment], job, tmp_path)
    num_runs = len(runs)
    assert num_runs >= 2
    assert measure_layers([experiment], job, tmp_path) == first
    assert len(runs) == num_runs
    other = Experiment((0, 1, False, 4), "another graph", forward)
    measure_layers([other], job, tmp_path)
    assert len(runs) > num_runs


def test_a_broken_cache_is_measured_again(tmp_path: Path) -> None:
    job = Job(0, 1, torch.device("cpu"))
    experiment = Experiment((0, 1, False, 4), "x", lambda: [torch.ones(1, requires_grad=True) * 2])
    measure_layers([experiment], job, tmp_path)
    (path,) = tmp_path.glob("*.json")
    path.write_text("{half")
    assert measure_layers([experiment], job, tmp_path)[0, 1, False, 4].forward_ms > 0
