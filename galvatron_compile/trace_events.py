"""A trace for Perfetto (ui.perfetto.dev) and chrome://tracing, in the Trace Event Format.

The format, in its JSON object form, is Google's "Trace Event Format":
https://docs.google.com/document/d/1CvAClvFfyA5R-PhYUmn5OOQtYMH4h6I0nSsKchNAySU
Used are complete events (``X``), counters (``C``) and names as metadata (``M``); times are in
microseconds. Predicted and measured are processes of their own: a predicted one for every pipeline
group, a measured one for every rank. Complete events of one thread must nest, so what overlaps
lies on several threads.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

from galvatron_compile.actions import COMPUTE
from galvatron_compile.recorded import OPTIMIZER, Event, Recording
from galvatron_compile.timeline import NAMES, STREAMS, Held, Span
from galvatron_compile.trace import Trace

MEASURED = 1_000  # process numbers of measured ranks start here
_LANES = 100  # thread numbers of a stream start at its place times this
_VERBS = {
    "free": "freeing parameters",
    "wait": "waiting for",
    "receive": "making room for",
    "send": "starting to send",
    "gather": "starting to gather parameters of",
    "reduce": "starting to sum gradients of",
}


def to_json(trace: Trace) -> str:
    recordings = trace.recordings
    document = {
        "displayTimeUnit": "ms",
        "otherData": {
            "plan": recordings.plan,
            "hardware": recordings.hardware,
            "torch": recordings.torch,
            "recorded_at": recordings.recorded_at,
        },
        "traceEvents": [*_predicted(trace), *_measured(trace)],
    }
    return json.dumps(document, allow_nan=False, ensure_ascii=False) + "\n"


def _predicted(trace: Trace) -> Iterator[dict[str, Any]]:
    if trace.simulation is None:
        return
    size = trace.recordings.group_size
    for group in range(trace.num_groups):
        first, last = group * size, (group + 1) * size - 1
        ranks = f"rank {first}" if size == 1 else f"each of ranks {first}–{last}"
        yield from _process(group, f"predicted: {trace.who(group)}, {ranks}")
        spans, _ = trace.spans(group)
        names = trace.measured(group).units
        for stream in STREAMS:
            own = [span for span in spans if span.stream == stream]
            yield from _stream(trace, group, stream, own, names)
        memory, _ = trace.memory(group)
        yield from _counter(group, memory)


def _measured(trace: Trace) -> Iterator[dict[str, Any]]:
    for recording in trace.recordings.ranks:
        pid = MEASURED + recording.rank
        group = recording.rank // trace.recordings.group_size
        yield from _process(pid, f"measured: {trace.who(group)}, rank {recording.rank}")
        tid = STREAMS.index("compute") * _LANES
        yield _thread(pid, tid, "compute")
        for event in recording.events:
            times = event.start_ms, event.end_ms
            yield _complete(pid, tid, _action(trace, recording, event), event.kind, times, event)
        spans = trace.recordings.spans(recording.rank)
        for stream in STREAMS[1:]:
            own = [span for span in spans if span.stream == stream]
            yield from _stream(trace, pid, stream, own, recording.units)
        yield from _counter(pid, recording.memory)


def _stream(
    trace: Trace, pid: int, stream: str, spans: Sequence[Span], units: Sequence[str]
) -> Iterator[dict[str, Any]]:
    """On as many threads as it takes."""
    first = STREAMS.index(stream) * _LANES  # type: ignore[arg-type]
    ends: list[float] = []
    for span in spans:
        free = [lane for lane, end_ms in enumerate(ends) if end_ms <= span.start_ms]
        lane = free[0] if free else len(ends)
        if lane == len(ends):
            ends.append(0.0)
            yield _thread(pid, first + lane, stream if lane == 0 else f"{stream} {lane + 1}")
        ends[lane] = span.end_ms
        name = f"{NAMES[span.kind]}{_whose(trace, span, units)}"
        times = span.start_ms, span.end_ms
        yield _complete(pid, first + lane, name, span.kind, times, span)


def _whose(trace: Trace, found: Span | Event, units: Sequence[str]) -> str:
    if found.kind in COMPUTE:
        text = f" of {trace.plan.layers[found.index]}"
    elif found.kind.startswith(("gather", "reduce")) and 0 <= found.index < len(units):
        text = f" of {units[found.index]}"
    else:
        text = f" of stage {found.index}" if found.kind != OPTIMIZER and found.index >= 0 else ""
    return text + (f" @{found.micro_batch}" if found.micro_batch >= 0 else "")


def _action(trace: Trace, recording: Recording, event: Event) -> str:
    if event.kind in COMPUTE or event.kind in (OPTIMIZER, "reduce_tensor", "reduce_tied"):
        return NAMES[event.kind] + _whose(trace, event, recording.units)
    verb, _, noun = event.kind.partition("_")
    batch = f" @{event.micro_batch}" if event.micro_batch >= 0 else ""
    if event.is_of_unit:
        what = f"{NAMES[noun]} of " if noun else ""
        return f"{_VERBS[verb]} {what}{recording.units[event.index]}{batch}"
    return f"{_VERBS[verb]} {noun} of stage {event.index}{batch}"


def _process(pid: int, name: str) -> Iterator[dict[str, Any]]:
    yield _metadata(pid, 0, "process_name", {"name": name})
    yield _metadata(pid, 0, "process_sort_index", {"sort_index": pid})


def _thread(pid: int, tid: int, name: str) -> dict[str, Any]:
    return _metadata(pid, tid, "thread_name", {"name": name})


def _metadata(pid: int, tid: int, name: str, args: dict[str, Any]) -> dict[str, Any]:
    return {"ph": "M", "pid": pid, "tid": tid, "name": name, "args": args}


def _complete(
    pid: int, tid: int, name: str, kind: str, times: tuple[float, float], found: Span | Event
) -> dict[str, Any]:
    start_ms, end_ms = times
    args = {"index": found.index, "micro_batch": found.micro_batch}
    return {
        "ph": "X", "pid": pid, "tid": tid, "name": name, "cat": kind, "args": args,
        "ts": _us(start_ms), "dur": round(_us(end_ms) - _us(start_ms), 3),
    }  # fmt: skip


def _counter(pid: int, memory: Sequence[Held]) -> Iterator[dict[str, Any]]:
    for held in memory:
        yield {
            "ph": "C", "pid": pid, "tid": 0, "name": "memory", "ts": _us(held.time_ms),
            "args": {"bytes": held.num_bytes},
        }  # fmt: skip


def _us(time_ms: float) -> float:
    return round(1e3 * time_ms, 3)
