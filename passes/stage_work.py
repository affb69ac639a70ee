"""stage_work: LayerCosts, Switches, Plan → outline and work of every pipeline group.

The same numbers as the closed form's (passes.pricing), taken apart into what each action of a
rank's list takes: which parameters are gathered and summed together, what is recomputed. What
crosses a cut: passes.stage_sends. Sizes follow the runtime's parameter units
(galvatron_compile.units).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from galvatron_compile.actions import LayerOutline, Outline, UnitOutline
from galvatron_compile.costs import LayerCost
from galvatron_compile.graph import Layer
from galvatron_compile.passes.layer_costs import LayerCosts
from galvatron_compile.passes.parameter_sizes import ParameterBytes, parameter_bytes
from galvatron_compile.passes.reshard_cost import Switches
from galvatron_compile.passes.stage_sends import stage_sends
from galvatron_compile.passes.state_costs import ADAM_MOMENTS, Sizes, state_times
from galvatron_compile.passes.tally import MATMUL
from galvatron_compile.plans import Plan, Stage
from galvatron_compile.strategy import Strategy
from galvatron_compile.work import LayerWork, Phase, UnitWork, Work
from galvatron_compile.work_json import Groups


def stage_work(costs: LayerCosts, switches: Switches, plan: Plan) -> Groups:
    """costs: for the ranks of one group and the plan's number of groups (Pricer.costs_for).

    PlanError where a layer cannot run with its strategy.
    """
    made = [_Group(costs, switches, plan, group).made() for group in range(plan.pp)]
    return tuple(outline for outline, _ in made), tuple(work for _, work in made)


@dataclass(frozen=True)
class _Member:
    """Parameters that are one unit, by their places in the layer that has them first.

    holders: groups that have them too, this one included.
    """

    name: str
    layer: int
    places: frozenset[int]
    shared: bool
    holders: tuple[int, ...]


class _Group:
    """One group of a plan."""

    def __init__(self, costs: LayerCosts, switches: Switches, plan: Plan, group: int) -> None:
        self.costs, self.switches, self.plan, self.group = costs, switches, plan, group
        self.layered, self.cluster = costs.layered, costs.cluster
        stages = plan.stages or (Stage(0, len(plan.layers)),)
        self.stages = stages[group :: plan.pp]
        self.numbers = plan.group_layers(group)
        self.members = self._members()

    def made(self) -> tuple[Outline, Work]:
        plan = self.plan
        priced = {i: self._cost(i) for i in self.numbers}
        units = [self._unit(member) for member in self.members]
        chunks = tuple(tuple(range(s.first, s.last)) for s in self.stages)
        outline = Outline(
            chunks=chunks,
            layers={i: self._layer_outline(i) for i in self.numbers},
            units=tuple(outline for outline, _ in units),
            num_micro_batches=plan.num_micro_batches,
            schedule=plan.schedule,
            pp=plan.pp,
            group=self.group,
        )
        tensor, data, messages = self._wires()
        work = Work(
            layers={i: self._layer_work(i, priced[i]) for i in self.numbers},
            units=tuple(work for _, work in units),
            sends=stage_sends(self.costs, plan, self.group),
            optimizer_ms=sum(cost.optimizer_ms for cost in priced.values()),
            reserve_bytes=int(self.cluster.reserve_bytes.value),
            compute_slowdown=self.cluster.overlap.compute,
            communication_slowdown=self.cluster.overlap.communication,
            node_compute_slowdown=self.cluster.overlap_within(True).compute,
            node_communication_slowdown=self.cluster.overlap_within(True).communication,
            inner_shares_wire=bool(tensor & data),
            messages_share_wire=bool(messages & data),
            inner_computes=self.cluster.device.kind == "cpu" and True not in tensor,
        )
        return outline, work

    # Which parameters belong together.

    def _members(self) -> list[_Member]:
        """As passes.rewrite_parts makes units: a layer's own, those that layers of the group
        share, and each that other groups hold too."""
        layers, seen = self.layered.layers, set[str]()
        uses: dict[str, int] = {}
        for i in self.numbers:
            for name in dict.fromkeys(layers[i].parameters):
                uses[name] = uses.get(name, 0) + 1
        found = []
        for i in self.numbers:
            titles: dict[str, list[str]] = {}
            for name in dict.fromkeys(layers[i].parameters):
                if name not in seen:
                    tied, shared = len(self._holders(name)) > 1, uses[name] > 1
                    title = f"{layers[i].name} (shared)" if shared else layers[i].name
                    title = f"{name} (tied across stages)" if tied else title
                    titles.setdefault(title, []).append(name)
                    seen.add(name)
            own = layers[i].name
            for title in sorted(titles, key=lambda each: each != own):
                names = titles[title]
                places = frozenset(layers[i].parameters.index(name) for name in names)
                holders = self._holders(names[0])
                found.append(_Member(title, i, places, uses[names[0]] > 1, holders))
        return found

    def _holders(self, name: str) -> tuple[int, ...]:
        layers = self.layered.layers
        return tuple(
            group
            for group in range(self.plan.pp)
            if any(name in layers[i].parameters for i in self.plan.group_layers(group))
        )

    def _unit(self, member: _Member) -> tuple[UnitOutline, UnitWork]:
        strategy = self.plan.strategies[member.layer]
        sizes = self._sizes(member)
        shared, experts = sizes[0], sizes[1].divided(strategy.ep)
        parts = [(shared, strategy.data_ranks)]
        if experts.master:
            parts.append((experts, strategy.data_ranks // strategy.ep))
        times = state_times(self.cluster, sizes, strategy)
        tensor_ms = sum(
            self.cluster.group_ms("all_reduce", size.partial, strategy.tp) for size, _ in parts
        )
        held = [_held(size, ranks, strategy) for size, ranks in parts]
        pending = sum(unit.pending_bytes for unit in held)
        exchanged = strategy.zero and strategy.data_ranks > 1 and self.cluster.device.kind == "cpu"
        work = UnitWork(
            gather_ms=times["forward_gather_ms"] + times["step_gather_ms"],
            reduce_ms=times["micro_reduce_ms"] + max(0.0, times["step_reduce_ms"] - tensor_ms),
            tensor_ms=tensor_ms,
            tied_ms=self._tied_ms(member, shared, strategy),
            parameter_bytes=sum(unit.parameter_bytes for unit in held),
            optimizer_bytes=sum(unit.optimizer_bytes for unit in held),
            working_bytes=sum(unit.working_bytes for unit in held),
            pending_bytes=pending,
            gradient_bytes=sum(unit.gradient_bytes for unit in held),
            exchange_bytes=pending - pending // strategy.data_ranks if exchanged else 0,
            in_node=not self._crosses(strategy),
        )
        outline = UnitOutline(
            name=member.name,
            zero=strategy.zero,
            trainable=shared.gradient + experts.gradient > 0,
            shared=member.shared,
            gathers=strategy.zero > 0 or shared.mixed or experts.mixed,
            varying=shared.partial + experts.partial > 0,
            tied=len(member.holders) > 1,
        )
        return outline, work

    def _sizes(self, member: _Member) -> Sizes:
        index = self.layered.layers[member.layer].class_index
        first = self._first_of(index)
        skip = [n for place, n in enumerate(first.parameters) if place not in member.places]
        facts = self.costs.messages.facts[index].experts
        sharded = self.costs.shardings.get(index, self.plan.strategies[member.layer])
        precision = self.costs.workload.precision
        experts = facts.parameters if facts else ()
        return parameter_bytes(self.layered, index, sharded, precision, experts, skip)

    def _first_of(self, class_index: int) -> Layer:
        return next(x for x in self.layered.layers if x.class_index == class_index)

    def _tied_ms(self, member: _Member, size: ParameterBytes, strategy: Strategy) -> float:
        if len(member.holders) == 1:
            return 0.0
        owners = strategy.data_ranks if strategy.zero else 1
        apart = self.costs.workload.world_size * (member.holders[-1] - member.holders[0])
        apart //= len(member.holders) - 1
        num_bytes = -(-size.gradient // owners)
        return self.cluster.group_ms("all_reduce", num_bytes, len(member.holders), apart)

    # Layers.

    def _cost(self, layer: int) -> LayerCost:
        index = self.layered.layers[layer].class_index
        return self.costs.cost(index, self.plan.strategies[layer], self.plan.num_micro_batches)

    def _layer_outline(self, layer: int) -> LayerOutline:
        found = self.layered.layers[layer]
        units = [
            u
            for u, member in enumerate(self.members)
            if any(
                self.layered.layers[member.layer].parameters[place] in found.parameters
                for place in member.places
            )
        ]
        return LayerOutline(
            name=found.name,
            units=tuple(units),
            recompute=self.plan.strategies[layer].recompute == "full",
            differentiable=self._is_differentiable(layer),
        )

    def _is_differentiable(self, layer: int) -> bool:
        """Whether it or a layer before it has a parameter that is trained."""
        parameters = self.layered.graph.parameters
        return any(
            parameters[name].requires_grad
            for found in self.layered.layers[: layer + 1]
            for name in found.parameters
        )

    def _layer_work(self, layer: int, cost: LayerCost) -> LayerWork:
        index, strategy = self.layered.layers[layer].class_index, self.plan.strategies[layer]
        local = self.costs.local_batch(strategy, self.plan.num_micro_batches)
        estimate = self.costs.estimator.estimate(index, strategy, local)
        switch_ms = self._switch_ms(layer) / 2
        forward = Phase(
            cost.forward_ms, cost.forward_comm_ms, cost.forward_context_ms, cost.forward_expert_ms
        )
        again = forward if strategy.recompute == "full" else Phase()
        backward = Phase(
            max(0.0, cost.backward_ms - again.compute_ms),
            max(0.0, cost.backward_comm_ms - again.tensor_ms),
            max(0.0, cost.backward_context_ms - again.context_ms),
            max(0.0, cost.backward_expert_ms - again.expert_ms),
            switch_ms,
        )
        # Both estimated: a share must not depend on how far estimates are from what was timed.
        estimator = self.costs.estimator
        product_ms = estimator.part(index, strategy, local, MATMUL).backward_ms
        whole_ms = estimator.computation(index, strategy, local).backward_ms
        share = min(0.5, product_ms / 2 / whole_ms) if whole_ms else 0.0
        if layer == 0 or not self._is_differentiable(layer - 1):
            share = 1.0  # nobody needs the gradients of its inputs
        return LayerWork(
            forward=replace(forward, resharding_ms=switch_ms),
            backward=backward,
            recompute=again,
            weight_share=share,
            saved_bytes=cost.saved_bytes,
            recomputed_bytes=max(0, estimate.saved_bytes - cost.saved_bytes),
            transient_bytes=max(0, estimate.peak_bytes - estimate.saved_bytes),
        )

    def _switch_ms(self, layer: int) -> float:
        """Changing layout in front of a layer, there and back; free where a stage begins."""
        if any(stage.first == layer for stage in self.stages):
            return 0.0
        before, after = self.plan.strategies[layer - 1 : layer + 1]
        batch = self.plan.global_batch_size // self.plan.num_micro_batches
        ranks = self.costs.workload.world_size
        return self.switches.ms(layer - 1, before, after, batch, ranks)

    # Wires.

    def _crosses(self, strategy: Strategy) -> bool:
        """Whether the data axis leaves a node."""
        return (strategy.data_ranks - 1) * strategy.tp >= self.cluster.ranks_per_node

    def _wires(self) -> tuple[set[bool], set[bool], set[bool]]:
        """Whether layers' own collectives, those over the data axis, and messages cross nodes."""
        per_node, ranks = self.cluster.ranks_per_node, self.costs.workload.world_size
        inner, data = set[bool](), set[bool]()
        for layer in self.numbers:
            strategy = self.plan.strategies[layer]
            extent = ranks // strategy.dp
            if extent > 1:
                inner.add(extent > per_node)
            if strategy.data_ranks > 1:
                data.add(self._crosses(strategy))
        crosses = ranks * self.plan.pp > per_node  # some cut lies between nodes
        return inner, data, {crosses} if self.plan.pp > 1 else set()


def _held(size: ParameterBytes, ranks: int, strategy: Strategy) -> UnitWork:
    """Bytes of a unit whose parameters are divided over ``ranks``, as flat buckets hold them."""
    zero = strategy.zero
    owners = ranks if zero else 1
    copied = zero in (1, 2) or (zero == 0 and size.mixed)
    master = -(-size.master // owners)
    trained = size.gradient > 0
    return UnitWork(
        parameter_bytes=master + (size.working if copied else 0),
        optimizer_bytes=master * ADAM_MOMENTS if trained else 0,
        working_bytes=size.working if zero == 3 else 0,
        pending_bytes=size.gradient,
        gradient_bytes=-(-size.gradient // owners),
    )
