"""The trace for Perfetto follows the Trace Event Format."""

from __future__ import annotations

import json
from collections import defaultdict
from itertools import pairwise
from typing import Any

import pytest
import recorded_by_hand as hand

from galvatron_compile import trace_events
from galvatron_compile.trace import Trace

REQUIRED = {
    "X": {"ph", "pid", "tid", "name", "cat", "ts", "dur", "args"},
    "M": {"ph", "pid", "tid", "name", "args"},
    "C": {"ph", "pid", "tid", "name", "ts", "args"},
}


def events_of(trace: Trace) -> list[dict[str, Any]]:
    document = json.loads(trace_events.to_json(trace))
    assert document["displayTimeUnit"] in ("ms", "ns")
    return list(document["traceEvents"])


@pytest.fixture
def events() -> list[dict[str, Any]]:
    return events_of(Trace.of(hand.predicted(), hand.pipeline()))


def test_every_event_has_what_its_phase_needs(events: list[dict[str, Any]]) -> None:
    for event in events:
        assert event.keys() == REQUIRED[event["ph"]]
        assert all(type(event[key]) is int for key in ("pid", "tid"))
        assert all(event[key] >= 0 for key in ("ts", "dur") if key in event)
    metadata = {event["name"] for event in events if event["ph"] == "M"}
    assert metadata == {"process_name", "process_sort_index", "thread_name"}
    assert all(
        type(value) is int for e in events if e["ph"] == "C" for value in e["args"].values()
    )


def test_events_of_a_thread_do_not_overlap_and_threads_have_names(
    events: list[dict[str, Any]],
) -> None:
    threads = defaultdict[tuple[int, int], list[tuple[float, float]]](list)
    for event in events:
        if event["ph"] == "X":
            place = event["pid"], event["tid"]
            threads[place].append((event["ts"], round(event["ts"] + event["dur"], 3)))
    for spans in threads.values():
        spans.sort()
        assert all(one[1] <= two[0] for one, two in pairwise(spans))
    named = {(e["pid"], e["tid"]) for e in events if e["name"] == "thread_name"}
    assert named == threads.keys()


def test_predicted_and_measured_are_separate_processes(events: list[dict[str, Any]]) -> None:
    names = {e["pid"]: e["args"]["name"] for e in events if e["name"] == "process_name"}
    assert names == {
        0: "predicted: stage 0, rank 0",
        1: "predicted: stage 1, rank 1",
        1000: "measured: stage 0, rank 0",
        1001: "measured: stage 1, rank 1",
    }


def test_names_say_what_happened(events: list[dict[str, Any]]) -> None:
    names = [event["name"] for event in events if event["pid"] == 1000 and event["ph"] == "X"]
    assert names == [
        "forward of first @0",
        "starting to send activations of stage 0 @0",
        "making room for gradients of stage 0 @0",
        "waiting for gradients of stage 0 @0",
        "backward of first @0",
        "starting to sum gradients of embedding",
        "waiting for summing gradients of embedding",
        "summing gradients over stages of embedding",
        "optimizer",
        "summing gradients of embedding",
        "summing gradients over stages of embedding",
        "sending activations of stage 0 @0",
    ]
    (forward,) = (e for e in events if e["pid"] == 1000 and e["name"] == names[0])
    assert (forward["ts"], forward["dur"]) == (1000, 3000)


def test_collectives_that_overlap_lie_on_threads_of_their_own() -> None:
    from galvatron_compile.recorded import Event, Recording

    events = (
        Event("gather", 0, -1, 0, 1), Event("gather", 1, -1, 1, 2),
        Event("wait_gather", 0, -1, 2, 3), Event("wait_gather", 1, -1, 3, 4),
        Event("gather", 0, -1, 4, 5), Event("wait_gather", 0, -1, 5, 6),
    )  # fmt: skip
    rank = Recording(0, ("a", "b"), events, 0, 7)
    other = Recording(1, (), (Event("forward", 1, 0, 0, 1),), 0, 7)
    trace = Trace(hand.plan(), hand.pipeline(ranks=(rank, other)), None)
    found = [e for e in events_of(trace) if e["pid"] == 1000 and e["tid"] >= 100]
    names = {e["tid"]: e["args"]["name"] for e in found if e["ph"] == "M"}
    assert names == {100: "communication", 101: "communication 2"}
    assert [(e["tid"], e["ts"]) for e in found if e["ph"] == "X"] == [
        (100, 0), (101, 1000), (100, 4000),
    ]  # fmt: skip
