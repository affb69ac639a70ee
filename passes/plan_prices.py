"""plan_prices: LayerCosts, Switches, Plan → what a step of the plan takes, in detail.

The totals are those of passes.pipeline.closed_form, which the search minimises; here they are
divided by cause, by pipeline group and by layer, for people and for the JSON of a plan.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

from galvatron_compile.costs import LayerCost
from galvatron_compile.errors import PlanError
from galvatron_compile.passes.layer_costs import LayerCosts, Workload
from galvatron_compile.passes.pipeline.closed_form import Evaluation, chunk_flights, evaluate
from galvatron_compile.passes.pipeline.problem import Family, PipelineProblem
from galvatron_compile.passes.pricing import NS_PER_MS, LayerTime, micro_time, once_time
from galvatron_compile.passes.reshard_cost import Switches
from galvatron_compile.passes.stage_costs import stage_costs
from galvatron_compile.plans import Plan, Stage
from galvatron_compile.schedules import bubble_share
from galvatron_compile.strategy import Strategy


@dataclass(frozen=True)
class Pricer:
    """Prices any plan of one model on one cluster. capacity_bytes: of a rank, reserve excluded."""

    costs: LayerCosts
    switches: Switches
    capacity_bytes: int

    def problem(self, plan: Plan) -> PipelineProblem:
        """The search problem whose only options are the plan's strategies."""
        family = family_of(plan)
        costs = self.costs_for(family, plan.world_size // plan.pp, plan.global_batch_size)
        strategies = tuple(dict.fromkeys(plan.strategies))
        layers = tuple(layer.class_index for layer in self.costs.layered.layers)
        for name, index, strategy in zip(plan.layers, layers, plan.strategies, strict=True):
            reason = costs.why_not(index, strategy)
            if reason is not None:
                raise PlanError(f"layer {name!r} cannot run with {strategy}: {reason}")
        return PipelineProblem(
            family,
            layers,
            stage_costs(costs, self.switches, strategies, plan.num_micro_batches),
            self.costs.shardings.tied,
            self.capacity_bytes,
        )

    def costs_for(self, family: Family, num_ranks: int, batch: int) -> LayerCosts:
        """Costs on the ranks of one group of the family."""
        count = family.num_micro_batches
        precision = self.costs.workload.precision
        return self.costs.for_workload(Workload(num_ranks, batch, (count,), precision, family.pp))

    def forward_flops_per_sample(self) -> float:
        """Matrix products and attention of the whole model, from the least divided forms."""
        costs = self.costs
        world = costs.cluster.world_size
        total = 0.0
        for layer in costs.layered.layers:
            forms = [key for key in costs.shardings.forms if key[0] == layer.class_index]
            _, tp, sp = min(forms)
            form = Strategy(tp, world // tp, sp)
            total += tp * costs.estimator.flops_per_sample(layer.class_index, form)
        return total

    def evaluate(self, plan: Plan) -> Evaluation:
        problem = self.problem(plan)
        return evaluate(problem, edges_of(plan), options_of(plan, problem))

    def predict(self, plan: Plan) -> dict[str, Any]:
        """JSON-able, units in the keys.

        step_ms and memory_bytes (largest group, reserve included); causes: parts of the step that
        the slowest group waits for, which add up to step_ms; groups: one mapping per group of
        ranks; layers: one per layer. Raises PlanError where a layer cannot run with its strategy.
        """
        problem = self.problem(plan)
        found = evaluate(problem, edges_of(plan), options_of(plan, problem))
        ranks = plan.world_size // plan.pp
        costs = self.costs_for(problem.family, ranks, plan.global_batch_size)
        layers = [
            costs.cost(layer.class_index, strategy, plan.num_micro_batches)
            for layer, strategy in zip(self.costs.layered.layers, plan.strategies, strict=True)
        ]
        reserve_bytes = int(self.costs.cluster.reserve_bytes.value)
        switch_ms = _switch_ms(problem, plan)
        groups = [
            self._group(plan, problem.family, group, layers, found, reserve_bytes)
            for group in range(plan.pp)
        ]
        slowest = max(range(plan.pp), key=lambda g: found.group_ns[g])
        slowdown = self.costs.cluster.overlap_slowdown
        times = [layer_causes(cost, problem.family, slowdown) for cost in layers]
        return {
            "step_ms": found.total_ns / NS_PER_MS,
            "memory_bytes": max(found.group_bytes) + reserve_bytes,
            "causes": _causes(plan, slowest, times, switch_ms, layers, found),
            "slowest_group": slowest,
            "groups": groups,
            "layers": [
                {
                    "forward_ms": cost.forward_ms,
                    "backward_ms": cost.backward_ms,
                    "step_ms": time.step_ms,
                    "resharding_ms": after,
                    "state_bytes": cost.state_bytes,
                    "saved_bytes": cost.saved_bytes,
                    "transient_bytes": cost.transient_bytes,
                }
                for cost, time, after in zip(layers, times, switch_ms, strict=True)
            ],
        }

    def _group(
        self,
        plan: Plan,
        family: Family,
        group: int,
        layers: Sequence[LayerCost],
        found: Evaluation,
        reserve_bytes: int,
    ) -> dict[str, Any]:
        stages = _stages(plan)[group :: plan.pp]
        flights = chunk_flights(family, group)
        slowdown = self.costs.cluster.overlap_slowdown
        mine = [layers[i] for stage in stages for i in range(stage.first, stage.last)]
        saved = sum(
            flight * layers[i].saved_bytes
            for stage, flight in zip(stages, flights, strict=True)
            for i in range(stage.first, stage.last)
        )
        forward_ms, whole_ms = 0.0, 0.0
        for cost in mine:
            forward_ms += cost.forward_ms + cost.forward_comm_ms + cost.forward_context_ms
            forward_ms += cost.forward_expert_ms
            whole_ms += micro_time(cost, slowdown).step_ms
        return {
            "layers": ",".join(f"{stage.first}-{stage.last - 1}" for stage in stages),
            "forward_ms": forward_ms,
            "backward_ms": max(0.0, whole_ms - forward_ms),
            "step_once_ms": sum(once_time(cost, slowdown).step_ms for cost in mine),
            "total_ms": found.group_ns[group] / NS_PER_MS,
            "in_flight": list(flights),
            "parameter_bytes": sum(cost.parameter_bytes for cost in mine),
            "gradient_bytes": sum(cost.gradient_bytes for cost in mine),
            "optimizer_bytes": sum(cost.optimizer_bytes for cost in mine),
            "saved_bytes": saved,
            "transient_bytes": max(cost.transient_bytes for cost in mine),
            "reserve_bytes": reserve_bytes,
            "memory_bytes": found.group_bytes[group] + reserve_bytes,
        }


def family_of(plan: Plan) -> Family:
    """PlanError if the plan's schedule cannot run its stages and micro-batches."""
    schedule = plan.schedule if plan.pp > 1 else "1f1b"
    return Family(plan.pp, plan.num_micro_batches, schedule, plan.virtual)


def edges_of(plan: Plan) -> tuple[int, ...]:
    return (0, *(stage.last for stage in _stages(plan)))


def options_of(plan: Plan, problem: PipelineProblem) -> list[int]:
    index = {strategy: i for i, strategy in enumerate(problem.costs.strategies)}
    return [index[strategy] for strategy in plan.strategies]


def layer_causes(cost: LayerCost, family: Family, overlap_slowdown: float) -> LayerTime:
    """What a layer adds to its group's time in a step, by cause; once-a-step parts weigh gamma."""
    micro, once = micro_time(cost, overlap_slowdown), once_time(cost, overlap_slowdown)
    m = family.num_micro_batches
    gamma = m / (m + float(bubble_share(family.schedule, family.virtual)) * (family.pp - 1))
    values = {
        field.name: m * getattr(micro, field.name) + gamma * getattr(once, field.name)
        for field in fields(LayerTime)
    }
    return LayerTime(**values)


def _stages(plan: Plan) -> tuple[Stage, ...]:
    return plan.stages or (Stage(0, len(plan.layers)),)


def _switch_ms(problem: PipelineProblem, plan: Plan) -> list[float]:
    """After every layer, a step's time of changing layout inside its stage."""
    starts = {stage.first for stage in _stages(plan)}
    costs, layers = problem.costs, problem.layers
    options = options_of(plan, problem)
    found = []
    for i in range(len(layers)):
        matrix = costs.switch_ns.get((layers[i], layers[i + 1])) if i + 1 < len(layers) else None
        if matrix is None or i + 1 in starts:
            found.append(0.0)
            continue
        one = int(matrix[costs.layout[options[i]], costs.layout[options[i + 1]]])
        found.append(plan.num_micro_batches * one / NS_PER_MS)
    return found


def _causes(
    plan: Plan,
    slowest: int,
    times: Sequence[LayerTime],
    switch_ms: Sequence[float],
    layers: Sequence[LayerCost],
    found: Evaluation,
) -> dict[str, float]:
    """Parts of the step as the slowest group sees it; the bubble is what is left."""
    mine = plan.group_layers(slowest)
    causes = {
        field.name: sum(getattr(times[i], field.name) for i in mine) for field in fields(LayerTime)
    }
    stages = _stages(plan)
    last_stage = len(stages) - 1
    sends_ms = 0.0
    for number in range(slowest, len(stages), plan.pp):
        stage = stages[number]
        sends_ms += layers[stage.last - 1].forward_send_ms * (number < last_stage)
        sends_ms += layers[stage.first].backward_send_ms * (number > 0)
    causes["pipeline_comm_ms"] = plan.num_micro_batches * sends_ms
    causes["resharding_ms"] = sum(switch_ms[i] for i in mine)
    causes["bubble_ms"] = max(0.0, (found.total_ns - found.group_ns[slowest]) / NS_PER_MS)
    return causes
