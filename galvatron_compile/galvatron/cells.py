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

from galvatron_compile.galvatron.labels import (
    MANY_LABELS,
    Answer,
    Cell,
    Function,
    Option,
    Relaxed,
    TooManyLabels,
    within,
)

ROUNDS = 48  # of choosing weights for the functions; the bound holds for any weights
FIRST_GAP_SHARE = 4096


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


def solve(
    cell: Cell,
    functions: Sequence[Function],
    limit: int | None = None,
    most_labels: int = MANY_LABELS,
) -> Answer | None:
    """The minimum, and an assignment that has it; None if none fits or none is below ``limit``.

    If that takes too many labels, a good assignment and a bound (see :class:`Answer`).
    """
    if not cell.options or not cell.fits():
        return None
    kept = _undominated(cell.options)
    small = Cell(tuple(cell.options[i] for i in kept), cell.count, cell.capacity)
    relaxed = tightest(small, functions)
    enough = None if limit is None else limit * relaxed.scale - relaxed.bound - 1
    if enough is not None and enough < 0:
        return None
    best = within(
        small, functions, relaxed, -1, most_labels
    )  # the two options of the relaxation alone
    gap = max(1, abs(relaxed.bound) // FIRST_GAP_SHARE)
    searched = -1
    while True:
        if best is not None:  # what is better than this lies in a narrower gap
            narrow = best.value * relaxed.scale - relaxed.bound - 1
            enough = narrow if enough is None else min(enough, narrow)
        if enough is not None and searched >= enough:
            break
        gap = gap if enough is None else min(gap, enough)
        try:
            found = within(small, functions, relaxed, gap, most_labels)
        except TooManyLabels:
            break
        searched = gap
        if found is not None and (best is None or found.value < best.value):
            best = found
        gap *= 4
    if best is None:
        return None
    least = -(-(relaxed.bound + searched + 1) // relaxed.scale)
    if limit is not None and min(best.value, least) >= limit:
        return None
    counts = [0] * len(cell.options)
    for index, count in zip(kept, best.counts, strict=True):
        counts[index] = count
    return Answer(best.value, tuple(counts), best.c, best.s, min(best.value, least))


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
