"""Everything the planner knows of one model on one cluster: captured, sharded, ready to be priced.

Importing this module does not import torch; making a :class:`Study` does.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from galvatron_compile.cluster import ClusterProfile
from galvatron_compile.constraints import Constraints
from galvatron_compile.errors import InfeasibleError, PlanError, ShapeError
from galvatron_compile.passes.pipeline.problem import Family, PipelineProblem, StageCosts
from galvatron_compile.passes.pipelines import Space, families
from galvatron_compile.passes.strategies import Limits, enumerate_within
from galvatron_compile.strategy import RECOMPUTE, Strategy

if TYPE_CHECKING:
    from galvatron_compile.models import Workable
    from galvatron_compile.passes.plan_prices import Pricer

Say = Callable[[str], None]

TP_OVER_NODES = 2
"""Tensor parallel is tried over at most so many nodes unless a constraint names a larger degree."""
MIN_TOKENS = 128
"""Context parallel is tried while a rank keeps at least so many tokens of a sequence."""


@dataclass(frozen=True)
class Study:
    """memory_bytes: limit of a rank, the framework's reserve included; the pricer's capacity is
    the rest. keep: pruning rules of passes.strategies that are switched off."""

    model: Workable
    cluster: ClusterProfile
    global_batch_size: int
    memory_bytes: int
    constraints: Constraints
    pricer: Pricer
    keep: tuple[str, ...] = ()

    @staticmethod
    def of(
        model: Workable,
        cluster: ClusterProfile,
        global_batch_size: int,
        memory_bytes: int | None,
        precision: str | None,
        constraints: Constraints,
        say: Say = lambda text: None,
    ) -> Study:
        """capture → shard, and the pricer of what they give.

        Raises GalvatronError: the model cannot be captured, or the limit leaves no memory.
        """
        from galvatron_compile.compiler import understand
        from galvatron_compile.passes.layer_costs import LayerCosts, Workload
        from galvatron_compile.passes.plan_prices import Pricer
        from galvatron_compile.passes.reshard_cost import Switches
        from galvatron_compile.passes.sharding.table import shard
        from galvatron_compile.precision import Precision

        if global_batch_size < 1:
            raise ShapeError(f"a global batch of {global_batch_size} samples; give at least 1")
        limit, capacity = _capacity(cluster, memory_bytes)
        policy = Precision.parse(precision)
        say(f"capturing {model}")
        layered = understand(model.module, model.example_inputs, model.loss_fn, policy)
        constraints.check(len(layered.layers))
        forms = tensor_forms(cluster, constraints)
        say(f"deriving shardings of {len(layered.classes)} distinct layers in {len(forms)} forms")
        shardings = shard(layered, forms)
        workload = Workload(cluster.world_size, global_batch_size, (1,), policy)
        costs = LayerCosts.of(layered, shardings, cluster, workload, {})
        pricer = Pricer(costs, Switches(layered, shardings, cluster), capacity)
        return Study(model, cluster, global_batch_size, limit, constraints, pricer)

    def under(
        self, constraints: Constraints, memory_bytes: int | None, keep: tuple[str, ...] = ()
    ) -> Study:
        """The same model and cluster with other constraints and another limit; captures nothing."""
        limit, capacity = _capacity(self.cluster, memory_bytes)
        constraints.check(len(self.layer_names))
        known = {key[1:] for key in self.pricer.costs.shardings.forms}
        known |= {key[1:] for key in self.pricer.costs.shardings.illegal}
        if not known >= {s.form for s in tensor_forms(self.cluster, constraints)}:
            raise PlanError(
                "the study was made under constraints that leave out tensor-parallel degrees which "
                f"({constraints}) allows; make a new study"
            )
        pricer = replace(self.pricer, capacity_bytes=capacity)
        return replace(
            self, constraints=constraints, memory_bytes=limit, pricer=pricer, keep=keep
        )

    @property
    def layer_names(self) -> tuple[str, ...]:
        return tuple(layer.name for layer in self.pricer.costs.layered.layers)

    @property
    def class_names(self) -> tuple[str, ...]:
        """Of every layer, the name of its class."""
        layered = self.pricer.costs.layered
        return tuple(layered.layer_class(layer).name for layer in layered.layers)

    def families(self) -> list[Family]:
        """Pipelines that the constraints allow; PlanError if they contradict each other."""
        space = Space(len(self.layer_names), self.cluster.world_size, self.global_batch_size)
        found = families(space, self.constraints)
        if not found:
            raise PlanError(
                f"the constraints ({self.constraints}) leave no pipeline of {space.num_layers} "
                f"layers on {space.num_ranks} ranks with a global batch of "
                f"{space.global_batch_size}: pp must divide the ranks, micro-batches the batch, "
                "and a schedule needs as many micro-batches as stages; relax one of them"
            )
        return found

    def problems(self) -> list[PipelineProblem]:
        """One per family, with every strategy that is worth pricing there."""
        layered = self.pricer.costs.layered
        layers = tuple(layer.class_index for layer in layered.layers)
        tied = self.pricer.costs.shardings.tied
        allows_cut = self.constraints.allows_cut
        uncut = frozenset(edge for edge in range(1, len(layers)) if not allows_cut(edge - 1))
        known: dict[tuple[int, int], StageCosts | None] = {}
        found = []
        for family in self.families():
            key = family.pp, family.num_micro_batches
            if key not in known:
                known[key] = self.stage_costs(family)
            costs = known[key]
            if costs is not None:
                costs = _fitting_schedule(costs, family)
                problem = PipelineProblem(
                    family, layers, costs, tied, self.pricer.capacity_bytes, uncut
                )
                found.append(problem)
        if not found:
            raise PlanError(
                f"no strategy splits a global batch of {self.global_batch_size} over "
                f"{self.cluster.world_size} ranks"
                + (f" under the constraints ({self.constraints})" if str(self.constraints) else "")
                + "; change the batch size or relax a constraint"
            )
        return found

    def stage_costs(self, family: Family) -> StageCosts | None:
        """None if no strategy is allowed with this number of ranks and micro-batches."""
        from galvatron_compile.passes.stage_costs import stage_costs

        num_ranks = self.cluster.world_size // family.pp
        strategies = self.strategies(num_ranks, family.num_micro_batches)
        if not strategies:
            return None
        costs = self.pricer.costs_for(family, num_ranks, self.global_batch_size)
        return stage_costs(costs, self.pricer.switches, strategies, family.num_micro_batches)

    def strategies(self, num_ranks: int, count: int) -> list[Strategy]:
        """Strategies on the ranks of one group that neither rules nor constraints cut."""
        facts = self.pricer.costs.messages.facts
        attentions = [found for each in facts for found in each.attentions]
        experts = sorted({each.experts.num_experts for each in facts if each.experts})
        shortest = min((found.length for found in attentions), default=0)
        limits = Limits(
            num_ranks,
            self.global_batch_size,
            count,
            max_tp=largest_tp(self.cluster, self.constraints),
            max_ulysses=max((found.kv_heads for found in attentions), default=1),
            max_cp=max(1, shortest // MIN_TOKENS),
            experts=tuple(experts),
            recompute=RECOMPUTE,
            keep=tuple({*self.keep, *_asked_for(self.constraints)}),
        )
        return [s for s in enumerate_within(limits) if self.constraints.allows_strategy(s)]


def _capacity(cluster: ClusterProfile, memory_bytes: int | None) -> tuple[int, int]:
    """(limit of a rank, what of it a plan may use). InfeasibleError if that is nothing."""
    limit = memory_bytes if memory_bytes is not None else cluster.device.memory_bytes
    reserve = int(cluster.reserve_bytes.value)
    if limit <= reserve:
        raise InfeasibleError(
            f"a memory limit of {limit} bytes leaves nothing beside the {reserve} bytes that "
            "the framework keeps; raise the limit"
        )
    return limit, limit - reserve


def largest_tp(cluster: ClusterProfile, constraints: Constraints) -> int:
    named = [
        4 * value if rule.operator == ">=" else value
        for rule in constraints.rules
        if rule.name == "tp" and rule.operator in ("=", ">=", "<=")
        for value in rule.values
        if isinstance(value, int)
    ]
    usual = TP_OVER_NODES * cluster.ranks_per_node
    wanted = [value for value in named if value <= cluster.world_size]
    return max([usual, *wanted])


def tensor_forms(cluster: ClusterProfile, constraints: Constraints) -> list[Strategy]:
    """One strategy per (tp, sequence parallel) that a plan may use."""
    world = cluster.world_size
    degrees = [d for d in range(1, largest_tp(cluster, constraints) + 1) if world % d == 0]
    return [
        Strategy(tp, world // tp, sp)
        for tp in constraints.choose("tp", degrees)
        for sp in (False, True)
        if (tp > 1 or not sp) and constraints.allows("sp", "yes" if sp else "no")
    ]


def _asked_for(constraints: Constraints) -> list[str]:
    """Pruning rules that a constraint overrules: who asks for divided sequences gets them."""
    divided = any(not constraints.allows(name, 1) for name in ("cp", "ulysses"))
    return ["sequence-only-when-samples-run-out"] if divided else []


def _fitting_schedule(costs: StageCosts, family: Family) -> StageCosts:
    """Zero-bubble divides backward in two, and full recompute would have to run for each half."""
    if family.schedule != "zero-bubble":
        return costs
    runs = np.array([strategy.recompute != "full" for strategy in costs.strategies])
    return replace(costs, allowed=costs.allowed & runs)


def peak_flops_per_s(cluster: ClusterProfile) -> tuple[float, str]:
    """For MFU: a GPU's documented peak in half precision, else the best rate that was measured."""
    from galvatron_compile.presets import GPUS

    for name, gpu in GPUS.items():
        if cluster.device.name.endswith(name):
            return gpu.half_flops_per_s, f"data sheet of {name}, dense half precision"
    rates: Mapping[str, float] = {
        curve.dtype: max(rate for _, rate in curve.points) for curve in cluster.matmul
    }
    best = max(rates, key=lambda dtype: rates[dtype])
    return rates[best], f"best measured {best} matrix product"
