"""Plans of several stages for compile(): searched, priced and simulated on timed layers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import pairwise

from galvatron_compile import work_json
from galvatron_compile.cluster import ClusterProfile
from galvatron_compile.constraints import Constraints
from galvatron_compile.graph import LayeredGraph
from galvatron_compile.layer_timing import LayerTiming, TimingKey
from galvatron_compile.passes.layer_costs import LayerCosts, Workload
from galvatron_compile.passes.layer_estimate import Tallies
from galvatron_compile.passes.order import order
from galvatron_compile.passes.pipeline.family import Solution
from galvatron_compile.passes.pipeline.problem import Family, PipelineProblem
from galvatron_compile.passes.pipeline.searcher import search
from galvatron_compile.passes.pipelines import Space, families
from galvatron_compile.passes.plan_prices import Pricer, family_of
from galvatron_compile.passes.reshard_cost import Switches
from galvatron_compile.passes.sharding.table import ShardingTable
from galvatron_compile.passes.stage_costs import stage_costs
from galvatron_compile.passes.stage_work import stage_work
from galvatron_compile.passes.strategies import Limits, enumerate_within
from galvatron_compile.plans import Plan, Stage
from galvatron_compile.precision import Precision
from galvatron_compile.simulator import simulate
from galvatron_compile.strategy import Strategy
from galvatron_compile.work import Cores

SIMULATED = 8
"""Families whose optima are simulated: the closed form is off by a few per cent where stages are
uneven or a synchronisation is long, so the best may be a few places down."""


def stage_strategies(world_size: int, global_batch_size: int) -> tuple[Strategy, ...]:
    """One strategy of every form and data degree that a stage on fewer ranks may use."""
    found = [
        strategy
        for ranks in range(1, world_size)
        if world_size % ranks == 0
        for strategy in enumerate_within(
            Limits(ranks, global_batch_size, max_tp=ranks, zero_stages=(0,), recompute=("none",))
        )
    ]
    return tuple(dict.fromkeys(found))


@dataclass(frozen=True)
class Staged:
    """What pipelines of one model would cost on the ranks of this job.

    pricer: knows the layers' costs. fingerprint: of the model, for the plans. cores: of every
    rank, those it shares with others; empty where every rank has a device of its own.
    """

    pricer: Pricer
    layered: LayeredGraph
    world_size: int
    global_batch_size: int
    fingerprint: str
    cores: tuple[Cores, ...] = ()

    @staticmethod
    def of(
        layered: LayeredGraph,
        shardings: ShardingTable,
        cluster: ClusterProfile,
        workload: Workload,
        timings: Mapping[TimingKey, LayerTiming],
        tallies: Tallies,
        *,
        memory_bytes: int,
        fingerprint: str,
        cores: tuple[Cores, ...] = (),
    ) -> Staged:
        costs = LayerCosts.of(layered, shardings, cluster, workload, timings)
        costs.estimator.tallies.update(tallies)
        pricer = Pricer(costs, Switches(layered, shardings, cluster), memory_bytes)
        batch = workload.global_batch_size
        size = workload.world_size
        return Staged(pricer, layered, size, batch, fingerprint, cores)

    @property
    def precision(self) -> Precision:
        return self.pricer.costs.workload.precision

    def best(self, top: int = SIMULATED) -> list[Plan]:
        """The optima of the ``top`` best families of at least two stages, priced and simulated."""
        problems = self._problems()
        if not problems:
            return []
        plans = [self._plan(solution) for solution in search(problems, top).solved[:top]]
        return [self.priced(plan) for plan in plans if self._trains_everywhere(plan)]

    def _trains_everywhere(self, plan: Plan) -> bool:
        """Every group has a parameter to train; an optimizer over none cannot be made."""
        parameters, layers = self.layered.graph.parameters, self.layered.layers
        return all(
            any(
                parameters[name].requires_grad
                for index in plan.group_layers(group)
                for name in layers[index].parameters
            )
            for group in range(plan.pp)
        )

    def _problems(self) -> list[PipelineProblem]:
        space = Space(len(self.layered.layers), self.world_size, self.global_batch_size)
        if self.world_size == 1 or not self.layered.graph.splits_batch:
            return []  # one micro-batch fills no pipeline
        found = [self._problem(f) for f in families(space, Constraints()) if f.pp > 1]
        return [problem for problem in found if problem is not None]

    def _problem(self, family: Family) -> PipelineProblem | None:
        ranks, count = self.world_size // family.pp, family.num_micro_batches
        limits = Limits(
            ranks, self.global_batch_size, count, max_tp=ranks, recompute=("none", "full")
        )
        strategies = enumerate_within(limits)
        if family.schedule == "zero-bubble":  # full recompute would have to run for both halves
            strategies = tuple(s for s in strategies if s.recompute == "none")
        if not strategies:
            return None
        costs = self.pricer.costs_for(family, ranks, self.global_batch_size)
        return PipelineProblem(
            family,
            tuple(layer.class_index for layer in self.layered.layers),
            stage_costs(costs, self.pricer.switches, strategies, count),
            self.pricer.costs.shardings.tied,
            self.pricer.capacity_bytes,
        )

    def _plan(self, solution: Solution) -> Plan:
        problem, family = solution.problem, solution.problem.family
        strategies = problem.costs.strategies
        return Plan(
            model=self.fingerprint,
            world_size=self.world_size,
            global_batch_size=self.global_batch_size,
            num_micro_batches=family.num_micro_batches,
            layers=tuple(layer.name for layer in self.layered.layers),
            strategies=tuple(strategies[option] for option in solution.options),
            stages=tuple(Stage(a, b) for a, b in pairwise(solution.boundaries)),
            schedule=family.schedule,
            virtual=family.virtual,
        )

    def priced(self, plan: Plan) -> Plan:
        """``plan`` with its price by the closed form, and what a walk of its actions gives."""
        numbers = dict(self.pricer.predict(plan))
        reserve = int(self.pricer.costs.cluster.reserve_bytes.value)
        numbers["memory_bytes"] -= reserve  # what compile() limits is the plan's own
        costs = self._costs(plan)
        each = [
            costs.cost(layer.class_index, strategy, plan.num_micro_batches).source
            for layer, strategy in zip(self.layered.layers, plan.strategies, strict=True)
        ]
        numbers["sources"] = {name: each.count(name) for name in ("measured", "analytic")}
        return self.with_simulation(replace(plan, predicted=numbers))

    def with_simulation(self, plan: Plan) -> Plan:
        """A priced plan (of one stage too) with ``simulated_ms``, what the simulator says of every
        group, and the work that it walked."""
        outlines, made = stage_work(self._costs(plan), self.pricer.switches, plan)
        works = [replace(work, cores=self._shared(g, plan.pp)) for g, work in enumerate(made)]
        found = simulate(outlines, [order(outline) for outline in outlines], works)
        numbers = {
            "simulated_ms": found.step_ms,
            "simulated": found.summary(),
            work_json.KEY: work_json.dump(outlines, works),
        }
        return replace(plan, predicted={**plan.predicted, **numbers})

    def _shared(self, group: int, pp: int) -> Cores | None:
        """The cores of a group's first rank, and all threads that the group has there."""
        size = self.world_size // pp
        mine = self.cores[group * size : (group + 1) * size]
        if not mine:
            return None
        threads = sum(found.num_threads for found in mine if found.pool == mine[0].pool)
        return replace(mine[0], num_threads=threads)

    def _costs(self, plan: Plan) -> LayerCosts:
        ranks = plan.world_size // plan.pp
        return self.pricer.costs_for(family_of(plan), ranks, plan.global_batch_size)
