"""Where the time of a step that really ran went, rank by rank."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

from galvatron_compile.actions import COMPUTE
from galvatron_compile.recorded import OPTIMIZER, Event
from galvatron_compile.recordings import Recordings


@dataclass(frozen=True)
class Causes:
    """Where a rank's time went; they add up to the step.

    computed_ms: layers with their own collectives. exposed: starting and waiting for gathers, sums
    and messages, by the kind of their action. bubble_ms: waiting for another group to have
    something to send, or to end. other_ms: what lies around and between the actions: the batch,
    the loss, freeing memory, the loop itself.
    """

    computed_ms: float
    exposed: Mapping[str, float]
    bubble_ms: float
    optimizer_ms: float
    other_ms: float

    @property
    def exposed_ms(self) -> float:
        return sum(self.exposed.values())


def causes(recordings: Recordings, rank: int) -> Causes:
    """Of one rank, by the rules of the simulator."""
    recording = recordings.ranks[rank]
    met_ms = _met(recordings)
    travelling_ms = {
        (m.kind.removeprefix("send_"), m.waited_ms): m.travelling_ms
        for m in recordings.messages
        if m.target == rank
    }
    exposed = defaultdict[str, float](float)
    bubble_ms = max(other.last_ms for other in recordings.ranks) - recording.last_ms
    for event in recording.events:
        kind = _cause(event)
        if not kind:
            continue
        at_work_ms = event.took_ms
        if event.kind == "reduce_tied":
            met = met_ms[recording.units[event.index]]
            at_work_ms = event.end_ms - min(max(met, event.start_ms), event.end_ms)
        elif event.kind in ("wait_activations", "wait_gradients"):
            at_work_ms = travelling_ms[event.kind.removeprefix("wait_"), event.start_ms]
        exposed[kind] += at_work_ms
        bubble_ms += event.took_ms - at_work_ms
    optimizer_ms = sum(e.took_ms for e in recording.events if e.kind == OPTIMIZER)
    known_ms = recording.computed_ms + sum(exposed.values()) + bubble_ms + optimizer_ms
    other_ms = recordings.step_ms - known_ms
    return Causes(recording.computed_ms, dict(exposed), bubble_ms, optimizer_ms, other_ms)


def _cause(event: Event) -> str:
    """The kind of action whose cost this is; "" if it is not communication."""
    if event.kind in COMPUTE or event.kind in (OPTIMIZER, "free"):
        return ""
    if event.kind in ("gather", "reduce", "reduce_tensor", "reduce_tied"):
        return event.kind
    _, noun = event.kind.split("_")  # send_…, receive_…, wait_…
    return noun if noun in ("gather", "reduce") else f"send_{noun}"


def _met(recordings: Recordings) -> dict[str, float]:
    """When the last rank came to each sum over stages, by the unit's name."""
    latest = dict[str, float]()
    for recording in recordings.ranks:
        for event in recording.events:
            if event.kind == "reduce_tied":
                name = recording.units[event.index]
                latest[name] = max(latest.get(name, 0.0), event.start_ms)
    return latest
