"""A pipeline as a whole, where it does not fall apart into cells.

A stage that synchronises gradients for longer than the stages before it compute delays the step, so
a *slower* early stage can make it shorter: the least C_i of every stage need not be the best.
:func:`improved` betters a plan stage by stage; :func:`best_combination` combines, depth first, all
outcomes (C_i, S_i) that may be part of a better plan, which is exact and more work the wider the
gap between bound and best plan.
"""

from __future__ import annotations

from collections.abc import Sequence

from galvatron_compile.galvatron.cells import relax, solve
from galvatron_compile.galvatron.labels import (
    FEW_LABELS,
    MANY_LABELS,
    Cell,
    Function,
    TooManyLabels,
)
from galvatron_compile.galvatron.pricing import exposed_ms, pipeline_ms

Counts = tuple[int, ...]


def best_combination(
    cells: Sequence[Cell], ends_ps: Sequence[int], chunks: int, limit: int
) -> tuple[int, list[Counts]] | None:
    """Step and layers by option of every stage; None if no combination is below ``limit``.

    Raises TooManyLabels if that cannot be settled within reason.
    """
    tried = 0
    lowest = []
    for cell, ends in zip(cells, ends_ps, strict=True):
        answer = solve(cell, [(1, 0, 0)], None, MANY_LABELS)
        if answer is None:
            return None
        lowest.append(answer.bound + ends)
    stages = []
    for i, (cell, ends) in enumerate(zip(cells, ends_ps, strict=True)):
        most = _slowest(lowest, i, chunks, limit) - ends
        stages.append(sorted((c + ends, s, n) for (c, s), n in outcomes(cell, most).items()))
    best: tuple[int, list[Counts]] | None = None

    def descend(c: list[int], before: int, exposed: int, counts: list[Counts]) -> None:
        """exposed: the longest synchronisation left of the stages chosen; before: their ΣC."""
        nonlocal best, tried
        tried += 1
        if tried > MANY_LABELS:
            raise TooManyLabels
        most = limit if best is None else best[0]
        total = int(pipeline_ms([*c, *lowest[len(c) :]], chunks)) + exposed
        if total >= most:
            return
        if len(c) == len(stages):
            best = total, counts
            return
        for mine, s, numbers in stages[len(c)]:
            left = max(exposed, s - before - mine)
            descend([*c, mine], before + mine, left, [*counts, numbers])

    descend([], 0, 0, [])
    return best


def improved(
    cells: Sequence[Cell], ends_ps: Sequence[int], chunks: int, counts: Sequence[Counts]
) -> list[Counts]:
    """Better one stage at a time with the others as they are, until none gets better."""
    chosen = list(counts)
    best = step_ps(cells, ends_ps, chunks, chosen)
    stage, unchanged = 0, 0
    while unchanged < len(cells):
        functions = _functions(cells, ends_ps, chunks, chosen, stage)
        answer = solve(cells[stage], functions, most_labels=FEW_LABELS)
        assert answer is not None
        tried = [*chosen[:stage], answer.counts, *chosen[stage + 1 :]]
        step = step_ps(cells, ends_ps, chunks, tried)
        unchanged = 0 if step < best else unchanged + 1
        if step < best:
            best, chosen = step, tried
        stage = (stage + 1) % len(cells)
    return chosen


def step_ps(
    cells: Sequence[Cell], ends_ps: Sequence[int], chunks: int, counts: Sequence[Counts]
) -> int:
    c, s = _sums(cells, ends_ps, counts)
    return int(pipeline_ms(c, chunks) + exposed_ms(c, s))


def _sums(
    cells: Sequence[Cell], ends_ps: Sequence[int], counts: Sequence[Counts]
) -> tuple[list[int], list[int]]:
    """C_i and S_i."""
    rows = [list(zip(n, cell.options, strict=True)) for n, cell in zip(counts, cells, strict=True)]
    c = [sum(n * o.c for n, o in row) + ends for row, ends in zip(rows, ends_ps, strict=True)]
    return c, [sum(n * o.s for n, o in row) for row in rows]


def _functions(
    cells: Sequence[Cell],
    ends_ps: Sequence[int],
    chunks: int,
    counts: Sequence[Counts],
    stage: int,
) -> list[Function]:
    """The step as a maximum of functions of one stage's (C, S) of layers, the others given.

    Those that fall with C are left out, so this bounds the step from below.
    """
    c, s = _sums(cells, ends_ps, counts)
    pp = len(cells)
    drained = max(0, chunks + 1 - pp)
    last = [chunks - 1 if i == pp - 1 else 0 for i in range(pp)]
    pipeline = [
        [1 + extra for extra in last],
        [min(pp, chunks) - 1 + drained, *[0] * (pp - 1)],
        [drained, *[1] * (pp - 1)],
    ]
    found = []
    for weights in pipeline:
        for exposing in range(-1, pp):
            mine = [w - (i <= exposing) for i, w in enumerate(weights)]
            fixed = sum(w * x for i, (w, x) in enumerate(zip(mine, c, strict=True)) if i != stage)
            if exposing not in (-1, stage):
                fixed += s[exposing]
            if mine[stage] >= 0:
                fixed += mine[stage] * ends_ps[stage]
                found.append((mine[stage], int(exposing == stage), fixed))
    return found


def _slowest(lowest: Sequence[int], stage: int, chunks: int, limit: int) -> int:
    """The largest C of one stage with which the pipeline alone stays below ``limit``.

    The pipeline rises with it, and at least picosecond by picosecond in its first term.
    """
    low, high = lowest[stage], lowest[stage] + limit
    while low < high:
        middle = (low + high + 1) // 2
        tried = [*lowest[:stage], middle, *lowest[stage + 1 :]]
        low, high = (middle, high) if pipeline_ms(tried, chunks) < limit else (low, middle - 1)
    return low


def outcomes(cell: Cell, most: int) -> dict[tuple[int, int], Counts]:
    """Sums (C, S) with C <= most within capacity, one assignment each; of one C the least S.

    Assignments whose reduced costs add up to more than the gap between ``most`` and the linear
    relaxation are never built (see :mod:`.cells`).
    """
    if not cell.fits():
        return {}
    relaxed = relax(cell, (1, 0, 0))
    gap = relaxed.scale * most - relaxed.bound
    # (layers chosen, C, weight, reduced cost) -> (S, counts)
    labels: dict[tuple[int, int, int, int], tuple[int, Counts]] = {(0, 0, 0, 0): (0, ())}
    for option, reduced in zip(cell.options, relaxed.reduced, strict=True):
        extended: dict[tuple[int, int, int, int], tuple[int, Counts]] = {}
        for (size, c, w, cost), (s, counts) in labels.items():
            for n in range(cell.count - size + 1):
                if cost + n * reduced > gap:
                    break
                key = (size + n, c + n * option.c, w + n * option.w, cost + n * reduced)
                value = (s + n * option.s, (*counts, n))
                if key not in extended or value < extended[key]:
                    extended[key] = value
            if len(extended) > MANY_LABELS:
                raise TooManyLabels
        labels = extended
    best: dict[int, tuple[int, Counts]] = {}
    for (size, c, w, _), value in labels.items():
        if size == cell.count and w <= cell.capacity and c <= most:
            best[c] = min(best.get(c, value), value)
    return {(c, s): counts for c, (s, counts) in best.items()}
