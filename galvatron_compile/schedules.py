"""Orders in which a group of ranks runs its micro-batches, and what follows from them.

Each schedule is a list of actions per pipeline group; memory is counted by walking that list, so
that what the search expects is what the runtime does. Sources: GPipe (arXiv 1811.06965, section
2.3), 1F1B (PipeDream-Flush, arXiv 2006.09503, section 3.2), interleaved 1F1B (arXiv 2104.04473,
section 2.2), zero-bubble ZB-H1 (arXiv 2401.10241, section 2.3). No torch here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from typing import Literal

from galvatron_compile.errors import PlanError
from galvatron_compile.plans import SCHEDULES

Kind = Literal["F", "B", "I", "W"]


@dataclass(frozen=True, slots=True)
class Action:
    """One piece of work of a group.

    kind: "F" forward, "B" whole backward, "I" gradient of the inputs, "W" gradient of the weights.
    chunk: which of the group's stages (chunk c of group g is stage c · pp + g).
    """

    kind: Kind
    chunk: int
    micro_batch: int


def bubble_share(schedule: str, virtual: int = 1) -> Fraction:
    """Idle time of a balanced pipeline, in units of (pp - 1) forwards and backwards of a group.

    Interleaving divides the bubble by the number of chunks; ZB-H1 leaves a third where forward,
    input gradient and weight gradient take equally long.
    """
    _check_name(schedule)
    if schedule == "interleaved":
        return Fraction(1, virtual)
    return Fraction(1, 3) if schedule == "zero-bubble" else Fraction(1)


def why_not(schedule: str, pp: int, num_micro_batches: int, virtual: int = 1) -> str | None:
    """Why the schedule cannot run, with what to change; None if it can."""
    _check_name(schedule)
    m = num_micro_batches
    if min(pp, m, virtual) < 1:
        return f"pp, micro-batches and virtual must be at least 1, got {pp}, {m} and {virtual}"
    if virtual > 1 and schedule != "interleaved":
        return f"{schedule} runs one stage a group; set virtual to 1 or use interleaved"
    if schedule == "interleaved" and virtual == 1:
        return "interleaved with one stage a group is 1f1b; use 1f1b or raise virtual to 2"
    if schedule in ("interleaved", "zero-bubble") and pp == 1:
        return f"{schedule} needs at least 2 pipeline groups; use 1f1b with pp=1"
    if schedule != "gpipe" and m < pp:
        return f"{schedule} over {pp} groups needs at least {pp} micro-batches, got {m}; use gpipe"
    if schedule == "interleaved" and m % pp:
        nearest = max(1, round(m / pp)) * pp
        return f"interleaved needs a multiple of {pp} micro-batches, got {m}; use {nearest}"
    return None


def actions(
    schedule: str, pp: int, num_micro_batches: int, virtual: int = 1, group: int = 0
) -> list[Action]:
    """Everything that pipeline group ``group`` computes in a step, in order.

    Raises PlanError where :func:`why_not` gives a reason, or for a group that does not exist.
    """
    reason = why_not(schedule, pp, num_micro_batches, virtual)
    if reason is None and not 0 <= group < pp:
        reason = f"there is no pipeline group {group}; use 0 to {pp - 1}"
    if reason is not None:
        raise PlanError(reason)
    m = num_micro_batches
    if schedule == "gpipe":
        return [Action(kind, 0, i) for kind in ("F", "B") for i in range(m)]
    if schedule == "zero-bubble":
        return _zero_bubble(pp, m, group)
    return _interleaved(pp, m, virtual, group)


def _interleaved(pp: int, m: int, virtual: int, group: int) -> list[Action]:
    """Forwards run in rounds of pp micro-batches through every chunk; one chunk is 1F1B.

    The forwards before the first backward are those that other groups need in the meantime.
    """
    total = m * virtual
    ahead = pp - 1 - group if virtual == 1 else 2 * (pp - 1 - group) + (virtual - 1) * pp
    ahead = min(ahead, total)

    def work(kind: Kind, index: int) -> Action:
        turn, chunk = divmod(index // pp, virtual) if virtual > 1 else (index // pp, 0)
        chunk = chunk if kind == "F" else virtual - 1 - chunk
        return Action(kind, chunk, turn * pp + index % pp)

    result = [work("F", index) for index in range(ahead)]
    for index in range(total - ahead):
        result += [work("F", ahead + index), work("B", index)]
    return result + [work("B", index) for index in range(total - ahead, total)]


def _zero_bubble(pp: int, m: int, group: int) -> list[Action]:
    """ZB-H1: 1F1B whose weight gradients run ``group`` micro-batches late and fill the bubble."""
    ahead = min(pp - group, m)
    result = [Action("F", 0, i) for i in range(ahead)]
    for i in range(m):
        result.append(Action("I", 0, i))
        if i >= group:
            result.append(Action("W", 0, i - group))
        if ahead + i < m:
            result.append(Action("F", 0, ahead + i))
    return result + [Action("W", 0, i) for i in range(max(0, m - group), m)]


def in_flight(
    schedule: str, pp: int, num_micro_batches: int, virtual: int = 1, group: int = 0
) -> tuple[int, ...]:
    """Micro-batches whose activations each chunk of ``group`` holds when the group holds most.

    Counted at the first such moment of the action list. Every peak has been seen once two rounds
    of pp micro-batches are under way, so a longer list is not walked (GPipe's is, it keeps all).
    PlanError where :func:`why_not` gives a reason.
    """
    m = num_micro_batches
    reason = why_not(schedule, pp, m, virtual)
    if reason is not None:
        raise PlanError(reason)
    return _walked(schedule, pp, m if schedule == "gpipe" else min(m, 2 * pp), virtual, group)


@lru_cache(maxsize=16384)
def _walked(schedule: str, pp: int, m: int, virtual: int, group: int) -> tuple[int, ...]:
    return peak_held(actions(schedule, pp, m, virtual, group), virtual)


def peak_held(work: Sequence[Action], virtual: int = 1) -> tuple[int, ...]:
    """Activations held per chunk at the first moment when most are held.

    A forward starts to hold its micro-batch; the whole backward or the weight gradient lets go.
    """
    held = [0] * virtual
    most, at_peak = 0, tuple(held)
    total = 0
    for action in work:
        if action.kind == "I":
            continue
        change = 1 if action.kind == "F" else -1
        held[action.chunk] += change
        total += change
        if total > most:
            most, at_peak = total, tuple(held)
    return at_peak


def _check_name(schedule: str) -> None:
    if schedule not in SCHEDULES:
        known = ", ".join(SCHEDULES)
        raise PlanError(f"schedule {schedule!r} is not known; use one of {known}")
