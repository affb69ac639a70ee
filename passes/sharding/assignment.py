"""assign: LayerClass, tp → ShardedLayer. Which rule every node runs with, solved exactly.

A mixed integer program with one binary per (node, rule). The placements that a value is made with
and taken with are sums of those binaries; on each edge they are the two margins of a transport
plan ``y[s, t] >= 0``, whose off-diagonal entries are conversions. All consumers of a value share a
conversion through ``u[s, t] >= y[s, t]``, and only ``u`` (and the rules) cost. For integral
binaries the plan is integral by itself; written this way the relaxation is tight enough that a
decoder layer is solved at the root (the ``x + z - 1 <= u`` form was a hundred times slower).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import coo_array
from torch import fx

from galvatron_compile.errors import UnsupportedError
from galvatron_compile.graph import LayerClass
from galvatron_compile.passes.sharding.prices import linear_bytes, output_values
from galvatron_compile.passes.sharding.problem import (
    Problem,
    Value,
    build_problem,
    legal_conversion,
    placeholders_of,
)
from galvatron_compile.passes.sharding.rules import Rule
from galvatron_compile.passes.sharding.rules_base import is_differentiable
from galvatron_compile.passes.sharding.sharded_layer import Collective, ShardedLayer
from galvatron_compile.placement import Placement, R

Tie = frozenset[tuple[int, int]]  # (which problem, index among its parameters): one parameter
Picks = Mapping[fx.Node, list[int]]  # the columns of a node's rules
Solution = tuple[dict[fx.Node, Rule], float]  # a rule for every node, the price of all


def shard_layer(
    layer_class: LayerClass,
    tp: int,
    sequence_parallel: bool,
    fixed: Mapping[int, Placement] | None = None,
) -> ShardedLayer:
    """The cheapest placement of a layer class on an axis of ``tp`` ranks.

    fixed: placements of some parameters, by their index among the parameters (tied weights).
    Raises UnsupportedError or ShapeError, saying why, where the class has no such form: nothing to
    shard along the sequence, a sequence that does not divide, a fixed placement no operator takes.
    The same on every rank and every run.
    """
    return shard_problems([build_problem(layer_class, tp, sequence_parallel, fixed or {})], ())[0]


def shard_problems(problems: Sequence[Problem], ties: Collection[Tie]) -> list[ShardedLayer]:
    """The cheapest placements of several classes, parameters that are tied lying alike."""
    solutions = solve_together(problems, ties)
    return [
        _answer(problem, chosen, objective)
        for problem, (chosen, objective) in zip(problems, solutions, strict=True)
    ]


class _Program:
    """Rows and columns of the MILP, filled by name-free indices."""

    def __init__(self) -> None:
        self.cost: list[float] = []
        self.integral: list[int] = []
        self.rows: list[tuple[list[int], list[float], float, float]] = []

    def column(self, cost: float = 0.0, integral: bool = False) -> int:
        self.cost.append(cost)
        self.integral.append(int(integral))
        return len(self.cost) - 1

    def row(self, plus: list[int], minus: list[int], low: float, high: float) -> None:
        self.rows.append((plus + minus, [1.0] * len(plus) + [-1.0] * len(minus), low, high))

    def solve(self) -> np.ndarray | None:
        columns = [column for row in self.rows for column in row[0]]
        numbers = [i for i, row in enumerate(self.rows) for _ in row[0]]
        entries = [entry for row in self.rows for entry in row[1]]
        matrix = coo_array(
            (entries, (numbers, columns)), shape=(len(self.rows), len(self.cost))
        ).tocsr()
        limits = np.array([row[2:] for row in self.rows], dtype=float)
        result = milp(
            np.array(self.cost),
            integrality=np.array(self.integral),
            bounds=Bounds(0, 1),
            constraints=LinearConstraint(matrix, limits[:, 0], limits[:, 1]),
            options={"mip_rel_gap": 0.0},
        )
        solution: np.ndarray | None = result.x
        return solution


def solve(problem: Problem) -> Solution:
    """The optimum: a rule for every node and the total price. Raises UnsupportedError if none."""
    return solve_together([problem], ())[0]


def solve_together(problems: Sequence[Problem], ties: Collection[Tie]) -> list[Solution]:
    """One program for all problems, joined only by the placements of tied parameters."""
    program = _Program()
    columns: list[range] = []
    picks: list[Picks] = []
    for problem in problems:
        start = len(program.cost)
        picks.append(_add_problem(program, problem))
        columns.append(range(start, len(program.cost)))
    for tie in ties:
        first, *rest = [
            (problems[at], picks[at], problems[at].parameters[i]) for at, i in sorted(tie)
        ]
        for other in rest:
            _add_tie(program, first, other)
    solved = program.solve()
    if solved is None:
        names = ", ".join(problem.layer_class.name for problem in problems)
        raise UnsupportedError(
            f"layer class {names} has no sharding over {problems[0].size} ranks "
            "with these fixed placements"
        )
    return [
        (
            {n: problem.rules[n][int(np.argmax(solved[ids]))] for n, ids in own.items()},
            float(np.dot(solved[span], np.array(program.cost)[span])),
        )
        for problem, own, span in zip(problems, picks, columns, strict=True)
    ]


def _add_problem(program: _Program, problem: Problem) -> Picks:
    picks = {
        node: [program.column(problem.price(node, i), True) for i in range(len(rules))]
        for node, rules in problem.rules.items()
    }
    for columns in picks.values():
        program.row(columns, [], 1.0, 1.0)
    consumers: dict[Value, dict[tuple[fx.Node, int], None]] = {}
    for node, values in problem.uses.items():
        for place, value in enumerate(values):
            consumers.setdefault(value, {})[node, place] = None
    for value, edges in consumers.items():
        _add_value(program, problem, picks, value, list(edges))
    return picks


def _add_tie(
    program: _Program, a: tuple[Problem, Picks, fx.Node], b: tuple[Problem, Picks, fx.Node]
) -> None:
    """Two parameters are placed alike; what only one of them can be, neither is."""
    left, right = (
        _by_placement(problem.rules[node], picks[node], lambda rule: rule.outputs[0])
        for problem, picks, node in (a, b)
    )
    for placement in left | right:
        program.row(left.get(placement, []), right.get(placement, []), 0.0, 0.0)


def _by_placement(
    rules: tuple[Rule, ...], columns: list[int], of: Callable[[Rule], Placement]
) -> dict[Placement, list[int]]:
    found: dict[Placement, list[int]] = {}
    for rule, column in zip(rules, columns, strict=True):
        found.setdefault(of(rule), []).append(column)
    return found


def _add_value(
    program: _Program,
    problem: Problem,
    picks: Mapping[fx.Node, list[int]],
    value: Value,
    edges: list[tuple[fx.Node, int]],
) -> None:
    """Transport plans of all edges from one value, and the conversions they share."""
    node, index = value
    made = _by_placement(problem.rules[node], picks[node], lambda rule: rule.outputs[index])
    shared: dict[tuple[Placement, Placement], int | None] = {}
    for consumer, place in edges:
        taken = _by_placement(
            problem.rules[consumer],
            picks[consumer],
            lambda rule, place=place: rule.inputs[place],  # type: ignore[misc]
        )
        leaving: dict[Placement, list[int]] = {source: [] for source in made}
        arriving: dict[Placement, list[int]] = {target: [] for target in taken}
        for source in made:
            for target in taken:
                if source == target:
                    column = program.column()
                else:
                    if (source, target) not in shared:
                        price = problem.conversion_price(value, source, target)
                        shared[source, target] = None if price is None else program.column(price)
                    conversion_column = shared[source, target]
                    if conversion_column is None:
                        continue
                    column = conversion_column
                    if len(edges) > 1:
                        column = program.column()
                        program.row([conversion_column], [column], 0.0, np.inf)
                leaving[source].append(column)
                arriving[target].append(column)
        for source, columns in leaving.items():
            program.row(columns, made[source], 0.0, 0.0)
        for target, columns in arriving.items():
            program.row(columns, taken[target], 0.0, 0.0)


# ---------------------------------------------------------------- the answer


def _answer(
    problem: Problem,
    chosen: Mapping[fx.Node, Rule],
    objective: float,
) -> ShardedLayer:
    layer_class = problem.layer_class
    placements = {node.name: rule.outputs for node, rule in chosen.items() if rule.outputs}
    return ShardedLayer(
        layer_class=layer_class,
        tp=problem.size,
        sequence_parallel=problem.sequence_parallel,
        inputs=tuple(
            placements.get(node.name, (R,))[0]
            for node in placeholders_of(layer_class, "activation")
        ),
        outputs=_outputs(problem, chosen),
        parameters=tuple(placements[node.name][0] for node in problem.parameters),
        collectives=_collectives(problem, chosen),
        remarks=_remarks(problem, chosen),
        rules={node.name: rule for node, rule in chosen.items() if node.op == "call_function"},
        placements=placements,
        objective=objective,
    )


def _outputs(problem: Problem, chosen: Mapping[fx.Node, Rule]) -> tuple[Placement, ...]:
    """One placement per output; what is not a tensor is R."""
    output = problem.layer_class.graph.graph.output_node()
    taken = iter(chosen[output].inputs)
    tensors = set(problem.results)
    return tuple(
        next(taken) if isinstance(entry, fx.Node) and entry in tensors else R
        for entry in output.args[0]  # type: ignore[union-attr]
    )


def conversions_of(
    problem: Problem, chosen: Mapping[fx.Node, Rule]
) -> dict[tuple[Value, Placement], Placement]:
    """(value, target) → source of every conversion that the choice needs, each once."""
    found: dict[tuple[Value, Placement], Placement] = {}
    for node, values in problem.uses.items():
        for (source, index), target in zip(values, chosen[node].inputs, strict=True):
            made = chosen[source].outputs[index]
            if made != target:
                found[(source, index), target] = made
    return found


def total_price(problem: Problem, chosen: Mapping[fx.Node, Rule]) -> float | None:
    """What a choice costs, None if it needs a conversion that is not allowed."""
    total = 0.0
    for node, rule in chosen.items():
        total += problem.price(node, problem.rules[node].index(rule))
    for (value, target), source in conversions_of(problem, chosen).items():
        price = problem.conversion_price(value, source, target)
        if price is None:
            return None
        total += price
    return total


def _collectives(problem: Problem, chosen: Mapping[fx.Node, Rule]) -> tuple[Collective, ...]:
    order = {node: i for i, node in enumerate(problem.layer_class.graph.graph.nodes)}
    found = []
    for (value, target), source in conversions_of(problem, chosen).items():
        node, index = value
        step = legal_conversion(source, target)
        assert step is not None
        sides = [("forward", step.forward)]
        if is_differentiable(node):
            sides.append(("backward", step.backward))
        per_sample, constant = linear_bytes(output_values(node)[index])
        for direction, kind in sides:
            if kind not in ("none", "local"):
                share = 1 / problem.size if kind == "all_to_all" else 1.0
                item = Collective(
                    kind, direction, per_sample * share, constant * share, node.name  # type: ignore[arg-type]
                )
                found.append((order[node], item))
    return tuple(item for _, item in sorted(found, key=lambda pair: pair[0]))


def _remarks(problem: Problem, chosen: Mapping[fx.Node, Rule]) -> tuple[str, ...]:
    if problem.size == 1:
        return ()
    name, degree = problem.layer_class.name, f"tp{problem.size}"
    repeated = [
        node.name
        for node in problem.prices.flops
        if not any(place.is_shard for place in (*chosen[node].inputs, *chosen[node].outputs))
    ]
    remarks = []
    if problem.prices.flops and len(repeated) == len(problem.prices.flops):
        remarks.append(f"{name}: {degree} splits no product; every rank repeats the same work")
    elif repeated:
        remarks.append(f"{name}: {degree} repeats {', '.join(repeated)} on every rank")
    for node in chosen:
        if node.op == "call_function" and _gathers_for_lack_of_rules(problem, chosen, node):
            remarks.append(f"{name}: {node.target} ({node.name}) runs on gathered inputs")
    return tuple(remarks)


def _gathers_for_lack_of_rules(
    problem: Problem, chosen: Mapping[fx.Node, Rule], node: fx.Node
) -> bool:
    if any(place.is_shard for rule in problem.rules[node] for place in rule.inputs):
        return False
    return any(
        chosen[source].outputs[index].is_shard and is_differentiable(source)
        for source, index in problem.uses[node]
    )
