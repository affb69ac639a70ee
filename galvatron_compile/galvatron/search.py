"""The exact optimum of Galvatron's space under Galvatron's own formulas, with the proof.

For one pipeline degree and number of micro-batches the step is r + max(0, max_i(S_i - ΣC_≤i)) (see
:mod:`.pricing`), where r rises with every C_i. So

- replacing every C_i by a lower bound (a linear relaxation) bounds a family of plans from below,
  and families are settled in order of that bound until it reaches the best plan found;
- where no stage but the first can have gradients left to synchronise, the step rises with C_i of
  the other stages too: each takes its least C_i, and the first stage minimises what is left, a
  maximum of linear functions of (C_0, S_0). Both are exact cells (:mod:`.cells`);
- where that cannot be shown, all outcomes (C_i, S_i) of every stage that may beat the best plan
  are enumerated.

Times are whole picoseconds and memory whole units, so nothing is lost to rounding in between.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise

from galvatron_compile.galvatron.cells import Answer, Cell, Function, Option, bound, solve
from galvatron_compile.galvatron.formulas import Workload
from galvatron_compile.galvatron.plans import layer_classes, layer_names
from galvatron_compile.galvatron.pricing import MemoryLimit, exposed_ms, pipeline_ms
from galvatron_compile.galvatron.space import Family, Space, spaces
from galvatron_compile.plan import Plan, Stage


@dataclass(frozen=True)
class Found:
    """A plan and its step."""

    plan: Plan
    step_ps: int


@dataclass(frozen=True)
class Outcome:
    """The best plan of one space. bound_ps: no plan of it is faster; None if none fits.

    least_units: the least memory of the fullest stage that any plan of the space needs.
    """

    space: Space
    found: Found | None
    bound_ps: int | None
    least_units: int


def search(work: Workload, limit: MemoryLimit) -> list[Outcome]:
    """The best plan of every pipeline degree and number of micro-batches, best first.

    Spaces that hold no plan within the limit come last, those that need least first.
    """
    outcomes = [best_of(work, space, limit.plan_units) for space in spaces(work, limit)]
    return sorted(outcomes, key=_rank)


def _rank(outcome: Outcome) -> tuple[int, int]:
    found = outcome.found
    return (0, found.step_ps) if found else (1, outcome.least_units)


def best_of(work: Workload, space: Space, capacity: int) -> Outcome:
    """The best plan of one space, settled family by family in order of their bounds."""
    settled = [_Settled(space, family, capacity) for family in space.families]
    least = min((problem.least_units() for problem in settled), default=0)
    bounded = [(problem.bound_ps(), i) for i, problem in enumerate(settled) if problem.fits()]
    bounded.sort()
    best: tuple[int, list[tuple[int, ...]], Family] | None = None
    for lowest, index in bounded:
        if best is not None and lowest >= best[0]:
            break
        found = settled[index].solve(None if best is None else best[0])
        if found is not None:
            best = (*found, settled[index].family)
    if best is None:
        return Outcome(space, None, None, least)
    plan = _plan(work, space, best[2], best[1])
    return Outcome(space, Found(plan, best[0]), bounded[0][0], least)


def uniform(work: Workload, space: Space, capacity: int) -> Found | None:
    """The best plan of one strategy for all layers, embedding and head with it; None if none fits.

    What Galvatron calls its coarse-grained mode.
    """
    best: tuple[int, Family, list[tuple[int, ...]]] | None = None
    by_strategy = {ends.strategy: ends for ends in space.ends}
    buffers = dict(space.buffers)
    for index, strategy in enumerate(space.strategies):
        ends = by_strategy.get(replace(strategy, recompute="none"))
        if ends is None:
            continue
        units = buffers[strategy.tp] if strategy.tp > 1 else 0
        family = Family(ends, None, (index,), units)
        problem = _Settled(space, family, capacity)
        if not problem.fits():
            continue
        c, s = space.unsynchronised_ps[index], space.synchronised_ps[index]
        both = list(zip(space.lengths, ends.time_ps, strict=True))
        stages = [length * c + end for length, end in both]
        exposed = exposed_ms(stages, [length * s for length in space.lengths])
        step = int(pipeline_ms(stages, space.chunks) + exposed)
        if best is None or step < best[0]:
            best = step, family, [(length,) for length in space.lengths]
    return Found(_plan(work, space, best[1], best[2]), best[0]) if best else None


class _Settled:
    """One family of a space as one cell a stage."""

    def __init__(self, space: Space, family: Family, capacity: int) -> None:
        self.space, self.family = space, family
        self.ends_ps = family.ends.time_ps
        self.chunks = space.chunks
        self.cells = []
        self.spent = []
        for length, units, ends in zip(space.lengths, space.units, family.ends.units, strict=True):
            options = tuple(
                Option(space.unsynchronised_ps[i], space.synchronised_ps[i], units[i])
                for i in family.allowed
            )
            spent = ends + family.buffer_units
            self.cells.append(Cell(options, length, capacity - spent))
            self.spent.append(spent)

    def fits(self) -> bool:
        return all(cell.fits() for cell in self.cells)

    def least_units(self) -> int:
        both = zip(self.cells, self.spent, strict=True)
        return max(cell.least_weight() + spent for cell, spent in both)

    def bound_ps(self) -> int:
        lowest = [
            ends + bound(cell, [(1, 0, 0)])
            for cell, ends in zip(self.cells, self.ends_ps, strict=True)
        ]
        return int(pipeline_ms(lowest, self.chunks))

    def solve(self, limit: int | None) -> tuple[int, list[tuple[int, ...]]] | None:
        """Step and layers by strategy of every stage; None if no plan is below ``limit``."""
        if not self.only_first_exposes():
            return self._enumerate(limit)
        rest = []
        for cell in self.cells[1:]:
            answer = solve(cell, [(1, 0, 0)])
            assert answer is not None
            rest.append(answer)
        first = solve(self.cells[0], self._functions(rest), limit)
        if first is None:
            return None
        return first.value, [first.counts, *(answer.counts for answer in rest)]

    def only_first_exposes(self) -> bool:
        """Whether S_i - ΣC_≤i <= 0 for every stage but the first, whatever the layers choose."""
        options = self.cells[0].options
        quickest = min(option.c for option in options)
        most = max(option.s - option.c for option in options)
        before = 0
        for i, cell in enumerate(self.cells):
            if i and cell.count * most - self.ends_ps[i] > before:
                return False
            before += self.ends_ps[i] + cell.count * quickest
        return True

    def _functions(self, rest: Sequence[Answer]) -> list[Function]:
        """The step as a maximum of functions of the first stage's sums of layers."""
        pp, chunks, own = len(self.cells), self.chunks, self.ends_ps[0]
        others = [a.c + ends for a, ends in zip(rest, self.ends_ps[1:], strict=True)]
        if pp == 1:
            pipeline = [(chunks, 0, chunks * own)]
        else:
            drained = chunks + 1 - pp
            pipeline = [
                (1, 0, own + sum(others) + (chunks - 1) * others[-1]),
                (pp - 1 + drained, 0, (pp - 1 + drained) * own),
                (drained, 0, drained * own + sum(others)),
            ]
        # … and with S_0 - C_0 on top.
        return [*pipeline, *((a - 1, 1, g - own) for a, _, g in pipeline)]

    def _enumerate(self, limit: int | None) -> tuple[int, list[tuple[int, ...]]] | None:
        """Every outcome of every stage that the pipeline alone does not rule out."""
        lowest = [
            ends + cell.count * min(option.c for option in cell.options)
            for cell, ends in zip(self.cells, self.ends_ps, strict=True)
        ]
        stages = [list(_outcomes(cell).items()) for cell in self.cells]
        best: tuple[int, list[tuple[int, ...]]] | None = None

        def descend(chosen: list[tuple[int, int]], counts: list[tuple[int, ...]]) -> None:
            nonlocal best
            most = best[0] if best is not None else limit
            c = [value for value, _ in chosen] + lowest[len(chosen) :]
            if most is not None and pipeline_ms(c, self.chunks) >= most:
                return
            if len(chosen) == len(stages):
                s = [value for _, value in chosen]
                total = int(pipeline_ms(c, self.chunks) + exposed_ms(c, s))
                if most is None or total < most:
                    best = total, counts
                return
            ends = self.ends_ps[len(chosen)]
            for (layers_c, layers_s), numbers in stages[len(chosen)]:
                descend([*chosen, (layers_c + ends, layers_s)], [*counts, numbers])

        descend([], [])
        return best


def _outcomes(cell: Cell) -> dict[tuple[int, int], tuple[int, ...]]:
    """All sums (C, S) within capacity, each with one assignment that has them."""
    found: dict[tuple[int, int], tuple[int, ...]] = {}

    def assignments(index: int, left: int) -> Iterator[tuple[int, ...]]:
        if index == len(cell.options) - 1:
            yield (left,)
            return
        for n in range(left + 1):
            for rest in assignments(index + 1, left - n):
                yield (n, *rest)

    for counts in assignments(0, cell.count):
        pairs = list(zip(counts, cell.options, strict=True))
        if sum(n * option.w for n, option in pairs) <= cell.capacity:
            c, s = (sum(n * getattr(option, name) for n, option in pairs) for name in ("c", "s"))
            found.setdefault((c, s), counts)
    return found


def _plan(work: Workload, space: Space, family: Family, counts: Sequence[tuple[int, ...]]) -> Plan:
    """Layers of a stage in the order of the space's strategies; their order costs nothing."""
    layers = [
        space.strategies[index]
        for stage in counts
        for index, number in zip(family.allowed, stage, strict=True)
        for _ in range(number)
    ]
    edges = [0, *(edge + 1 for edge in accumulate(space.lengths))]
    edges[-1] += 1
    stages = tuple(Stage(first, last) for first, last in pairwise(edges))
    return Plan(
        model="",
        world_size=work.num_gpus,
        global_batch_size=work.global_batch_size,
        num_micro_batches=space.chunks,
        layers=layer_names(work.num_layers),
        strategies=(family.ends.strategy, *layers, family.ends.strategy),
        stages=stages if space.pp > 1 else (),
        classes=layer_classes(work.num_layers),
    )
