"""What every layer class costs under every strategy."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from galvatron_compile.strategy import Strategy
from galvatron_compile.text import columns, mib, ms

Source = Literal["measured", "analytic"]


@dataclass(frozen=True, slots=True)
class LayerCost:
    """One layer under one strategy. Times are for one micro-batch unless the name says step.

    forward_ms, backward_ms: computation; backward includes the second forward of recompute.
    forward_comm_ms, backward_comm_ms: tensor and sequence parallel collectives, not overlapped.
    forward_context_ms, backward_context_ms: what Ulysses' all-to-alls take, and of context
        parallel's ring what attention does not hide.
    forward_expert_ms, backward_expert_ms: all-to-alls of tokens to experts and back.
    forward_send_ms, backward_send_ms: outputs to the next pipeline stage, gradients of inputs to
        the previous one; paid by the last and the first layer of a stage only.
    forward_gather_ms, backward_gather_ms: ZeRO-3 parameter gathers (zero otherwise), started one
        layer ahead, so that they run beside computation.
    step_gather_ms: ZeRO-1/2 gather of updated parameters, once a step.
    micro_reduce_ms: gradient reduce-scatter of every micro-batch (ZeRO-2/3).
    step_reduce_ms: gradient reduction once a step (ZeRO-0/1, and tensor-parallel deferred sums).
    optimizer_ms: reading and writing the states of the optimizer update, once a step.
    saved_bytes: activations kept from forward to backward for one micro-batch.
    transient_bytes: peak of what lives only while this layer runs (gathered parameters, workspace).
    """

    forward_ms: float
    backward_ms: float
    forward_comm_ms: float
    backward_comm_ms: float
    forward_gather_ms: float
    backward_gather_ms: float
    step_gather_ms: float
    micro_reduce_ms: float
    step_reduce_ms: float
    optimizer_ms: float
    parameter_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    saved_bytes: int
    transient_bytes: int
    source: Source
    forward_context_ms: float = 0.0
    backward_context_ms: float = 0.0
    forward_expert_ms: float = 0.0
    backward_expert_ms: float = 0.0
    forward_send_ms: float = 0.0
    backward_send_ms: float = 0.0

    @property
    def context_ms(self) -> float:
        return self.forward_context_ms + self.backward_context_ms

    @property
    def expert_ms(self) -> float:
        return self.forward_expert_ms + self.backward_expert_ms

    @property
    def state_bytes(self) -> int:
        return self.parameter_bytes + self.gradient_bytes + self.optimizer_bytes


@dataclass(frozen=True)
class CostTable:
    """Costs of every layer class × strategy × number of micro-batches, on one cluster.

    layers: class index of every layer, in order.
    entries: (class index, strategy, num_micro_batches) -> cost; absent where not legal.
    resharding_ms: (cut index i, strategy of layer i, strategy of layer i + 1, num_micro_batches)
        -> forward + backward time of changing layout after layer i; absent means free.
    same_strategy: groups of layer indices that must agree (tied parameters).
    overlap_slowdown: factor by which computation and communication slow each other when both run.
    illegal: (class index, strategy) -> why a strategy is not offered, for the report.
    """

    layers: tuple[int, ...]
    class_names: tuple[str, ...]
    strategies: tuple[Strategy, ...]
    micro_batch_counts: tuple[int, ...]
    entries: Mapping[tuple[int, Strategy, int], LayerCost]
    resharding_ms: Mapping[tuple[int, Strategy, Strategy, int], float]
    same_strategy: tuple[tuple[int, ...], ...]
    overlap_slowdown: float
    world_size: int
    global_batch_size: int
    illegal: Mapping[tuple[int, Strategy], str]

    def __str__(self) -> str:
        """The costs at the fewest micro-batches; :meth:`show` prints any other number."""
        return self.show(min(self.micro_batch_counts))

    def show(self, num_micro_batches: int) -> str:
        """Every class × strategy in one number of micro-batches, the illegal ones with reason."""
        counts = ", ".join(map(str, self.micro_batch_counts))
        lines = [
            f"cost table for {self.world_size} ranks: global batch {self.global_batch_size} in "
            f"{num_micro_batches} of {counts} micro-batches, times of one micro-batch, "
            f"overlap slowdown {self.overlap_slowdown:g}"
        ]
        for index, name in enumerate(self.class_names):
            layers = [i for i, other in enumerate(self.layers) if other == index]
            plural = "layer" if len(layers) == 1 else "layers"
            lines += ["", f"{name} ({len(layers)} {plural})"]
            rows = [
                _cost_row(strategy, self.entries[index, strategy, num_micro_batches])
                for strategy in self.strategies
                if (index, strategy, num_micro_batches) in self.entries
            ]
            if rows:
                lines.append(columns(_COST_HEADER, rows))
            for strategy in self.strategies:
                if (index, strategy) in self.illegal:
                    lines.append(f"{strategy}: not offered, {self.illegal[index, strategy]}")
        return "\n".join(lines)


_COST_HEADER = (
    *("strategy", "forward ms", "backward ms", "comm ms", "gather ms", "sync ms", "step ms"),
    *("states MiB", "saved MiB", "transient MiB", "source"),
)


def _cost_row(strategy: Strategy, cost: LayerCost) -> list[str]:
    """comm: tensor and sequence parallel; sync: gradient reduction; step: once a step."""
    times = (
        cost.forward_ms,
        cost.backward_ms,
        cost.forward_comm_ms + cost.backward_comm_ms,
        cost.forward_gather_ms + cost.backward_gather_ms,
        cost.micro_reduce_ms + cost.step_reduce_ms,
        cost.step_gather_ms + cost.optimizer_ms,
    )
    sizes = (cost.state_bytes, cost.saved_bytes, cost.transient_bytes)
    return [str(strategy), *map(ms, times), *map(mib, sizes), cost.source]
