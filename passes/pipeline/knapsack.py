"""Alike layers under one capacity, exactly, in time that does not grow with their number.

    minimise  Σ x[j, i] · time[j, i]   over whole x  with  Σ_i x[j, i] = count[j],
    Σ x[j, i] · memory[j, i] <= capacity

The linear relaxation follows the lower convex hulls of the menus (Sinha and Zoltners 1979) and
mixes two neighbours on the hull of one menu; every other pick costs a reduced cost r >= 0 more.
So an answer is the relaxed one, a few *deviations* whose r sum to less than the gap between the
bound and the best known answer, and as many steps to the cheaper neighbour as make it fit. The
deviations are enumerated as labels that no other label beats in time and memory.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from galvatron_compile.passes.pipeline.menu import Menu
from galvatron_compile.passes.pipeline.problem import Ints

_SLACK = 1e-12  # relative; more than the rounding of the few float operations of a bound
_MOST_PAIRED = 48


@dataclass(frozen=True)
class Relaxed:
    """The linear relaxation: every menu at a hull vertex, one of them partly a vertex lower.

    bound: what the relaxed answer takes; multiplier: nanoseconds per byte; at: hull vertex of
    every menu; mixed: which menu is mixed, -1 where the fastest answer fits; excess_bytes: by how
    much the vertices are above the capacity; time_ns: what they take.
    """

    bound: float
    multiplier: float
    at: tuple[int, ...]
    mixed: int
    excess_bytes: int
    time_ns: int


@dataclass(frozen=True)
class Filling:
    """An answer: ``picks[j]`` maps option to number of layers."""

    time_ns: int
    picks: tuple[dict[int, int], ...]


def relax(menus: Sequence[Menu], counts: Sequence[int], capacity: int) -> Relaxed | None:
    """The linear relaxation; None if nothing fits."""
    at = [len(menu.hull) - 1 for menu in menus]
    time = sum(n * menu.hull_time[-1] for menu, n in zip(menus, counts, strict=True))
    excess = sum(n * menu.hull_memory[-1] for menu, n in zip(menus, counts, strict=True))
    excess -= capacity
    if excess <= 0:
        return Relaxed(float(time), 0.0, tuple(at), -1, excess, time)
    edges = sorted(
        (slope, -e, j) for j, menu in enumerate(menus) for e, slope in enumerate(menu.slopes)
    )
    for slope, minus_e, j in edges:
        menu, e = menus[j], 1 - minus_e
        frees = menu.hull_memory[e] - menu.hull_memory[e - 1]
        costs = menu.hull_time[e - 1] - menu.hull_time[e]
        if counts[j] * frees >= excess:
            bound = time + costs * excess / frees
            return Relaxed(bound, slope, tuple(at), j, excess, time)
        excess -= counts[j] * frees
        time += counts[j] * costs
        at[j] = e - 1
    return None


def fill(
    menus: Sequence[Menu], counts: Sequence[int], capacity: int, limit: int | None = None
) -> Filling | None:
    """The fastest answer below ``limit`` nanoseconds; None if there is none."""
    relaxed = relax(menus, counts, capacity)
    if relaxed is None or (limit is not None and _least(relaxed.bound) >= limit):
        return None
    if relaxed.mixed < 0:
        picks = tuple({int(menu.options[-1]): n} for menu, n in zip(menus, counts, strict=True))
        return Filling(relaxed.time_ns, picks)
    return _Deviations(menus, counts, relaxed, limit).run()


def _least(bound: float) -> int:
    """The smallest whole number of nanoseconds that the bound does not exclude."""
    return math.ceil(bound - _SLACK * abs(bound))


class _Deviations:
    """Enumerates deviations from a relaxed answer. Items are (menu, position) pairs."""

    def __init__(
        self,
        menus: Sequence[Menu],
        counts: Sequence[int],
        relaxed: Relaxed,
        limit: int | None,
    ) -> None:
        self.menus, self.counts, self.relaxed = menus, counts, relaxed
        self.base = [menu.hull[e] for menu, e in zip(menus, relaxed.at, strict=True)]
        j = relaxed.mixed
        menu, e = menus[j], relaxed.at[j]
        self.partner = menu.hull[e - 1]
        self.step_bytes = menu.hull_memory[e] - menu.hull_memory[e - 1]
        self.step_ns = menu.hull_time[e - 1] - menu.hull_time[e]
        self.slack = _SLACK * (abs(relaxed.bound) + relaxed.multiplier * 2.0**44)
        # The answer: steps to the partner, and deviations as a list of (menu, position).
        self.steps = -(-relaxed.excess_bytes // self.step_bytes)
        self.deviations: list[tuple[int, int]] = []
        self.found = True
        self.best = relaxed.time_ns + self.steps * self.step_ns
        if limit is not None and self.best >= limit:
            self.best, self.found = limit, False

    @property
    def gap(self) -> float:
        """Reduced cost that a better answer may have."""
        return self.best - 1 - self.relaxed.bound + self.slack

    def run(self) -> Filling | None:
        if self.gap >= 0:
            self.collect()
            self.pairs()
            self.labels()
        return self.answer() if self.found else None

    def collect(self) -> None:
        """Items within the gap, by reduced cost. Sets time, memory, menu and position of each."""
        menu_of, position, time, memory, reduced = [], [], [], [], []
        for j, (menu, base) in enumerate(zip(self.menus, self.base, strict=True)):
            dt = menu.time_ns - menu.time_ns[base]
            dw = menu.memory_bytes - menu.memory_bytes[base]
            r = np.maximum(dt + self.relaxed.multiplier * dw, 0.0)
            r[base] = np.inf
            if j == self.relaxed.mixed:
                r[self.partner] = np.inf
            near = np.flatnonzero(r <= self.gap)
            menu_of.append(np.full(len(near), j, dtype=np.int64))
            position.append(near)
            time.append(dt[near])
            memory.append(dw[near])
            reduced.append(r[near])
        order = np.argsort(np.concatenate(reduced), kind="stable")
        self.menu_of = np.concatenate(menu_of)[order]
        self.position = np.concatenate(position)[order]
        self.time: Ints = np.concatenate(time)[order]
        self.memory: Ints = np.concatenate(memory)[order]
        self.reduced = np.concatenate(reduced)[order]

    def complete(self, time: Ints, memory: Ints, used: Ints) -> tuple[int, int, int] | None:
        """(index, steps, time) of the best completion by steps to the partner, if any is better.

        used: how many layers of the mixed menu have deviated already.
        """
        if not len(time):
            return None
        excess = memory + self.relaxed.excess_bytes
        steps = np.maximum(0, -(-excess // self.step_bytes))
        total = self.relaxed.time_ns + time + steps * self.step_ns
        room = self.counts[self.relaxed.mixed] - used
        total = np.where((steps <= room) & (room >= 0), total, self.best)
        at = int(total.argmin())
        if total[at] >= self.best:
            return None
        return at, int(steps[at]), int(total[at])

    def pairs(self) -> None:
        """One and two deviations, for a good answer before the enumeration."""
        mixed = (self.menu_of == self.relaxed.mixed).astype(np.int64)
        found = self.complete(self.time, self.memory, mixed)
        if found is not None:
            at, self.steps, self.best = found
            self.deviations, self.found = [self.item(at)], True
        n = min(len(self.time), _MOST_PAIRED)
        if n < 2 or self.reduced[0] + self.reduced[1] > self.gap:
            return
        first, second = np.triu_indices(n)
        near = self.reduced[first] + self.reduced[second] <= self.gap
        counts = np.asarray(self.counts)
        same = self.menu_of[first] == self.menu_of[second]
        near &= ~same | (counts[self.menu_of[first]] >= 2)
        first, second = first[near], second[near]
        found = self.complete(
            self.time[first] + self.time[second],
            self.memory[first] + self.memory[second],
            mixed[first] + mixed[second],
        )
        if found is not None:
            at, self.steps, self.best = found
            self.deviations = [self.item(int(first[at])), self.item(int(second[at]))]
            self.found = True

    def item(self, index: int) -> tuple[int, int]:
        return int(self.menu_of[index]), int(self.position[index])

    def labels(self) -> None:
        """All sets of deviations within the gap, menu by menu, the mixed menu last."""
        keep = self.reduced <= self.gap
        if not keep.any():
            return
        mixed = self.relaxed.mixed
        items = np.flatnonzero(keep)
        items = items[np.lexsort((self.menu_of[items], self.menu_of[items] == mixed))]
        time = memory = used = np.zeros(1, dtype=np.int64)
        reduced = np.zeros(1)
        history: list[tuple[int, Ints, Ints]] = []  # item; per label: label before, how many
        current = -1
        for index in items:
            j = int(self.menu_of[index])
            if j != current:
                current, used = j, np.zeros(len(time), dtype=np.int64)
            r = float(self.reduced[index])
            most = self.counts[j]
            if r > 0:
                most = min(most, int(max(0.0, self.gap) / r))
            how_many = np.repeat(np.arange(most + 1), len(time))
            before = np.tile(np.arange(len(time)), most + 1)
            new_reduced = reduced[before] + how_many * r
            new_used = used[before] + how_many
            near = (new_reduced <= self.gap) & (new_used <= self.counts[j])
            before, how_many = before[near], how_many[near]
            new_time = time[before] + how_many * self.time[index]
            new_memory = memory[before] + how_many * self.memory[index]
            kept = _undominated(new_time, new_memory, new_used[near])
            before, how_many = before[kept], how_many[kept]
            time, memory, used = new_time[kept], new_memory[kept], new_used[near][kept]
            reduced = new_reduced[near][kept]
            history.append((int(index), before, how_many))
            in_mixed = used if j == mixed else np.zeros(len(time), dtype=np.int64)
            found = self.complete(time, memory, in_mixed)
            if found is not None:
                at, self.steps, self.best = found
                self.deviations, self.found = self.trace(history, at), True

    def trace(self, history: list[tuple[int, Ints, Ints]], at: int) -> list[tuple[int, int]]:
        result: list[tuple[int, int]] = []
        for index, before, how_many in reversed(history):
            result += [self.item(index)] * int(how_many[at])
            at = int(before[at])
        return result

    def answer(self) -> Filling:
        positions = [{base: n} for base, n in zip(self.base, self.counts, strict=True)]
        moves = [(self.relaxed.mixed, self.partner, self.steps)]
        moves += [(j, position, 1) for j, position in self.deviations]
        for j, position, count in moves:
            positions[j][self.base[j]] -= count
            positions[j][position] = positions[j].get(position, 0) + count
        picks = tuple(
            {int(menu.options[i]): n for i, n in chosen.items() if n}
            for menu, chosen in zip(self.menus, positions, strict=True)
        )
        return Filling(self.best, picks)


def _undominated(time: Ints, memory: Ints, used: Ints) -> Ints:
    """Labels that none with as many deviations beats in time and memory."""
    order = np.lexsort((memory, time, used))
    lowered = memory[order] - used[order] * (int(memory.max()) - int(memory.min()) + 1)
    first = np.ones(len(order), dtype=np.bool_)
    first[1:] = lowered[1:] < np.minimum.accumulate(lowered)[:-1]
    return np.asarray(order[first])
