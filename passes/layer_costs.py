"""The cost of one layer class under one strategy; annotate and stage_costs ask here."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from galvatron_compile.cluster import ClusterProfile
from galvatron_compile.costs import LayerCost
from galvatron_compile.graph import LayeredGraph
from galvatron_compile.layer_timing import LayerTiming, TimingKey, interpolate
from galvatron_compile.passes.layer_estimate import Estimate, Estimator
from galvatron_compile.passes.messages import Messages
from galvatron_compile.passes.parameter_sizes import parameter_bytes
from galvatron_compile.passes.sharding.table import ShardingTable
from galvatron_compile.passes.state_costs import Sizes, StateTimes, state_bytes, state_times
from galvatron_compile.precision import Precision
from galvatron_compile.strategy import Strategy


@dataclass(frozen=True)
class Workload:
    """What is trained: samples per optimizer step, and the numbers of micro-batches considered.

    world_size: ranks of one pipeline stage. pp: number of such groups of ranks.
    """

    world_size: int
    global_batch_size: int
    micro_batch_counts: tuple[int, ...]
    precision: Precision
    pp: int = 1


@dataclass(frozen=True)
class LayerCosts:
    """Costs of the classes of one model on one cluster, each part worked out once.

    Computation comes from ``timings`` where the class was measured at that degree, else from the
    operators' FLOPs and bytes on the profile's rates (roofline, Williams et al. 2009).
    """

    layered: LayeredGraph
    shardings: ShardingTable
    cluster: ClusterProfile
    workload: Workload
    timings: Mapping[TimingKey, LayerTiming]
    estimator: Estimator
    messages: Messages
    known: dict[Hashable, Any] = field(default_factory=dict, repr=False)

    @staticmethod
    def of(
        layered: LayeredGraph,
        shardings: ShardingTable,
        cluster: ClusterProfile,
        workload: Workload,
        timings: Mapping[TimingKey, LayerTiming],
    ) -> LayerCosts:
        estimator = Estimator(layered, shardings, cluster)
        messages = Messages(layered, cluster, estimator)
        return LayerCosts(layered, shardings, cluster, workload, timings, estimator, messages)

    def for_workload(self, workload: Workload) -> LayerCosts:
        """The same model and cluster; what does not depend on the workload stays known."""
        return replace(self, workload=workload)

    def why_not(self, class_index: int, strategy: Strategy) -> str | None:
        """Why the class cannot run with the strategy at all; None if it can."""
        reason = self.shardings.why_not(class_index, strategy)
        if reason is None and strategy.data_ranks > strategy.dp:
            reason = self._why_not_sequence(strategy)
        experts = self.messages.facts[class_index].experts
        if reason is None and experts is not None and experts.num_experts % strategy.ep:
            reason = f"ep{strategy.ep} does not divide {experts.num_experts} experts"
        return reason

    def _why_not_sequence(self, strategy: Strategy) -> str | None:
        attentions = [found for facts in self.messages.facts for found in facts.attentions]
        if not attentions:
            return "the model has no fused attention, which ulysses and cp need to divide sequences"
        for found in attentions:
            pieces = strategy.ulysses * strategy.tp
            if strategy.ulysses > 1 and (found.heads % pieces or found.kv_heads % pieces):
                return (
                    f"ulysses{strategy.ulysses} × tp{strategy.tp} does not divide {found.heads} "
                    f"heads and {found.kv_heads} key-value heads"
                )
            if found.length % (2 * strategy.cp * strategy.ulysses):
                return (
                    f"a sequence of {found.length} does not divide into 2 × cp{strategy.cp} × "
                    f"ulysses{strategy.ulysses} equal parts"
                )
        return None

    def local_batch(self, strategy: Strategy, count: int) -> float:
        """Samples of a micro-batch on one rank; half of a sequence is half a sample."""
        ranks = strategy.data_ranks
        return self.workload.global_batch_size / (count * ranks)

    def cost(self, class_index: int, strategy: Strategy, count: int) -> LayerCost:
        """One micro-batch of ``count`` in a step, on one rank."""
        local = self.local_batch(strategy, count)
        run, estimate, tensor, source = self._form(class_index, strategy, local)
        send = self._send(class_index, strategy, local)
        context = self.messages.context(class_index, strategy, local)
        expert_ms = self.messages.experts(class_index, strategy, local)
        # What backward repeats of forward's messages, as shares and amounts.
        again = strategy.recompute == "full"
        gathers = tensor[2] * (strategy.recompute == "selective")
        exchange = context[2] * (strategy.recompute == "selective")
        dispatch = {"none": 0.0, "selective": 0.5}.get(strategy.recompute, 1.0)
        rerun_ms = run.forward_ms * self._rerun_share(class_index, strategy, local)
        return LayerCost(
            forward_ms=run.forward_ms,
            backward_ms=run.backward_ms + rerun_ms,
            forward_comm_ms=tensor[0],
            backward_comm_ms=tensor[1] + tensor[0] * again + gathers,
            **self._state_times(class_index, strategy),
            **state_bytes(self._sizes(class_index, strategy), strategy, estimate),
            source=source,
            forward_context_ms=context[0],
            backward_context_ms=context[1] + context[0] * again + exchange,
            forward_expert_ms=expert_ms,
            backward_expert_ms=expert_ms * (1 + dispatch),
            forward_send_ms=send[0],
            backward_send_ms=send[1],
        )

    def _form(
        self, class_index: int, strategy: Strategy, local: float
    ) -> tuple[LayerTiming, Estimate, tuple[float, float, float], Any]:
        """Computation, memory and tensor collectives, which only the form and ``local`` decide."""
        key = ("form", class_index, *strategy.form, local)
        if key not in self.known:
            timing = interpolate(self.timings, (class_index, *strategy.form), local)
            run = timing or self.estimator.computation(class_index, strategy, local)
            estimate = self.estimator.estimate(class_index, strategy, local)
            sharded = self.shardings.get(class_index, strategy)
            tensor = self.messages.tensor(sharded, local)
            self.known[key] = (run, estimate, tensor, "measured" if timing else "analytic")
        return self.known[key]  # type: ignore[no-any-return]

    def _send(self, class_index: int, strategy: Strategy, local: float) -> tuple[float, float]:
        ranks, pp = self.workload.world_size, self.workload.pp
        key = ("send", class_index, *strategy.form, local, ranks, pp)
        if key not in self.known:
            sharded = self.shardings.get(class_index, strategy)
            self.known[key] = self.messages.stages(class_index, sharded, local, ranks, pp)
        return self.known[key]  # type: ignore[no-any-return]

    def _rerun_share(self, class_index: int, strategy: Strategy, local: float) -> float:
        """The share of forward that backward runs again."""
        if strategy.recompute != "selective":
            return float(strategy.recompute == "full")
        key = ("rerun", class_index, *strategy.form, local)
        if key not in self.known:
            cheap_ms = self.estimator.repeated_ms(class_index, strategy, local)
            whole_ms = self.estimator.computation(class_index, strategy, local).forward_ms
            self.known[key] = cheap_ms / max(whole_ms, 1e-9)
        return float(self.known[key])

    def _sizes(self, class_index: int, strategy: Strategy) -> Sizes:
        key = ("sizes", class_index, *strategy.form, self.workload.pp == 1)
        if key not in self.known:
            experts = self.messages.facts[class_index].experts
            self.known[key] = parameter_bytes(
                self.layered,
                class_index,
                self.shardings.get(class_index, strategy),
                self.workload.precision,
                experts.parameters if experts else (),
                self._tied(class_index)[0] if self.workload.pp == 1 else (),
            )
        return self.known[key]  # type: ignore[no-any-return]

    def _tied(self, class_index: int) -> tuple[frozenset[str], frozenset[str]]:
        """Of the class's first layer: parameters that an earlier layer has too, and all that are
        tied. On one stage they are the earlier layer's; on several (embedding and head lie at the
        two ends) both hold them and sum their gradients, as Megatron-LM's embedding group does."""
        key = ("tied", class_index)
        if key not in self.known:
            layers = self.layered.layers
            at = next(i for i, layer in enumerate(layers) if layer.class_index == class_index)
            mine = set(layers[at].parameters)
            before = {name for layer in layers[:at] for name in layer.parameters}
            others = {name for i, o in enumerate(layers) if i != at for name in o.parameters}
            self.known[key] = frozenset(mine & before), frozenset(mine & others)
        return self.known[key]  # type: ignore[no-any-return]

    def _state_times(self, class_index: int, strategy: Strategy) -> StateTimes:
        divided = (strategy.zero, strategy.data_ranks, strategy.ep, self.workload.pp)
        key = ("states", class_index, *strategy.form, *divided)
        if key not in self.known:
            sizes = self._sizes(class_index, strategy)
            found = state_times(self.cluster, sizes, strategy)
            found["step_reduce_ms"] += self._tied_sum_ms(class_index, strategy)
            self.known[key] = found
        return self.known[key]  # type: ignore[no-any-return]

    def _tied_sum_ms(self, class_index: int, strategy: Strategy) -> float:
        """Summing the gradients of parameters that another stage has too, once a step."""
        tied = self._tied(class_index)[1]
        if self.workload.pp == 1 or not tied:
            return 0.0
        sharded = self.shardings.get(class_index, strategy)
        layered, precision = self.layered, self.workload.precision
        whole, _ = parameter_bytes(layered, class_index, sharded, precision)
        rest, _ = parameter_bytes(layered, class_index, sharded, precision, skip=tied)
        apart = self.workload.world_size * (self.workload.pp - 1)
        owners = strategy.data_ranks if strategy.zero >= 2 else 1
        num_bytes = (whole.gradient - rest.gradient) / owners
        return self.cluster.group_ms("all_reduce", num_bytes, 2, apart)
