"""Runs real training steps and notes when every action of every rank started and ended.

Nothing is added to what a step does: clocks are read before and after each action, on CUDA by
events on the compute stream. Memory on the CPU is counted in one more step, since counting makes
operators slower; the list of actions is the same, so the counts belong to the same actions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import torch
import torch.distributed as dist

from galvatron_compile import notation
from galvatron_compile.actions import Action
from galvatron_compile.clocks import CudaClock, HostClock, agree
from galvatron_compile.errors import GalvatronError
from galvatron_compile.memory_meter import Meter, metering
from galvatron_compile.parallel_model import ParallelModel
from galvatron_compile.profiling_machine import device_name
from galvatron_compile.recorded import OPTIMIZER, Event, Recording
from galvatron_compile.recordings import Recordings
from galvatron_compile.torch_private import flatten_tree

_DIGITS = 5  # of milliseconds: ten nanoseconds


def profile(
    parallel: ParallelModel,
    batch: Any,
    *,
    optimizer: torch.optim.Optimizer | None = None,
    warm_up: int = 2,
    repetitions: int = 3,
) -> Recordings:
    """Record training steps on all ranks; every rank must call it and gets the same.

    The step with the median time of ``repetitions`` is kept, with the memory of one more.
    Gradients and the number of steps are afterwards what they were before. With an optimizer, its
    steps are recorded too, and so the model trains.

    batch: this rank's share, as for ``step``. Raises as ``step``.
    """
    if warm_up < 0 or repetitions < 1:
        raise GalvatronError(
            f"profile needs warm_up of at least 0 and repetitions of at least 1, got {warm_up} "
            f"and {repetitions}"
        )
    device = parallel._device
    with _undone(parallel, optimizer) as fresh:
        for _ in range(warm_up):
            record_step(parallel, batch, optimizer)
            fresh()
        timed = []
        for _ in range(repetitions):
            _together(device)
            timed.append(record_step(parallel, batch, optimizer))
            fresh()
        with metering(device, _tensors(parallel, batch, optimizer)) as meter:
            metered = record_step(parallel, batch, optimizer, meter)
            fresh()
    offset_ms, has_one_clock = agree(device)
    timed = [_shifted(recording, -offset_ms) for recording in timed]
    everyone = _everyone([_with_memory(recording, metered) for recording in timed])
    steps = [tuple(recordings) for recordings in zip(*everyone, strict=True)]
    all_step_ms = [max(r.end_ms for r in s) - min(r.start_ms for r in s) for s in steps]
    median = sorted(range(repetitions), key=all_step_ms.__getitem__)[(repetitions - 1) // 2]
    origin_ms = min(recording.start_ms for recording in steps[median])
    return Recordings(
        ranks=tuple(_shifted(recording, -origin_ms) for recording in steps[median]),
        pp=parallel.plan.pp,
        plan=notation.format(parallel.plan),
        model=parallel.plan.model,
        global_batch_size=parallel.plan.global_batch_size,
        hardware=_hardware(parallel),
        torch=str(torch.__version__),
        recorded_at=_everyone(datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"))[0],
        has_one_clock=has_one_clock,
        all_step_ms=tuple(round(step_ms, _DIGITS) for step_ms in all_step_ms),
        warm_up=warm_up,
    )


def record_step(
    parallel: ParallelModel,
    batch: Any,
    optimizer: torch.optim.Optimizer | None = None,
    meter: Meter | None = None,
) -> Recording:
    """``parallel.step(batch)``, and ``optimizer.step()`` behind it, with the time of every action.

    Times are ms on this process's own clock. With a meter that is on, memory too.
    """
    device = parallel._device
    clock = CudaClock(device) if device.type == "cuda" else HostClock()
    marks: list[tuple[Action, Any, Any]] = []
    memory: list[tuple[int, int]] = []

    def recorder(action: Action, run: Callable[[], None]) -> None:
        start = clock.mark()
        run()
        marks.append((action, start, clock.mark()))
        if meter is not None:
            peak_bytes = meter.take_peak_bytes()
            memory.append((meter.held_bytes(), peak_bytes))

    start_bytes = meter.held_bytes() if meter is not None else None
    start = clock.mark()
    parallel.step_recorded(batch, recorder)
    if optimizer is not None:
        recorder(Action(OPTIMIZER, -1), optimizer.step)  # type: ignore[arg-type]  # in no list
    end = clock.mark()
    times = clock.times_ms([start, *(m for _, *both in marks for m in both), end])
    rounded = [round(time_ms, _DIGITS) for time_ms in times]
    events = [
        Event(action.kind, action.index, action.micro_batch, started, ended)
        for (action, _, _), started, ended in zip(
            marks, rounded[1:-1:2], rounded[2:-1:2], strict=True
        )
    ]
    if meter is not None:
        events = [
            replace(event, held_bytes=held, peak_bytes=peak)
            for event, (held, peak) in zip(events, memory, strict=True)
        ]
    units = tuple(unit.name for unit in parallel._program.units)
    return Recording(parallel._rank, units, tuple(events), rounded[0], rounded[-1], start_bytes)


@contextmanager
def _undone(
    parallel: ParallelModel, optimizer: torch.optim.Optimizer | None
) -> Iterator[Callable[[], None]]:
    """Gradients and the number of steps come back at the end; inside, a call drops the gradients of
    the last step, so that all steps start alike. With an optimizer the steps count."""
    held = [(master, master.grad) for master in parallel.parameters()]
    num_steps = parallel.num_steps
    parallel.zero_grad()
    try:
        yield parallel.zero_grad
    finally:
        for master, gradient in held:
            master.grad = gradient
        if optimizer is None:
            parallel.num_steps = num_steps


def _tensors(
    parallel: ParallelModel, batch: Any, optimizer: torch.optim.Optimizer | None
) -> Iterator[torch.Tensor]:
    """What a rank holds before a step."""
    for unit in parallel._program.units:
        for bucket in unit.buckets:
            yield from (bucket.master, bucket.buffer)
    yield from parallel._program.buffers.values()
    states = dict(optimizer.state) if optimizer is not None else {}
    leaves, _ = flatten_tree([batch, *states.values()])
    yield from (leaf for leaf in leaves if isinstance(leaf, torch.Tensor))


def _with_memory(timed: Recording, metered: Recording) -> Recording:
    places = [[(e.kind, e.index, e.micro_batch) for e in r.events] for r in (timed, metered)]
    assert places[0] == places[1], "a step did other actions than the one before"
    events = tuple(
        replace(event, held_bytes=counted.held_bytes, peak_bytes=counted.peak_bytes)
        for event, counted in zip(timed.events, metered.events, strict=True)
    )
    return replace(timed, events=events, start_bytes=metered.start_bytes)


def _shifted(recording: Recording, by_ms: float) -> Recording:
    def moved(time_ms: float) -> float:
        return round(time_ms + by_ms, _DIGITS)

    events = tuple(
        replace(event, start_ms=moved(event.start_ms), end_ms=moved(event.end_ms))
        for event in recording.events
    )
    start_ms, end_ms = moved(recording.start_ms), moved(recording.end_ms)
    return replace(recording, events=events, start_ms=start_ms, end_ms=end_ms)


def _together(device: torch.device) -> None:
    """All ranks go on from here at about the same time."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(torch.zeros(1, device=device))
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _everyone(mine: Any) -> Sequence[Any]:
    """What every rank has, by rank."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [mine]
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, mine)
    return found


def _hardware(parallel: ParallelModel) -> str:
    """Devices of all ranks, each name once."""
    names = list(dict.fromkeys(_everyone(device_name(parallel._device))))
    return f"{parallel.plan.world_size} x {', '.join(names)}"
