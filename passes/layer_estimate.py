"""Time and memory of a layer from what its operators do (see passes.tally)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import fx

from galvatron_compile.cluster import ClusterProfile
from galvatron_compile.graph import LayeredGraph
from galvatron_compile.layer_timing import LayerTiming
from galvatron_compile.mesh import Axis
from galvatron_compile.passes.arguments import differentiable_flags, make_arguments
from galvatron_compile.passes.normalise import retarget_devices
from galvatron_compile.passes.sharding import localise
from galvatron_compile.passes.sharding.table import ShardingTable
from galvatron_compile.passes.tally import ATTENTION, MATMUL, OperatorCount, Tally, tally
from galvatron_compile.strategy import Strategy

# Counting at two batch sizes gives every quantity as a straight line in the batch size.
SMALL, LARGE = 2, 4


@dataclass(frozen=True)
class Estimate:
    """Memory of one layer, one micro-batch, one rank. selective_bytes: what selective recompute
    keeps, inputs included; never more than keeping everything."""

    saved_bytes: int
    peak_bytes: int
    input_bytes: int
    selective_bytes: int


class Estimator:
    """Counts each form of each class once and evaluates it at any batch size."""

    def __init__(
        self,
        layered: LayeredGraph,
        shardings: ShardingTable,
        cluster: ClusterProfile,
    ) -> None:
        self.layered, self.shardings = layered, shardings
        self.cluster = cluster
        self.tallies: dict[tuple[int, int, bool], tuple[Tally, Tally]] = {}

    def estimate(self, class_index: int, strategy: Strategy, local_batch: float) -> Estimate:
        """``local_batch`` need not be whole: half of a sequence is half a sample."""
        small, large = self.tallies_of(class_index, strategy)
        at = _Line(local_batch)
        saved_bytes = int(at(small.saved_bytes, large.saved_bytes))
        input_bytes = int(at(small.input_bytes, large.input_bytes))
        product_bytes = int(at(small.product_bytes, large.product_bytes))
        return Estimate(
            saved_bytes=saved_bytes,
            peak_bytes=int(at(small.peak_bytes, large.peak_bytes)),
            input_bytes=input_bytes,
            selective_bytes=min(saved_bytes, input_bytes + product_bytes),
        )

    def computation(self, class_index: int, strategy: Strategy, local_batch: float) -> LayerTiming:
        """Forward and backward from FLOPs and bytes. ProfileError for a dtype without a rate."""
        small, large = self.tallies_of(class_index, strategy)
        at = _Line(local_batch)
        return LayerTiming(
            self._time_ms(small.forward, large.forward, at),
            self._time_ms(small.backward, large.backward, at),
        )

    def part(
        self, class_index: int, strategy: Strategy, local_batch: float, kind: str
    ) -> LayerTiming:
        """As :meth:`computation`, of operators of one kind ("matmul", "attention", "memory")."""
        small, large = self.tallies_of(class_index, strategy)
        at = _Line(local_batch)

        def only(counts: Sequence[OperatorCount]) -> list[OperatorCount]:
            return [count for count in counts if count.kind == kind]

        return LayerTiming(
            self._time_ms(only(small.forward), only(large.forward), at),
            self._time_ms(only(small.backward), only(large.backward), at),
        )

    def flops_per_sample(self, class_index: int, strategy: Strategy) -> float:
        """Of the forward pass on one rank, matrix products and attention."""
        _, large = self.tallies_of(class_index, strategy)
        return sum(count.flops for count in large.forward) / LARGE

    def tallies_of(self, class_index: int, strategy: Strategy) -> tuple[Tally, Tally]:
        """What the class does in the strategy's form at the two counted batch sizes."""
        key = (class_index, strategy.tp, strategy.sequence_parallel)
        if key not in self.tallies:
            graph = localise(
                self.shardings.get(class_index, strategy),
                Axis.dry_run(f"tp{strategy.tp}", strategy.tp),
            )
            retarget_devices(graph, torch.device("cpu"))
            self.tallies[key] = (
                self._tally(class_index, graph, SMALL),
                self._tally(class_index, graph, LARGE),
            )
        return self.tallies[key]

    def _tally(self, class_index: int, graph: fx.GraphModule, batch: int) -> Tally:
        kinds = self.layered.classes[class_index].kinds
        symbol = self.layered.graph.batch_symbol

        def arguments() -> list[object]:
            return make_arguments(graph, symbol, batch, torch.device("cpu"))

        return tally(
            graph,
            arguments,
            differentiable_flags(graph, kinds),
            [kind == "activation" for kind in (*kinds, "seed")],
        )

    def _time_ms(
        self, small: Sequence[OperatorCount], large: Sequence[OperatorCount], at: _Line
    ) -> float:
        if len(small) != len(large):  # the model branches on the batch size: scale the larger
            return at.size / LARGE * sum(self.operator_ms(c, c.flops, c.num_bytes) for c in large)
        return sum(
            self.operator_ms(a, at(a.flops, b.flops), at(a.num_bytes, b.num_bytes))
            for a, b in zip(small, large, strict=True)
        )

    def operator_ms(self, count: OperatorCount, flops: float, num_bytes: float) -> float:
        """Roofline: the longer of computing and moving, and never less than launching."""
        if count.kind == MATMUL:
            return self.cluster.matmul_ms(flops, count.dtype, num_bytes)
        if count.kind == ATTENTION:
            return self.cluster.attention_ms(flops, count.dtype, num_bytes)
        return self.cluster.memory_ms(num_bytes)


@dataclass(frozen=True)
class _Line:
    """The straight line through the values at the two counted batch sizes."""

    size: float

    def __call__(self, small: float, large: float) -> float:
        return max(0.0, small + (large - small) * (self.size - SMALL) / (LARGE - SMALL))
