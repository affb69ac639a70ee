"""A step that really ran on one rank: when every action started and ended, and what was held.

The nouns are those of the simulator (:mod:`galvatron_compile.timeline`), so that what was predicted
and what was measured can be laid on the same axes. All ranks together are a
:class:`galvatron_compile.recordings.Recordings`.
"""

from __future__ import annotations

import math
from collections import defaultdict, deque
from dataclasses import dataclass
from functools import cached_property

from galvatron_compile.actions import COMPUTE, UNIT
from galvatron_compile.errors import PlanError
from galvatron_compile.timeline import Held, Span, Stream

OPTIMIZER = "optimizer"
OWN_SUMS = ("reduce_tensor", "reduce_tied")  # collectives that one action starts and waits for


@dataclass(frozen=True, slots=True)
class Event:
    """An action that ran, or the optimizer at the end. Times on the clock of rank 0, from the
    start of the step; on CUDA when the compute stream came to it and got past it.

    held_bytes: after it; peak_bytes: the most during it; 0 where memory was not measured.
    """

    kind: str
    index: int
    micro_batch: int
    start_ms: float
    end_ms: float
    held_bytes: int = 0
    peak_bytes: int = 0

    @property
    def took_ms(self) -> float:
        return self.end_ms - self.start_ms

    @property
    def is_of_unit(self) -> bool:
        return self.kind in UNIT


@dataclass(frozen=True)
class Recording:
    """One rank's step. units: names of its units, by number. end_ms: when the step was over.

    start_bytes: held before the step; None where memory was not measured.
    """

    rank: int
    units: tuple[str, ...]
    events: tuple[Event, ...]
    start_ms: float
    end_ms: float
    start_bytes: int | None = None

    def __post_init__(self) -> None:
        if not self.events:
            raise PlanError(f"the recording of rank {self.rank} is empty; record the step again")
        times = [
            self.start_ms,
            *(t for e in self.events for t in (e.start_ms, e.end_ms)),
            self.end_ms,
        ]
        if not all(math.isfinite(time) for time in times) or times != sorted(times):
            raise PlanError(
                f"the recording of rank {self.rank} goes back in time; record the step again"
            )

    @property
    def peak_bytes(self) -> int | None:
        if self.start_bytes is None:
            return None
        return max(self.start_bytes, *(event.peak_bytes for event in self.events))

    @property
    def memory(self) -> tuple[Held, ...]:
        """Steps: the most during an action from its start on, what is left from its end on."""
        if self.start_bytes is None:
            return ()
        steps = [Held(self.start_ms, self.start_bytes)]
        for event in self.events:
            steps += [
                Held(event.start_ms, event.peak_bytes), Held(event.end_ms, event.held_bytes)
            ]  # fmt: skip
        return tuple(steps)

    @cached_property
    def spans(self) -> tuple[Span, ...]:
        """Layers, and collectives in flight from their start to the end of their wait, which may
        overlap. Messages belong to two ranks: see :meth:`.Recordings.spans`."""
        spans = []
        flying = defaultdict[tuple[str, int], deque[Event]](deque)
        for event in self.events:
            kind, index = event.kind, event.index
            if kind in COMPUTE or kind == OPTIMIZER:
                spans.append(_span(event, "compute", event.end_ms))
            elif kind in ("gather", "reduce"):
                flying[kind, index].append(event)
            elif kind in ("wait_gather", "wait_reduce"):
                started = flying[kind.removeprefix("wait_"), index]
                if started:
                    spans.append(_span(started.popleft(), "communication", event.end_ms))
            elif kind in OWN_SUMS:
                spans.append(_span(event, "communication", event.end_ms))
        return tuple(sorted(spans, key=lambda span: (span.start_ms, span.end_ms)))

    @property
    def computed_ms(self) -> float:
        return sum(event.took_ms for event in self.events if event.kind in COMPUTE)

    @property
    def last_ms(self) -> float:
        """When its last action was over."""
        return self.events[-1].end_ms


def _span(started: Event, stream: Stream, end_ms: float) -> Span:
    place = started.kind, started.index, started.micro_batch
    return Span(*place, stream, started.start_ms, end_ms)
