"""How bench/gpu.py compares and times: the tolerance, a backward alone, the timer."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

pytestmark = pytest.mark.usefixtures("gpu_bench")


def test_tolerance_is_by_element_and_in_the_mean(seed: int) -> None:
    from gpu_check import excess

    torch.manual_seed(seed)
    exact = torch.randn(512, 96, dtype=torch.float64)
    rounded = exact.bfloat16()
    assert excess(rounded, exact) <= 1
    for factor in (0.99, 1.01):  # everywhere
        assert excess((factor * exact).bfloat16(), exact) > 1
    one_off = rounded.clone()
    place = tuple(int(i) for i in (exact.abs() - 0.5).abs().argmin().unsqueeze(0).tolist())
    one_off.view(-1)[place] *= 1.02
    assert excess(one_off, exact) > 1
    assert not excess(torch.full_like(rounded, float("nan")), exact) <= 1
    assert excess(rounded[:5], exact) > 1
    assert excess(exact.float(), exact) <= 1 < excess(1.0001 * exact.float(), exact)
    whole = torch.arange(9)
    assert excess(whole, whole.clone()) <= 1 < excess(whole.flip(0), whole)


def test_of_a_gradient_the_backward_alone_is_called(seed: int) -> None:
    from gpu_cases import TINY, backward
    from gpu_measure import Bench
    from gpu_timer import Timed

    forwards = 0

    def forward(x: Tensor, factor: Tensor) -> Tensor:
        nonlocal forwards
        forwards += 1
        return x * factor

    def repeated(call: Callable[[], Any]) -> Timed:
        nonlocal forwards
        forwards = 0
        results = [call() for _ in range(3)]
        assert forwards == 0 and len(results) == 3
        return Timed(2.0, late=True)

    def make(sizes: Any, device: torch.device) -> tuple[Tensor, ...]:
        return tuple(torch.randn(4, 3, device=device) for _ in range(3))

    case = backward("product", make, lambda dy, x, factor: dy * factor, forward, 1, lambda i: 48)
    bench = Bench(
        [case], TINY, {}, torch.device("cpu"), repeated, seed,
        lambda function, **_: torch.compile(function, backend="aot_eager"),
    )  # fmt: skip
    wrong, row = bench.answer("case", "product")
    assert wrong == [] and row.over == {"eager": 1.0} and row.late == ("kernel", "eager")
    assert bench.answer("compiled", "product") == Timed(2.0, late=True)


def test_a_compiled_backward_runs_many_times(seed: int) -> None:
    """Of every case that is compiled on the GPU, with the front end of the compiler."""
    from gpu_cases import TINY
    from gpu_flat import CASES
    from gpu_measure import Bench
    from gpu_timer import Timed

    def twice(call: Callable[[], Any]) -> Timed:
        call()
        call()
        return Timed(1.0)

    bench = Bench(
        CASES, TINY, {}, torch.device("cpu"), twice, seed,
        lambda function, **_: torch.compile(function, backend="aot_eager"),
    )  # fmt: skip
    for case in CASES:
        if case.forward is not None and case.compiles:
            assert bench.answer("compiled", case.name) == Timed(1.0), case.name


class Event:
    """Of a GPU on which everything takes 5 ms, and that is late for the first few starts."""

    late = 0

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        pass

    def query(self) -> bool:
        Event.late -= 1
        return Event.late >= 0

    def elapsed_time(self, end: Event) -> float:
        return 5.0


@pytest.mark.parametrize(("num_late", "late"), [(0, False), (2, False), (300, True)])
def test_the_timer_knows_whether_launches_were_queued(
    num_late: int, late: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    import gpu_timer

    slept, calls = [], []
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda size, dtype, device: empty(8, dtype=dtype))
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "_sleep", slept.append)
    monkeypatch.setattr(Event, "late", num_late)
    timer = gpu_timer.CudaTimer(seconds=0.0)
    timed = timer(lambda: calls.append(time.sleep(0.01)))
    assert timed == gpu_timer.Timed(5.0, late)
    # 20e6 cycles took 5 ms, and the host at least 10 ms.
    assert slept[2] >= 15 * 4e6 and all(isinstance(cycles, int) for cycles in slept)
    assert len(calls) == 4 + 10 + min(num_late, 3)
