"""What counts of several samples, and that all ranks get the same."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
import torch.distributed as dist

from galvatron_compile.stopwatch import Stopwatch, typical


def test_delays_that_come_again_count_and_single_ones_hardly() -> None:
    assert typical([2.0] * 8) == 2.0
    assert typical([2.0] * 6 + [4.0] * 2) == pytest.approx(2.5)
    assert typical([2.0] * 9 + [200.0]) == pytest.approx((9 * 2 + 6) / 10)


def slowest() -> float:
    watch = Stopwatch(torch.device("cpu"), 0.05, 60.0)
    pause_s = 0.002 if dist.get_rank() == 0 else 0.006
    return watch.ms(lambda: time.sleep(pause_s))


def test_the_slowest_rank_counts_on_every_rank(ranks: Any) -> None:
    one, other = ranks(2).run(slowest)
    assert one == other >= 6.0
