"""Action lists of the pipeline schedules: right order, no deadlock, the bubble that is claimed."""

from __future__ import annotations

from collections import Counter
from fractions import Fraction

import pytest

from galvatron_compile.errors import PlanError
from galvatron_compile.plans import SCHEDULES
from galvatron_compile.schedules import (
    Action,
    actions,
    bubble_share,
    in_flight,
    peak_held,
    why_not,
)
from galvatron_compile.torch_private import pipelining_orders

CASES = [
    (schedule, pp, m, virtual)
    for schedule in SCHEDULES
    for pp in (1, 2, 3, 4, 8)
    for m in (1, 2, 3, 4, 6, 8, 12, 16, 24)
    for virtual in (1, 2, 3)
    if why_not(schedule, pp, m, virtual) is None
]
DURATION = {"F": 1, "I": 1, "W": 1, "B": 2}


def _finish(schedule: str, pp: int, m: int, virtual: int) -> Fraction:
    """Run all groups' lists side by side, each action as early as its inputs allow."""
    lists = [actions(schedule, pp, m, virtual, group) for group in range(pp)]
    done: dict[tuple[str, int, int], Fraction] = {}
    at, clock = [0] * pp, [Fraction(0)] * pp
    last = pp * virtual - 1

    def ready(group: int, action: Action) -> Fraction | None:
        stage, i = action.chunk * pp + group, action.micro_batch
        if action.kind == "F":
            return Fraction(0) if stage == 0 else done.get(("F", stage - 1, i))
        if action.kind == "W":
            return done.get(("I", stage, i))
        kind = "I" if action.kind == "I" else "B"
        return done.get(("F", stage, i) if stage == last else (kind, stage + 1, i))

    while any(at[g] < len(lists[g]) for g in range(pp)):
        moved = False
        for group in range(pp):
            while at[group] < len(lists[group]):
                action = lists[group][at[group]]
                start = ready(group, action)
                if start is None:
                    break
                duration = Fraction(DURATION[action.kind], virtual)
                clock[group] = max(clock[group], start) + duration
                stage = action.chunk * pp + group
                done[action.kind, stage, action.micro_batch] = clock[group]
                at[group] += 1
                moved = True
        assert moved, "deadlock"
    return max(clock)


@pytest.mark.parametrize(("schedule", "pp", "m", "virtual"), CASES)
def test_lists_run_to_the_end_and_idle_as_long_as_the_bubble_share_says(
    schedule: str, pp: int, m: int, virtual: int
) -> None:
    expected = 3 * (m + bubble_share(schedule, virtual) * (pp - 1))
    assert _finish(schedule, pp, m, virtual) == expected


@pytest.mark.parametrize(("schedule", "pp", "m", "virtual"), CASES)
def test_every_micro_batch_once_in_every_chunk(
    schedule: str, pp: int, m: int, virtual: int
) -> None:
    kinds = "FIW" if schedule == "zero-bubble" else "FB"
    for group in range(pp):
        found = Counter(actions(schedule, pp, m, virtual, group))
        wanted = {Action(k, c, i) for k in kinds for c in range(virtual) for i in range(m)}
        assert found == Counter(wanted)


@pytest.mark.parametrize(("schedule", "pp", "m", "virtual"), CASES)
def test_in_flight_equals_the_walk_of_the_whole_list(
    schedule: str, pp: int, m: int, virtual: int
) -> None:
    for group in range(pp):
        whole = peak_held(actions(schedule, pp, m, virtual, group), virtual)
        assert in_flight(schedule, pp, m, virtual, group) == whole


def test_in_flight_as_published() -> None:
    for pp, m in [(4, 4), (4, 9), (8, 16), (3, 4)]:
        for group in range(pp):
            assert in_flight("1f1b", pp, m, 1, group) == (min(pp - group, m),)
            assert in_flight("gpipe", pp, m, 1, group) == (m,)
            assert in_flight("zero-bubble", pp, m, 1, group) == (min(pp, m),)
    for group in range(4):
        held = in_flight("interleaved", 4, 16, 3, group)
        assert sum(held) == 2 * (3 - group) + 2 * 4 + 1


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b", "interleaved", "zero-bubble"])
def test_equal_to_the_lists_of_torch(schedule: str) -> None:
    """1F1B of torch's lists skips the first forward of the last rank, so that rank is left out
    there; its zero-bubble schedule has at least two chunks, so only our own case is checked."""
    name = {"gpipe": "GPipe", "1f1b": "1F1B", "interleaved": "Interleaved1F1B"}.get(schedule)
    if name is None:
        assert [f"{a.kind}{a.micro_batch}" for a in actions("zero-bubble", 3, 4, 1, 1)] == [
            *("F0", "F1", "I0", "F2", "I1", "W0", "F3", "I2", "W1", "I3", "W2", "W3"),
        ]
        return
    for pp, m, virtual in [(2, 4, 2), (4, 8, 2), (4, 8, 3), (4, 4, 2), (8, 16, 2)]:
        chunks = virtual if schedule == "interleaved" else 1
        theirs = pipelining_orders(name, pp, m, chunks)
        for group in range(pp - (schedule == "1f1b")):
            ours = actions(schedule, pp, m, chunks, group)
            assert [(a.kind, a.chunk * pp + group, a.micro_batch) for a in ours] == theirs[group]


@pytest.mark.parametrize(
    ("schedule", "pp", "m", "virtual", "message"),
    [
        ("1f1b", 4, 3, 1, "at least 4 micro-batches"),
        ("interleaved", 4, 6, 2, "multiple of 4 micro-batches, got 6; use 8"),
        ("interleaved", 4, 8, 1, "use 1f1b or raise virtual"),
        ("zero-bubble", 1, 8, 1, "at least 2 pipeline groups"),
        ("gpipe", 4, 8, 2, "set virtual to 1"),
        ("gpipe", 0, 8, 1, "must be at least 1"),
    ],
)
def test_illegal_schedules_say_what_to_change(
    schedule: str, pp: int, m: int, virtual: int, message: str
) -> None:
    assert message in str(why_not(schedule, pp, m, virtual))
    with pytest.raises(PlanError, match=message):
        actions(schedule, pp, m, virtual)


def test_unknown_schedules_and_groups_are_refused() -> None:
    with pytest.raises(PlanError, match="schedule 'dual' is not known"):
        bubble_share("dual")
    with pytest.raises(PlanError, match="no pipeline group 4"):
        actions("1f1b", 4, 8, 1, 4)
