"""The nouns of a cell, and the enumeration of its assignments within a gap above a bound.

See :mod:`.cells`, which uses it.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

FEW_LABELS = 5_000
MANY_LABELS = 100_000
"""Labels at a time: to look around, and to prove. Beyond, a bound takes the place of the proof."""


class TooManyLabels(Exception):
    """An enumeration would not end within reason; the caller keeps to what is proven."""


@dataclass(frozen=True)
class Option:
    """What one layer adds: two times and a weight, whole numbers."""

    c: int
    s: int
    w: int


Function = tuple[int, int, int]
"""(a, b, g) of a · C + b · S + g."""


@dataclass(frozen=True)
class Cell:
    """``count`` layers, each with one of ``options``, within ``capacity``."""

    options: tuple[Option, ...]
    count: int
    capacity: int

    def least_weight(self) -> int:
        return self.count * min(option.w for option in self.options)

    def fits(self) -> bool:
        return self.least_weight() <= self.capacity


@dataclass(frozen=True)
class Answer:
    """value: of an assignment; counts: its layers by option; c, s: their sums.

    bound: no assignment has a smaller value; equal to value unless labels ran out.
    """

    value: int
    counts: tuple[int, ...]
    c: int
    s: int
    bound: int


@dataclass(frozen=True)
class Relaxed:
    """A lower bound, scale · value, and what every option adds to it (reduced).

    heavy, light: two options (perhaps one) of reduced cost 0 that use up the capacity; share: how
    much of heavy.
    """

    bound: int
    scale: int
    reduced: tuple[int, ...]
    heavy: int
    light: int
    share: float


@dataclass(frozen=True, slots=True)
class _Label:
    """Deviations chosen so far: how many, their sums, their reduced cost, (option, count) pairs."""

    size: int
    c: int
    s: int
    w: int
    reduced: int
    chosen: tuple[tuple[int, int], ...]


def within(
    cell: Cell, functions: Sequence[Function], relaxed: Relaxed, gap: int, most_labels: int
) -> Answer | None:
    """The best assignment whose reduced costs add up to at most ``gap``, if any fits."""
    fill = {relaxed.heavy, relaxed.light}
    labels = [_Label(0, 0, 0, 0, 0, ())]
    for index in range(len(cell.options)):
        if index in fill or relaxed.reduced[index] > gap:
            continue
        extended = _extended(cell, labels, index, relaxed.reduced[index], gap, most_labels)
        labels = _pareto(extended)
    best: Answer | None = None
    for label in labels:
        found = _filled(cell, functions, relaxed, label)
        if found is not None and (best is None or found.value < best.value):
            best = found
    return best


def _extended(
    cell: Cell, labels: list[_Label], index: int, reduced: int, gap: int, most_labels: int
) -> list[_Label]:
    option = cell.options[index]
    found = []
    for label in labels:
        most = cell.count - label.size
        if reduced:
            most = min(most, (gap - label.reduced) // reduced)
        found.append(label)
        for n in range(1, most + 1):
            found.append(
                _Label(
                    label.size + n,
                    label.c + n * option.c,
                    label.s + n * option.s,
                    label.w + n * option.w,
                    label.reduced + n * reduced,
                    (*label.chosen, (index, n)),
                )
            )
        if len(found) > most_labels:
            raise TooManyLabels
    return found


def _pareto(labels: list[_Label]) -> list[_Label]:
    """Of labels of one size those that no other beats in c, s and w: the rest is filled alike."""
    kept: list[_Label] = []
    # By size: s rising and w falling of what was kept, whose c is no larger.
    stairs: dict[int, tuple[list[int], list[int]]] = {}
    for label in sorted(labels, key=lambda x: (x.c, x.s, x.w)):
        s, w = stairs.setdefault(label.size, ([], []))
        at = bisect_right(s, label.s)
        if at and w[at - 1] <= label.w:
            continue
        kept.append(label)
        last = at
        while last < len(w) and w[last] >= label.w:
            last += 1
        s[at:last], w[at:last] = [label.s], [label.w]
    return kept


def _filled(
    cell: Cell, functions: Sequence[Function], relaxed: Relaxed, label: _Label
) -> Answer | None:
    """The best split of the remaining layers between the two options of the relaxation."""
    heavy, light = cell.options[relaxed.heavy], cell.options[relaxed.light]
    rest = cell.count - label.size

    def sums(n: int) -> tuple[int, int]:
        """With n light ones."""
        return (
            label.c + n * light.c + (rest - n) * heavy.c,
            label.s + n * light.s + (rest - n) * heavy.s,
        )

    def value(n: int) -> int:
        c, s = sums(n)
        return max(a * c + b * s + g for a, b, g in functions)

    over = label.w + rest * heavy.w - cell.capacity
    least = 0
    if over > 0:
        saved = heavy.w - light.w
        if saved <= 0 or over > rest * saved:
            return None
        least = -(-over // saved)
    low, high = least, rest if relaxed.heavy != relaxed.light else least
    while low < high:  # the value is convex in n
        middle = (low + high) // 2
        if value(middle + 1) < value(middle):
            low = middle + 1
        else:
            high = middle
    counts = [0] * len(cell.options)
    for index, n in label.chosen:
        counts[index] = n
    counts[relaxed.light] += low
    counts[relaxed.heavy] += rest - low
    c, s = sums(low)
    return Answer(value(low), tuple(counts), c, s, 0)
