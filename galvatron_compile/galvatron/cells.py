"""n identical layers, one menu of options, one capacity: the exact optimum from a narrow gap.

    minimise  max_k(a_k · C + b_k · S + g_k)   with  C = Σ c,  S = Σ s,  a_k, b_k >= 0
    subject to  Σ w <= capacity,  one option for each of the n layers

Only *how many* layers take an option matters. The relaxation prices memory with one multiplier and
mixes the functions of the maximum with fixed weights; each option then has a reduced cost r >= 0,
and every assignment costs at least bound + Σ r. So those within a gap above the bound are few:
multisets of deviations with Σ r <= gap, the rest filled with two options of r = 0. The gap is
widened until the best found lies within it, which proves that it is the optimum (for the
multiplier, Handler and Zang 1980). Numbers are whole, so equal is equal.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

ROUNDS = 48  # of choosing weights for the functions; the bound holds for any weights
FIRST_GAP_SHARE = 4096


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
    """value: the minimum; counts: layers by option; c, s: their sums."""

    value: int
    counts: tuple[int, ...]
    c: int
    s: int


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


def value_of(functions: Sequence[Function], c: float, s: float) -> float:
    return max(a * c + b * s + g for a, b, g in functions)


def relax(cell: Cell, function: Function) -> Relaxed:
    """The linear relaxation for one function; the cell must fit."""
    a, b, g = function
    costs = [a * option.c + b * option.s for option in cell.options]
    weights = [option.w for option in cell.options]
    indices = range(len(costs))
    heavy = min(indices, key=lambda i: (costs[i], weights[i]))
    light, multiplier, scale, share = heavy, 0, 1, 1.0
    # Walk the lower hull of (weight, cost) from the cheapest option to the one that fits.
    while weights[heavy] * cell.count > cell.capacity:
        lighter = [i for i in indices if weights[i] < weights[heavy]]
        light = min(
            lighter,
            key=lambda i: (
                (costs[i] - costs[heavy]) / (weights[heavy] - weights[i]),
                weights[i],
            ),
        )
        if weights[light] * cell.count <= cell.capacity:
            multiplier = costs[light] - costs[heavy]
            scale = weights[heavy] - weights[light]
            room = cell.capacity / cell.count - weights[light]
            share = room / scale
            break
        heavy = light
    both = zip(costs, weights, strict=True)
    priced = [scale * cost + multiplier * weight for cost, weight in both]
    least = min(priced)
    bound = cell.count * least - multiplier * cell.capacity + scale * g
    reduced = tuple(price - least for price in priced)
    return Relaxed(bound, scale, reduced, heavy, light, share)


def bound(cell: Cell, functions: Sequence[Function]) -> int:
    """A lower bound of the minimum; the cell must fit."""
    relaxed = tightest(cell, functions)
    return -(-relaxed.bound // relaxed.scale)


def tightest(cell: Cell, functions: Sequence[Function]) -> Relaxed:
    """The best relaxation found over weights of the functions (Brown's fictitious play, 1951).

    In every round the function that is largest at the relaxed answer gains weight.
    """
    if len(functions) == 1:
        return relax(cell, functions[0])
    times = [0] * len(functions)
    best: Relaxed | None = None
    last = functions[0]
    for number in range(1, ROUNDS + 1):
        times[functions.index(last)] += 1
        mixed = (
            sum(t * f[0] for t, f in zip(times, functions, strict=True)),
            sum(t * f[1] for t, f in zip(times, functions, strict=True)),
            sum(t * f[2] for t, f in zip(times, functions, strict=True)),
        )
        found = relax(cell, mixed)
        found = Relaxed(
            found.bound, found.scale * number, found.reduced, found.heavy, found.light, found.share
        )
        if best is None or found.bound * best.scale > best.bound * found.scale:
            best = found
        c, s = (
            cell.count
            * (
                found.share * getattr(cell.options[found.heavy], name)
                + (1 - found.share) * getattr(cell.options[found.light], name)
            )
            for name in ("c", "s")
        )
        last = max(functions, key=lambda f: f[0] * c + f[1] * s + f[2])
        if times[functions.index(last)] == number:
            break  # one function is the largest all along: its own bound is exact
    assert best is not None
    return best


def solve(cell: Cell, functions: Sequence[Function], limit: int | None = None) -> Answer | None:
    """The minimum, and an assignment that has it; None if none fits or none is below ``limit``."""
    if not cell.options or not cell.fits():
        return None
    kept = _undominated(cell.options)
    small = Cell(tuple(cell.options[i] for i in kept), cell.count, cell.capacity)
    relaxed = tightest(small, functions)
    enough = None if limit is None else limit * relaxed.scale - relaxed.bound - 1
    if enough is not None and enough < 0:
        return None
    gap = max(1, abs(relaxed.bound) // FIRST_GAP_SHARE)
    while True:
        gap = gap if enough is None else min(gap, enough)
        found = _within(small, functions, relaxed, gap)
        if found is not None and found.value * relaxed.scale <= relaxed.bound + gap:
            break
        if enough is not None and gap >= enough:
            return None
        gap *= 4
    if limit is not None and found.value >= limit:
        return None
    counts = [0] * len(cell.options)
    for index, count in zip(kept, found.counts, strict=True):
        counts[index] = count
    return Answer(found.value, tuple(counts), found.c, found.s)


def _undominated(options: Sequence[Option]) -> list[int]:
    """Indices of options that no other beats in all three; of equals the first."""

    def beaten(i: int) -> bool:
        mine = options[i]
        return any(
            (other.c <= mine.c and other.s <= mine.s and other.w <= mine.w)
            and (other != mine or j < i)
            for j, other in enumerate(options)
            if j != i
        )

    return [i for i in range(len(options)) if not beaten(i)]


@dataclass(frozen=True, slots=True)
class _Label:
    """Deviations chosen so far: how many, their sums, their reduced cost, (option, count) pairs."""

    size: int
    c: int
    s: int
    w: int
    reduced: int
    chosen: tuple[tuple[int, int], ...]


def _within(cell: Cell, functions: Sequence[Function], relaxed: Relaxed, gap: int) -> Answer | None:
    """The best assignment whose reduced costs add up to at most ``gap``, if any fits."""
    fill = {relaxed.heavy, relaxed.light}
    labels = [_Label(0, 0, 0, 0, 0, ())]
    for index, option in enumerate(cell.options):
        if index in fill or relaxed.reduced[index] > gap:
            continue
        labels = _pareto(_extended(cell, labels, index, option, relaxed.reduced[index], gap))
    best: Answer | None = None
    for label in labels:
        found = _filled(cell, functions, relaxed, label)
        if found is not None and (best is None or found.value < best.value):
            best = found
    return best


def _extended(
    cell: Cell, labels: list[_Label], index: int, option: Option, reduced: int, gap: int
) -> list[_Label]:
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
    return found


def _pareto(labels: list[_Label]) -> list[_Label]:
    """Of labels of one size those that no other beats in c, s and w: the rest is filled alike."""
    kept: dict[int, list[_Label]] = {}
    for label in sorted(labels, key=lambda x: (x.c, x.s, x.w)):
        rivals = kept.setdefault(label.size, [])
        if not any(r.s <= label.s and r.w <= label.w for r in rivals):
            rivals.append(label)
    return [label for rivals in kept.values() for label in rivals]


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
    return Answer(value(low), tuple(counts), c, s)
