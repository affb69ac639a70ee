"""Time and memory of a layer from what its operators do (see passes.tally).

On CUDA the host runs ahead of the device: it dispatches the next operators while kernels run. So a
phase (forward or backward of a layer) takes the longer of what the device does, kernels and the
collectives between them, and of what the host needs to dispatch its operators. On the CPU there is
no such queue, and every operator takes at least the time of calling it.
"""

from __future__ import annotations

from collections.abc import Callable, MutableMapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import fx

from galvatron_compile.cluster import ClusterProfile
from galvatron_compile.graph import LayeredGraph
from galvatron_compile.layer_timing import LayerTiming
from galvatron_compile.mesh import Axis
from galvatron_compile.passes.arguments import differentiable_flags, make_arguments
from galvatron_compile.passes.normalise import retarget_devices
from galvatron_compile.passes.sharding import localise
from galvatron_compile.passes.sharding.sharded_layer import ShardedLayer
from galvatron_compile.passes.sharding.table import ShardingTable
from galvatron_compile.passes.tally import ATTENTION, MATMUL, OperatorCount, Tally, tally
from galvatron_compile.passes.tiles import busy_share, num_processors
from galvatron_compile.presets import HOST_BACKWARD
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




@dataclass(frozen=True)
class Execution:
    """How a framework runs a layer, where it is not plain PyTorch.

    fusion: what a compiler or hand-written kernels make of the counts (see passes.fusion).
    exposed: share of the collectives inside layers that products do not hide.
    backward_dispatch: host time of an operator in backward beside one in forward; recompute runs
        forward again.
    """

    fusion: Callable[[Tally], Tally] = lambda found: found
    exposed: float = 1.0
    backward_dispatch: float = HOST_BACKWARD


Tallies = MutableMapping[tuple[int, int, bool], tuple[Tally, Tally]]
"""By class, tensor-parallel degree and sequence parallel: counts at SMALL and at LARGE."""


class Estimator:
    """Counts each form of each class once and evaluates it at any batch size.

    tallies: where counts are kept, before fusion. Estimators of the same model for clusters of one
        kind of device may share them.
    """

    def __init__(
        self,
        layered: LayeredGraph,
        shardings: ShardingTable,
        cluster: ClusterProfile,
        tallies: Tallies | None = None,
        execution: Execution | None = None,
    ) -> None:
        self.layered, self.shardings = layered, shardings
        self.execution = execution or Execution()
        self.cluster = cluster
        self.cuda = cluster.device.kind == "cuda"
        self.processors = num_processors(cluster.device.name) if self.cuda else None
        self.counted: Tallies = {} if tallies is None else tallies
        self.tallies: Tallies = {}

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
        """Forward and backward, without the collectives inside the layer.

        On CUDA with :meth:`collectives_ms` added they take at least the host's time. ProfileError
        for a dtype without a rate.
        """
        small, large = self.tallies_of(class_index, strategy)
        sharded = self.shardings.get(class_index, strategy)
        communication = self.collectives_ms(sharded, local_batch)
        directions = [item.direction for item in sharded.collectives]
        num = directions.count("forward"), directions.count("backward")
        at = _Line(local_batch)
        share = self.execution.backward_dispatch
        return LayerTiming(
            self._phase_ms(small.forward, large.forward, at, communication[0], num[0]),
            self._phase_ms(small.backward, large.backward, at, communication[1], num[1], share),
        )

    def part(
        self, class_index: int, strategy: Strategy, local_batch: float, kind: str
    ) -> LayerTiming:
        """As :meth:`computation`, of operators of one kind ("matmul", "attention", "memory"),
        run without the others and without collectives."""
        small, large = self.tallies_of(class_index, strategy)
        at = _Line(local_batch)

        def only(counts: Sequence[OperatorCount]) -> list[OperatorCount]:
            return [count for count in counts if count.kind == kind]

        return LayerTiming(
            self._phase_ms(only(small.forward), only(large.forward), at),
            self._phase_ms(only(small.backward), only(large.backward), at),
        )

    def repeated_ms(self, class_index: int, strategy: Strategy, local_batch: float) -> float:
        """What selective recompute runs again: all but products and attention that it keeps."""
        small, large = self.tallies_of(class_index, strategy)

        def again(found: Tally) -> list[OperatorCount]:
            return [
                count
                for count in found.forward
                if count.kind == "memory" or any(view[0] in found.dropped for view in count.writes)
            ]

        return self._phase_ms(again(small), again(large), _Line(local_batch))

    def collectives_ms(self, sharded: ShardedLayer, local_batch: float) -> tuple[float, float]:
        """Forward and backward time of the collectives inside a layer."""
        total_ms = {"forward": 0.0, "backward": 0.0}
        for item in sharded.collectives:
            num_bytes = int(item.bytes(local_batch))
            each_ms = self.cluster.group_ms(item.kind, num_bytes, sharded.tp)
            total_ms[item.direction] += self.execution.exposed * each_ms
        return total_ms["forward"], total_ms["backward"]

    def flops_per_sample(self, class_index: int, strategy: Strategy) -> float:
        """Of the forward pass on one rank, matrix products and attention."""
        _, large = self.tallies_of(class_index, strategy)
        return sum(count.flops for count in large.forward) / LARGE

    def tallies_of(self, class_index: int, strategy: Strategy) -> tuple[Tally, Tally]:
        """What the class does in the strategy's form at the two counted batch sizes."""
        key = (class_index, strategy.tp, strategy.sequence_parallel)
        if key not in self.tallies:
            if key not in self.counted:
                self.counted[key] = self._count(class_index, strategy)
            small, large = self.counted[key]
            self.tallies[key] = self.execution.fusion(small), self.execution.fusion(large)
        return self.tallies[key]

    def _count(self, class_index: int, strategy: Strategy) -> tuple[Tally, Tally]:
        graph = localise(
            self.shardings.get(class_index, strategy),
            Axis.dry_run(f"tp{strategy.tp}", strategy.tp),
        )
        retarget_devices(graph, torch.device("cpu"))
        return self._tally(class_index, graph, SMALL), self._tally(class_index, graph, LARGE)

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
            self.cuda,
        )

    def _phase_ms(
        self,
        small: Sequence[OperatorCount],
        large: Sequence[OperatorCount],
        at: _Line,
        communication_ms: float = 0.0,
        num_collectives: int = 0,
        dispatch: float = 1.0,
    ) -> float:
        """Kernels, and what the host takes longer than these and ``communication_ms``."""
        kernels_ms = self._time_ms(small, large, at)
        if not self.cuda:
            return kernels_ms
        dispatched = num_collectives + sum(count.num_bytes > 0 for count in large)
        host_ms = dispatched * dispatch * self.cluster.launch_overhead_ms.value
        return max(kernels_ms, host_ms - communication_ms)

    def _time_ms(
        self, small: Sequence[OperatorCount], large: Sequence[OperatorCount], at: _Line
    ) -> float:
        if len(small) != len(large):  # the model branches on the batch size: scale the larger
            return at.size / LARGE * sum(self.operator_ms(count) for count in large)
        return sum(
            self.operator_ms(_between(a, b, at)) for a, b in zip(small, large, strict=True)
        )

    def operator_ms(self, count: OperatorCount) -> float:
        """Roofline (Williams et al. 2009): the longer of computing and moving.

        A matrix product on a GPU computes whole waves of whole tiles (see passes.tiles).
        """
        if count.kind == MATMUL:
            flops: float = count.flops
            if count.product is not None and self.processors is not None:
                flops /= busy_share(*count.product, self.processors)
            return self.cluster.matmul_ms(flops, count.dtype, count.num_bytes)
        if count.kind == ATTENTION:
            return self.cluster.attention_ms(count.flops, count.dtype, count.num_bytes)
        return self.cluster.memory_ms(count.num_bytes)


@dataclass(frozen=True)
class _Line:
    """The straight line through the values at the two counted batch sizes."""

    size: float

    def __call__(self, small: float, large: float) -> float:
        return max(0.0, small + (large - small) * (self.size - SMALL) / (LARGE - SMALL))


def _between(small: OperatorCount, large: OperatorCount, at: _Line) -> OperatorCount:
    """The operator at another batch size. Only a product's sizes are rounded."""
    product = None
    if small.product is not None and large.product is not None:
        sizes = (max(1, round(at(a, b))) for a, b in zip(small.product, large.product, strict=True))
        product = (next(sizes), next(sizes), next(sizes), next(sizes))
    return replace(
        small,
        flops=round(at(small.flops, large.flops)),
        num_bytes=round(at(small.num_bytes, large.num_bytes)),
        product=product,
    )
