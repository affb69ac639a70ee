"""The same step on every rank: :func:`galvatron_compile.recording.profile` makes one,
:mod:`galvatron_compile.recordings_json` reads and writes it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

from galvatron_compile import notation
from galvatron_compile.errors import PlanError
from galvatron_compile.plans import Plan
from galvatron_compile.recorded import Recording
from galvatron_compile.timeline import Span, Timeline


class Message(NamedTuple):
    """What crossed a cut once. sent_ms: its sender came to it; posted_ms: there was room for it;
    waited_ms, taken_ms: its receiver came to its wait and got past it."""

    kind: str
    stage: int  # of the sender
    micro_batch: int
    source: int
    target: int
    sent_ms: float
    posted_ms: float
    waited_ms: float
    taken_ms: float

    @property
    def travelling_ms(self) -> float:
        """How long its receiver waited while it was on its way."""
        return max(0.0, self.taken_ms - max(self.waited_ms, self.sent_ms))


@dataclass(frozen=True)
class Recordings:
    """The same step on every rank, by rank.

    plan: in the notation; model: its fingerprint, "" if there is none.
    has_one_clock: whether all ranks read the same clock; if not, theirs were set by messages, and
        ranks may be apart by the time of one.
    step_ms: of all repetitions; this is the one in the middle.
    """

    ranks: tuple[Recording, ...]
    pp: int
    plan: str
    model: str
    global_batch_size: int
    hardware: str
    torch: str
    recorded_at: str
    has_one_clock: bool
    all_step_ms: tuple[float, ...]
    warm_up: int

    def __post_init__(self) -> None:
        found = [recording.rank for recording in self.ranks]
        if not found or found != list(range(len(found))):
            raise PlanError(f"a recording needs every rank once, in order, got {found}")
        if self.pp < 1 or len(found) % self.pp:
            raise PlanError(f"{len(found)} ranks do not divide into pp={self.pp} groups")

    @staticmethod
    def load(path: str | Path) -> Recordings:
        """Read a saved recording. PlanError names the file and what is wrong."""
        from galvatron_compile import recordings_json

        return recordings_json.load(path)

    def save(self, path: str | Path) -> None:
        from galvatron_compile import recordings_json

        Path(path).write_text(recordings_json.to_json(self), encoding="utf-8")

    def check_plan(self, plan: Plan) -> None:
        """PlanError unless this is a step of ``plan``."""
        given = (
            ("plan", self.plan, notation.format(plan)),
            ("number of ranks", len(self.ranks), plan.world_size),
            ("global batch", self.global_batch_size, plan.global_batch_size),
            ("model's fingerprint", self.model or plan.model, plan.model or self.model),
        )
        for what, recorded, planned in given:
            if recorded != planned:
                raise PlanError(
                    f"the recording is of another {what}: {recorded}, but the plan has {planned}; "
                    "record a step of this plan"
                )

    @property
    def step_ms(self) -> float:
        """From the first rank's start to the last rank's end."""
        return max(r.end_ms for r in self.ranks) - min(r.start_ms for r in self.ranks)

    @property
    def group_size(self) -> int:
        return len(self.ranks) // self.pp

    def of_group(self, group: int) -> Recording:
        """That of a group's ranks which computed longest."""
        members = self.ranks[group * self.group_size : (group + 1) * self.group_size]
        return max(members, key=lambda recording: recording.computed_ms)

    @cached_property
    def messages(self) -> tuple[Message, ...]:
        """Everything that crossed a cut, put together from both ends."""
        events = {
            (recording.rank, event.kind, event.index, event.micro_batch): event
            for recording in self.ranks
            for event in recording.events
        }
        found = []
        for (rank, kind, stage, batch), sent in events.items():
            if not kind.startswith("send_"):
                continue
            direction = kind.removeprefix("send_")
            target_stage = stage + (1 if direction == "activations" else -1)
            group, position = target_stage % self.pp, rank % self.group_size
            target = group * self.group_size + position
            posted = events.get((target, f"receive_{direction}", target_stage, batch))
            waited = events.get((target, f"wait_{direction}", target_stage, batch))
            if posted is None or waited is None:
                raise PlanError(
                    f"rank {rank} sends {direction} of micro-batch {batch} that rank {target} "
                    "never takes; the recording is incomplete, record the step again"
                )
            times = sent.start_ms, posted.start_ms, waited.start_ms, waited.end_ms
            found.append(Message(kind, stage, batch, rank, target, *times))
        return tuple(found)

    def spans(self, rank: int) -> tuple[Span, ...]:
        """A rank's own, and the messages that it sends, on their way from when both ends have come
        to them until their receiver has them (which may be later than their arrival)."""
        sent = [
            Span(
                message.kind, message.stage, message.micro_batch, "messages",
                min(max(message.sent_ms, message.posted_ms), message.taken_ms), message.taken_ms,
            )
            for message in self.messages
            if message.source == rank
        ]  # fmt: skip
        spans = [*self.ranks[rank].spans, *sent]
        return tuple(sorted(spans, key=lambda span: (span.start_ms, span.end_ms)))

    def timeline(self, ranks: Sequence[int] | None = None) -> Timeline:
        """A row per rank: of all, or those that are named. Unlike simulated ones, collectives of
        one row may overlap."""
        chosen = range(len(self.ranks)) if ranks is None else ranks
        memory = tuple(self.ranks[rank].memory for rank in chosen)
        known = all(memory)
        return Timeline(tuple(self.spans(rank) for rank in chosen), memory if known else ())
