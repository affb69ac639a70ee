"""What a walk keeps of one pipeline group: what runs there, what waits, what has been."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Sequence
from itertools import pairwise

from galvatron_compile.actions import Action, Outline
from galvatron_compile.simulated_memory import MemoryLog
from galvatron_compile.simulation import INNER, GroupSimulation
from galvatron_compile.timeline import Span, Stream
from galvatron_compile.work import Phase, Work

_NO_PHASE = Phase()
OPTIMIZER = Action("optimizer", -1)  # type: ignore[arg-type]  # no list has it


class Job:
    """Something that takes time: ``left`` ms alone, at ``rate`` of that speed since ``since``.

    groups: where it slows others down and is slowed down.
    phase: of a layer. in_node: whether communication stays within a node.
    trace: (time, ms alone that are done) wherever the rate changed.
    """

    __slots__ = (
        "action", "alone_ms", "end", "groups", "in_node", "left", "phase", "rate", "since", "start",
        "trace", "version",
    )  # fmt: skip

    def __init__(
        self, action: Action, alone_ms: float, groups: tuple[int, ...], in_node: bool = False
    ) -> None:
        self.action, self.groups = action, groups
        self.alone_ms = self.left = alone_ms
        self.rate = 0.0
        self.since = self.start = self.end = -1.0
        self.version = 0
        self.in_node = in_node
        self.phase = _NO_PHASE
        self.trace: list[tuple[float, float]] = []

    def edges(self, size: int) -> list[tuple[float, float]]:
        """Start and end of each of ``size`` equal parts of a job that is over."""
        trace = [*self.trace, (self.end, self.alone_ms)]
        times = [self.start]
        at = 0
        for part in range(1, size):
            done = self.alone_ms * part / size
            while at + 2 < len(trace) and trace[at + 1][1] < done:
                at += 1
            (before, low), (after, high) = trace[at], trace[at + 1]
            share = (done - low) / (high - low) if high > low else 0.0
            times.append(before + (after - before) * share)
        times.append(self.end)
        return list(pairwise(times))


class Message:
    """What crosses a cut once. It travels when it was sent and there is room for it."""

    __slots__ = ("job", "posted", "sent_at", "waiting")

    def __init__(self) -> None:
        self.job: Job | None = None
        self.posted = False
        self.sent_at = -1.0
        self.waiting: int | None = None  # the group that has come to its wait

    @property
    def is_there(self) -> bool:
        return self.job is not None and self.job.end >= 0


class Group:
    """One pipeline group on its way through its list."""

    def __init__(self, outline: Outline, actions: Sequence[Action], work: Work) -> None:
        self.outline, self.actions, self.work = outline, actions, work
        self.at = 0
        self.layer: Job | None = None  # what computes now
        self.run: Sequence[Action] = ()  # the actions of that: alike, one after the other
        self.collective: Job | None = None
        self.queue: deque[Job] = deque()
        self.messages: list[Job] = []  # under way, to it or from it
        self.open: dict[tuple[str, int], Job] = {}  # gathers and sums that are not over
        self.awaited: Job | None = None
        self.blocked_at = 0.0
        self.end_ms: float | None = None
        self.spans: list[Span] = []
        self.memory = MemoryLog(outline, work)
        self.exposed = defaultdict[str, float](float)
        self.computed_ms = self.slowed_ms = self.bubble_ms = 0.0
        self.inner = dict.fromkeys(INNER, 0.0)
        self._phases: dict[tuple[str, int], Phase] = {}
        self._speeds: dict[tuple[Phase, bool], tuple[float, float]] = {}

    def phase(self, action: Action) -> Phase:
        key = action.kind, action.index
        if key not in self._phases:
            self._phases[key] = self.work.layers[action.index].phase(action.kind)
        return self._phases[key]

    def speeds(self, phase: Phase, in_node: bool) -> tuple[float, float]:
        """Of a layer beside communication (within a node or not), and of communication beside the
        layer, as shares of the speed alone.

        While it computes both slow down; while its own collectives run, they and the others each
        have half of the wire if they share one, and slow down as computation does where they are
        work of the cores. Averaged over the even mixture. An update, whose phase is empty, neither
        slows down nor is slowed down.
        """
        if not phase.alone_ms:
            return 1.0, 1.0
        if (phase, in_node) not in self._speeds:
            work = self.work
            compute_slowdown, communication_slowdown = work.slowdowns(in_node)
            on_wire = work.inner_shares_wire or not work.inner_computes
            # Shares and not times, which may be so short that a part of them is none.
            wire = phase.inner_ms / phase.alone_ms if on_wire else 0.0
            slow = (1 - wire) * compute_slowdown
            took = slow + wire * (2 if work.inner_shares_wire else 1)
            self._speeds[phase, in_node] = 1 / took, (slow / communication_slowdown + wire) / took
        return self._speeds[phase, in_node]

    def next_run(self, index: int) -> Job:
        """The compute action at hand and all behind it that are alike, as one job."""
        first = self.actions[self.at]
        phase, start = self.phase(first), self.at
        self.at += 1
        while self.at < len(self.actions):
            action = self.actions[self.at]
            if action.kind != first.kind or self.phase(action) != phase:
                break
            self.at += 1
        self.run = self.actions[start : self.at]
        job = Job(first, len(self.run) * phase.alone_ms, (index,))
        job.phase = phase
        return job

    def record(self, action: Action, stream: Stream, job: Job) -> None:
        if job.end > job.start:
            place = action.kind, action.index, action.micro_batch
            self.spans.append(Span(*place, stream, job.start, job.end))

    def record_run(self, job: Job) -> None:
        """Layers that have run, each with its own time of what they ran in together."""
        if job.action is OPTIMIZER:
            self.record(OPTIMIZER, "compute", job)
            return
        phase, size = self.phase(job.action), len(self.run)
        self.computed_ms += size * phase.compute_ms
        self.slowed_ms += job.end - job.start - job.alone_ms
        for name in INNER:
            self.inner[name] += size * getattr(phase, name)
        for action, (start, end) in zip(self.run, job.edges(size), strict=True):
            self.memory.computed(action, start, end)
            place = action.kind, action.index, action.micro_batch
            self.spans.append(Span(*place, "compute", start, end))

    def result(self, step_ms: float) -> GroupSimulation:
        assert self.end_ms is not None
        return GroupSimulation(
            spans=tuple(sorted(self.spans, key=lambda span: (span.start_ms, span.end_ms))),
            computed_ms=self.computed_ms,
            slowed_ms=self.slowed_ms,
            optimizer_ms=self.work.optimizer_ms,
            inner=dict(self.inner),
            exposed=dict(self.exposed),
            bubble_ms=self.bubble_ms + step_ms - self.end_ms,
            memory=self.memory.curve(),
        )
