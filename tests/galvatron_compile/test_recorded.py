"""Spans, messages and causes of recordings written by hand."""

from __future__ import annotations

import pytest
import recorded_by_hand as hand

from galvatron_compile.errors import PlanError
from galvatron_compile.recorded import Event, Recording
from galvatron_compile.recorded_causes import causes
from galvatron_compile.timeline import Held, Span


def test_collectives_are_in_flight_from_their_start_to_the_end_of_their_wait() -> None:
    events = (
        Event("gather", 0, -1, 0, 1),
        Event("gather", 1, -1, 1, 2),
        Event("wait_gather", 0, -1, 2, 3),
        Event("forward", 0, 0, 3, 5),
        Event("free", 0, -1, 5, 5),
        Event("wait_gather", 1, -1, 5, 6),
        Event("backward", 1, 0, 6, 9),
        Event("reduce", 1, -1, 9, 10),
        Event("reduce", 1, -1, 11, 12),
        Event("wait_reduce", 1, -1, 12, 13),
        Event("wait_reduce", 1, -1, 13, 15),
        Event("reduce_tensor", 0, -1, 15, 16),
    )
    assert Recording(0, ("a", "b"), events, 0, 16).spans == (
        Span("gather", 0, -1, "communication", 0, 3),
        Span("gather", 1, -1, "communication", 1, 6),
        Span("forward", 0, 0, "compute", 3, 5),
        Span("backward", 1, 0, "compute", 6, 9),
        Span("reduce", 1, -1, "communication", 9, 13),
        Span("reduce", 1, -1, "communication", 11, 15),
        Span("reduce_tensor", 0, -1, "communication", 15, 16),
    )


def test_memory_is_the_most_during_an_action_and_the_rest_after_it() -> None:
    events = (Event("forward", 0, 0, 1, 2, 30, 50), Event("backward", 0, 0, 3, 5, 20, 40))
    recording = Recording(0, (), events, 0, 6, start_bytes=10)
    assert recording.memory == (
        Held(0, 10), Held(1, 50), Held(2, 30), Held(3, 40), Held(5, 20),
    )  # fmt: skip
    assert recording.peak_bytes == 50
    assert Recording(0, (), events, 0, 6).memory == ()


def test_messages_are_put_together_from_both_ends() -> None:
    recordings = hand.pipeline()
    forward, backward = recordings.messages
    assert forward[:5] == ("send_activations", 0, 0, 0, 1)
    assert backward[:5] == ("send_gradients", 1, 0, 1, 0)
    assert forward.travelling_ms == 2  # sent at 4, waited for from 1 to 6
    assert backward.travelling_ms == 0.5  # rank 0 came late: only what it still took
    own = [span for span in recordings.spans(0) if span.stream == "messages"]
    assert own == [Span("send_activations", 0, 0, "messages", 4, 6)]
    (late,) = [span for span in recordings.spans(1) if span.stream == "messages"]
    assert (late.start_ms, late.end_ms) == (9, 14)


def test_causes_by_hand_add_up_to_the_step() -> None:
    recordings = hand.pipeline()
    first, second = (causes(recordings, rank) for rank in (0, 1))
    assert first.computed_ms == 3 + 4
    assert first.exposed == {
        "send_activations": 1, "send_gradients": 1, "reduce": 0.5, "reduce_tied": 1,
    }  # fmt: skip
    assert first.bubble_ms == 0
    assert first.optimizer_ms == 1
    assert first.other_ms == pytest.approx(recordings.step_ms - 7 - 3.5 - 1)
    assert second.computed_ms == 3
    # Until rank 0 sent (1 to 4), and at the tied sum until rank 0 came (10 to 19); at the end
    # until rank 0's optimizer was done.
    assert second.bubble_ms == 3 + 9 + 1
    assert second.exposed == {"send_activations": 2.5, "send_gradients": 0.5, "reduce_tied": 1}
    for found in (first, second):
        whole = found.computed_ms + found.exposed_ms + found.bubble_ms
        whole += found.optimizer_ms + found.other_ms
        assert whole == pytest.approx(recordings.step_ms)


def test_times_that_run_backwards_are_refused() -> None:
    events = (Event("forward", 0, 0, 2, 1),)
    with pytest.raises(PlanError, match="rank 3 goes back in time"):
        Recording(3, (), events, 0, 4)
    with pytest.raises(PlanError, match="rank 3 is empty"):
        Recording(3, (), (), 0, 4)
