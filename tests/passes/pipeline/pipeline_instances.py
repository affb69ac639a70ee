"""Random pipeline problems, small ones with the answer of trying everything."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations, product

import numpy as np

from galvatron_compile.passes.pipeline.closed_form import evaluate, even_boundaries
from galvatron_compile.passes.pipeline.problem import Family, Ints, PipelineProblem, StageCosts
from galvatron_compile.schedules import why_not
from galvatron_compile.strategy import Strategy

SCHEDULES = (("gpipe", 1), ("1f1b", 1), ("interleaved", 2), ("zero-bubble", 1))


@dataclass(frozen=True)
class Truth:
    """total_ns: of the best plan that fits, None if none does; smallest_bytes: the least capacity
    of any plan, None if there is no plan at all."""

    total_ns: int | None
    smallest_bytes: int | None


def all_plans(problem: PipelineProblem) -> Truth:
    """Every partition and every assignment, priced by the closed form."""
    layers, family = problem.layers, problem.family
    num_layers, num_stages = len(layers), family.num_stages
    partitions = [
        (0, *inner, num_layers) for inner in combinations(range(1, num_layers), num_stages - 1)
    ]
    if family.virtual > 1:
        partitions = [even_boundaries(num_layers, num_stages)]
    partitions = [edges for edges in partitions if problem.uncut.isdisjoint(edges)]
    menus = [np.flatnonzero(problem.costs.allowed[kind]).tolist() for kind in layers]
    best: int | None = None
    smallest: int | None = None
    for edges in partitions:
        stages = np.searchsorted(edges, np.arange(num_layers), side="right") - 1
        group = (stages % family.pp).tolist()
        must = [
            (i, j) for tie in problem.tied for i, j in combinations(tie, 2) if group[i] == group[j]
        ]
        for options in product(*menus):
            if any(options[i] != options[j] for i, j in must):
                continue
            price = evaluate(problem, edges, options)
            needed = max(price.group_bytes)
            smallest = needed if smallest is None else min(smallest, needed)
            if needed <= problem.capacity_bytes:
                best = price.total_ns if best is None else min(best, price.total_ns)
    return Truth(best, smallest)


def random_costs(rng: np.random.Generator, num_classes: int, size: int) -> StageCosts:
    """Few options, numbers from 0 to ``size``: small sizes make ties, large ones tell apart.

    Switching is any matrix: often cheaper by a way round, sometimes free, sometimes one-sided.
    """
    num_options, num_layouts = int(rng.integers(1, 5)), int(rng.integers(1, 5))

    def numbers(most: int) -> Ints:
        return rng.integers(0, most + 1, (num_classes, num_options)).astype(np.int64)

    allowed = rng.random((num_classes, num_options)) > 0.15
    for row in allowed:
        row[rng.integers(num_options)] |= rng.random() > 0.1 or not row.any()
    layout = rng.integers(0, num_layouts, num_options).astype(np.int64)
    used = int(layout.max()) + 1
    switches = {}
    for pair in product(range(num_classes), repeat=2):
        if rng.random() > 0.3:
            matrix = rng.integers(0, size // 2 + 1, (used, used)).astype(np.int64)
            np.fill_diagonal(matrix, 0)
            switches[pair] = matrix
    return StageCosts(
        strategies=tuple(Strategy(dp=1 + i) for i in range(num_options)),
        allowed=allowed,
        micro_ns=numbers(size),
        step_ns=numbers(size),
        state_bytes=numbers(size),
        saved_bytes=numbers(size),
        transient_bytes=numbers(size if rng.random() < 0.6 else 2),
        forward_send_ns=numbers(size // 3),
        backward_send_ns=numbers(size // 3),
        layout=layout,
        switch_ns=switches,
    )


def small_problem(seed: int) -> PipelineProblem:
    """Up to 6 layers; every schedule, ties, alternating classes, tight and loose memory."""
    rng = np.random.default_rng(seed)
    family = None
    while family is None:
        schedule, virtual = SCHEDULES[rng.integers(len(SCHEDULES))]
        pp = int(rng.choice([1, 2, 2, 3, 4]))
        m = pp * int(rng.integers(1, 3)) if virtual > 1 else int(rng.integers(1, 7))
        if pp * virtual <= 6 and why_not(schedule, pp, m, virtual) is None:
            family = Family(pp, m, schedule, virtual)
    num_layers = int(rng.integers(family.num_stages, 7))
    num_classes, size = int(rng.integers(1, 4)), int(rng.choice([2, 6, 50, 1000]))
    costs = random_costs(rng, num_classes, size)
    style = rng.integers(3)
    if style == 0:
        layers = rng.integers(0, num_classes, num_layers)
    elif style == 1:
        layers = np.arange(num_layers) % min(2, num_classes)
    else:
        layers = np.full(num_layers, min(1, num_classes - 1))
        layers[0], layers[-1] = 0, num_classes - 1
    tied: tuple[tuple[int, ...], ...] = ()
    if num_layers >= 2 and rng.random() < 0.4:
        number = int(rng.integers(2, min(num_layers, 3) + 1))
        chosen = rng.choice(num_layers, size=number, replace=False)
        tied = (tuple(sorted(int(layer) for layer in chosen)),)
    usual = num_layers * size * (1 + family.num_micro_batches) / 2 / family.pp
    capacity = int(rng.uniform(0.2, 2.5) * usual)
    uncut: frozenset[int] = frozenset()
    if num_layers >= 3 and rng.random() < 0.25:
        uncut = frozenset(rng.integers(1, num_layers, size=int(rng.integers(1, 3))).tolist())
    return PipelineProblem(family, tuple(layers.tolist()), costs, tied, capacity, uncut)


def medium_problem(
    seed: int, family: Family, style: str, capacity_share: float, layers: int = 16
) -> PipelineProblem:
    """8 options in 2 layouts: too many plans to try; with 16 layers few enough for a MILP.

    capacity_share: of what a stage of average options holds.
    """
    rng = np.random.default_rng(seed)
    shape = 3, 8

    def numbers(low: int, high: int) -> Ints:
        return rng.integers(low, high, shape).astype(np.int64)

    memory = numbers(5 * 10**8, 4 * 10**9)
    time = 2e17 / memory.astype(np.float64) ** 0.9 * rng.uniform(0.8, 1.2, shape)
    time_ns = time.astype(np.int64)
    layout = rng.permutation(np.arange(8) % 2).astype(np.int64)
    switches = {}
    for pair in product(range(3), repeat=2):
        matrix = rng.integers(0, int(time_ns.mean() * 0.3), (2, 2)).astype(np.int64)
        np.fill_diagonal(matrix, 0)
        switches[pair] = matrix
    costs = StageCosts(
        strategies=tuple(Strategy(dp=1 + i) for i in range(8)),
        allowed=rng.random(shape) > 0.1,
        micro_ns=time_ns,
        step_ns=time_ns // 3,
        state_bytes=memory,
        saved_bytes=memory // 6,
        transient_bytes=numbers(0, 2 * 10**9),
        forward_send_ns=time_ns // 20,
        backward_send_ns=time_ns // 20,
        layout=layout,
        switch_ns=switches,
    )
    classes = {
        "dense": (0, *[1] * (layers - 2), 2),
        "alternating": tuple(i % 2 for i in range(layers)),
    }[style]
    capacity = int(2.2e9 * layers / family.pp * capacity_share)
    return PipelineProblem(family, classes, costs, ((0, layers - 1),), capacity)
