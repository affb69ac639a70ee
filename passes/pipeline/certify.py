"""A second opinion: one family as a mixed-integer linear program, solved by HiGHS.

Shares nothing with the search but the problem and the closed form: every layer × stage × option is
a binary variable, stages are contiguous because a layer follows its predecessor or the next stage,
and switching is a transport problem between the layouts of neighbours. Meant for instances of some
dozens of layers, options and stages at most.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from galvatron_compile.passes.pipeline.closed_form import (
    Objective,
    chunk_flights,
    evaluate,
    even_boundaries,
    layer_ns,
)
from galvatron_compile.passes.pipeline.family import Solution
from galvatron_compile.passes.pipeline.problem import PipelineProblem
from galvatron_compile.passes.pipeline.tables import merged

TOLERANCE = 1e-6
"""HiGHS is exact up to this, relative to the step time and to the capacity."""


@dataclass(frozen=True)
class Certificate:
    """What the second formulation says about a plan.

    status: "proven" if no plan is faster by more than :data:`TOLERANCE`, "refuted" if one is that
        fits exactly, "time limit" if neither was settled in time, "unclear" where the program's
        own answer breaks a limit by less than its tolerance.
    plan_ns: the plan's time; bound_ns: below this there is none; gap: (plan - bound) / plan.
    found_ns: exact time of the best plan that the program found and that fits, None without one.
    """

    status: Literal["proven", "refuted", "time limit", "unclear"]
    plan_ns: int
    bound_ns: float
    gap: float
    found_ns: int | None
    seconds: float

    def __str__(self) -> str:
        return (
            f"{self.status}: plan {self.plan_ns / 1e6:.3f} ms, bound {self.bound_ns / 1e6:.3f} ms, "
            f"gap {100 * self.gap:.4f} %, {self.seconds:.1f} s"
        )


def certify(
    problem: PipelineProblem, solution: Solution, time_limit_s: float = 60.0
) -> Certificate:
    """Check the time of ``solution`` against an independent program of the same family."""
    start = time.monotonic()
    program = _Program(problem, max(1, solution.total_ns))
    bound, options, edges, finished = program.solve(time_limit_s)
    found = None
    if options is not None:
        price = evaluate(problem, edges, options)
        agrees = _ties_agree(problem, edges, options)
        fits = max(price.group_bytes) <= problem.capacity_bytes and agrees
        found = price.total_ns if fits else None
    plan = solution.total_ns
    status: Literal["proven", "refuted", "time limit", "unclear"]
    if found is not None and found < plan:
        status = "refuted"
    elif bound >= plan * (1 - TOLERANCE) - 1:
        status = "proven"
    else:
        status = "unclear" if finished else "time limit"
    gap = max(0.0, (plan - bound) / max(plan, 1))
    return Certificate(status, plan, bound, gap, found, time.monotonic() - start)


def _ties_agree(problem: PipelineProblem, edges: list[int], options: list[int]) -> bool:
    pp = problem.family.pp
    group = np.searchsorted(edges, np.arange(len(options)), side="right") - 1
    return all(
        options[i] == options[j] or group[i] % pp != group[j] % pp
        for tie in problem.tied
        for i in tie
        for j in tie
    )


class _Program:
    """Columns are [layer, stage, option] choices x, ends ``leaves`` and ``enters`` of stages of
    the same shape, flows per switching pair, and per group its time and peak; last the slowest.

    Times are in units of ``scale_ns`` and memory in units of the capacity.
    """

    def __init__(self, problem: PipelineProblem, scale_ns: int) -> None:
        self.problem, self.scale_ns = problem, scale_ns
        family, costs = problem.family, problem.costs
        self.num_layers, self.num_stages = len(problem.layers), family.num_stages
        self.shape = self.num_layers, self.num_stages, costs.num_options
        size = int(np.prod(self.shape))
        self.x = np.arange(size).reshape(self.shape)
        self.leaves, self.enters = self.x + size, self.x + 2 * size
        self.num_columns = 3 * size
        self.time = self.columns(family.pp)
        self.peak = self.columns(family.pp)
        self.slowest = int(self.columns(1)[0])
        self.rows: list[tuple[dict[int, float], float, float]] = []
        self.terms: list[dict[int, float]] = [{} for _ in range(family.pp)]
        self.upper = np.ones(self.num_columns)
        self.build()

    def columns(self, number: int) -> Any:
        self.num_columns += number
        return np.arange(self.num_columns - number, self.num_columns)

    def row(self, entries: dict[int, float], low: float, high: float) -> None:
        self.rows.append((entries, low, high))

    def build(self) -> None:
        self.forbid()
        self.stages()
        self.ends()
        self.switching()
        self.memory()
        self.ties()
        self.times()

    def forbid(self) -> None:
        allowed = self.problem.costs.allowed[list(self.problem.layers)]
        self.upper[self.x] = allowed[:, None, :]
        if self.problem.family.virtual > 1:
            edges = even_boundaries(self.num_layers, self.num_stages)
            for stage in range(self.num_stages):
                self.upper[self.x[: edges[stage], stage]] = 0
                self.upper[self.x[edges[stage + 1] :, stage]] = 0

    def stages(self) -> None:
        last = self.num_stages - 1
        for i in range(self.num_layers):
            self.row(dict.fromkeys(self.x[i].ravel().tolist(), 1.0), 1, 1)
            for stage in range(self.num_stages if i in self.problem.uncut else 0):
                entries = dict.fromkeys(self.x[i, stage].tolist(), 1.0)
                entries.update(dict.fromkeys(self.x[i - 1, stage].tolist(), -1.0))
                self.row(entries, 0, 0)
            for stage in range(self.num_stages if i else 0):
                entries = dict.fromkeys(self.x[i, stage].tolist(), 1.0)
                entries.update(dict.fromkeys(self.x[i - 1, stage].tolist(), -1.0))
                if stage:
                    entries.update(dict.fromkeys(self.x[i - 1, stage - 1].tolist(), -1.0))
                self.row(entries, -np.inf, 0)
        self.row(dict.fromkeys(self.x[0, 0].tolist(), 1.0), 1, 1)
        self.row(dict.fromkeys(self.x[-1, last].tolist(), 1.0), 1, 1)

    def ends(self) -> None:
        """A layer leaves its stage where the next layer enters the next stage, and only there."""
        m, costs = self.problem.family.num_micro_batches, self.problem.costs
        pp = self.problem.family.pp
        for i, kind in enumerate(self.problem.layers):
            for stage in range(self.num_stages):
                for option in range(self.shape[2]):
                    at = i, stage, option
                    x, out, into = int(self.x[at]), int(self.leaves[at]), int(self.enters[at])
                    self.row({out: 1, x: -1}, -np.inf, 0)
                    self.row({into: 1, x: -1}, -np.inf, 0)
                    terms = self.terms[stage % pp]
                    terms[out] = m * float(costs.forward_send_ns[kind, option])
                    terms[into] = m * float(costs.backward_send_ns[kind, option])
                if i + 1 < self.num_layers and stage + 1 < self.num_stages:
                    entries = dict.fromkeys(self.leaves[i, stage].tolist(), 1.0)
                    entries.update(dict.fromkeys(self.enters[i + 1, stage + 1].tolist(), -1.0))
                    self.row(entries, 0, 0)
        for stage in range(self.num_stages):
            inner = float(stage < self.num_stages - 1)
            self.row(dict.fromkeys(self.leaves[:, stage].ravel().tolist(), 1.0), inner, inner)
            inner = float(stage > 0)
            self.row(dict.fromkeys(self.enters[:, stage].ravel().tolist(), 1.0), inner, inner)
        self.upper[self.leaves[-1]] = 0
        self.upper[self.enters[0]] = 0

    def switching(self) -> None:
        """What does not leave flows to the next layer's layouts, at the cost of the switch."""
        costs, layers = self.problem.costs, self.problem.layers
        m, num = self.problem.family.num_micro_batches, costs.num_layouts
        for i in range(self.num_layers - 1):
            matrix = costs.switch_ns.get((layers[i], layers[i + 1]), np.zeros((num, num)))
            for stage in range(self.num_stages):
                flow = self.columns(num * num).reshape(num, num)
                self.upper = np.append(self.upper, np.ones(num * num))
                terms = self.terms[stage % self.problem.family.pp]
                for a in range(num):
                    options = np.flatnonzero(costs.layout == a)
                    before = dict.fromkeys(flow[a].tolist(), 1.0)
                    before.update(dict.fromkeys(self.x[i, stage, options].tolist(), -1.0))
                    before.update(dict.fromkeys(self.leaves[i, stage, options].tolist(), 1.0))
                    self.row(before, 0, 0)
                    after = dict.fromkeys(flow[:, a].tolist(), 1.0)
                    after.update(dict.fromkeys(self.x[i + 1, stage, options].tolist(), -1.0))
                    after.update(dict.fromkeys(self.enters[i + 1, stage, options].tolist(), 1.0))
                    self.row(after, 0, 0)
                    for b in range(num):
                        terms[int(flow[a, b])] = m * float(matrix[a, b])

    def memory(self) -> None:
        family, costs = self.problem.family, self.problem.costs
        unit = float(max(1, self.problem.capacity_bytes))
        for group in range(family.pp):
            flights = chunk_flights(family, group)
            entries = {int(self.peak[group]): 1.0}
            for i, kind in enumerate(self.problem.layers):
                held: dict[int, float] = {}
                for chunk, flight in enumerate(flights):
                    for option, x in enumerate(self.x[i, chunk * family.pp + group].tolist()):
                        size = costs.state_bytes[kind, option]
                        size = size + flight * costs.saved_bytes[kind, option]
                        entries[x] = float(size) / unit
                        held[x] = float(costs.transient_bytes[kind, option]) / unit
                self.row({**held, int(self.peak[group]): -1.0}, -np.inf, 0)
            self.row(entries, -np.inf, self.problem.capacity_bytes / unit)

    def ties(self) -> None:
        pp = self.problem.family.pp
        for tie in merged(self.problem.tied):
            for i in tie:
                for j in tie:
                    for group in range(pp if i != j else 0):
                        mine, other = self.x[i, group::pp], self.x[j, group::pp]
                        for option in range(self.shape[2]):
                            entries = dict.fromkeys(other.ravel().tolist(), 1.0)
                            for x in other[:, option].tolist():
                                entries[x] -= 1.0
                            entries.update(dict.fromkeys(mine[:, option].tolist(), 1.0))
                            self.row(entries, -np.inf, 1)

    def times(self) -> None:
        time_ns = layer_ns(self.problem)
        pp = self.problem.family.pp
        for i, kind in enumerate(self.problem.layers):
            for stage in range(self.num_stages):
                for option, x in enumerate(self.x[i, stage].tolist()):
                    self.terms[stage % pp][x] = float(time_ns[kind, option])
        for group, terms in enumerate(self.terms):
            entries = {column: value / self.scale_ns for column, value in terms.items() if value}
            self.row({**entries, int(self.time[group]): -1.0}, -np.inf, 0)
            self.row({int(self.time[group]): 1.0, self.slowest: -1.0}, -np.inf, 0)
        self.upper[self.time] = self.upper[self.peak] = np.inf
        self.upper[self.slowest] = np.inf

    def solve(self, time_limit_s: float) -> tuple[float, list[int] | None, list[int], bool]:
        """(bound in ns, options, edges, whether HiGHS finished). No options without an answer."""
        from scipy.optimize import Bounds, LinearConstraint, milp
        from scipy.sparse import csr_matrix

        objective = Objective.of(self.problem.family)
        weights = np.zeros(self.num_columns)
        weights[self.time] = objective.sum_weight / objective.denominator
        weights[self.slowest] = objective.max_weight / objective.denominator
        columns = [column for entries, _, _ in self.rows for column in entries]
        values = [value for entries, _, _ in self.rows for value in entries.values()]
        starts = np.cumsum([0, *(len(entries) for entries, _, _ in self.rows)])
        matrix = csr_matrix((values, columns, starts), shape=(len(self.rows), self.num_columns))
        low, high = [r[1] for r in self.rows], [r[2] for r in self.rows]
        integral = np.zeros(self.num_columns)
        integral[self.x] = 1
        result = milp(
            weights,
            integrality=integral,
            bounds=Bounds(np.zeros(self.num_columns), self.upper),
            constraints=LinearConstraint(matrix, low, high),
            options={"time_limit": time_limit_s, "mip_rel_gap": TOLERANCE / 4},
        )
        if result.status == 2:  # not even the plan fits, by less than the tolerance
            return 0.0, None, [], True
        bound = result.mip_dual_bound
        bound = 0.0 if bound is None else float(bound) * self.scale_ns
        if result.x is None:
            return bound, None, [], False
        chosen = result.x[self.x].reshape(self.num_layers, -1).argmax(axis=1)
        stage, option = np.divmod(chosen, self.shape[2])
        edges = [0, *(int((stage <= s).sum()) for s in range(self.num_stages))]
        return bound, option.tolist(), edges, result.status == 0
