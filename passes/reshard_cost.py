"""Time of changing layout between neighbouring layers, for every pair of strategies."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from galvatron_compile.cluster import ClusterProfile
from galvatron_compile.collectives import conversion
from galvatron_compile.graph import LayeredGraph
from galvatron_compile.passes.arguments import concrete_shape, placeholders
from galvatron_compile.passes.reshard import Layout, Step, steps
from galvatron_compile.passes.sharding.table import ShardingTable
from galvatron_compile.placement import Placement, R
from galvatron_compile.strategy import Strategy

if TYPE_CHECKING:
    from galvatron_compile.passes.layer_costs import Workload


def resharding_ms(
    layered: LayeredGraph,
    shardings: ShardingTable,
    cluster: ClusterProfile,
    strategies: Sequence[Strategy],
    workload: Workload,
) -> dict[tuple[int, Strategy, Strategy, int], float]:
    """(cut after layer i, its strategy, the next layer's, micro-batches) → forward + backward ms.

    Only pairs that cost something are listed. A value that an earlier layer made is priced as if
    layer i had: exact where layouts change once on its way, an overestimate elsewhere.
    """
    priced: dict[tuple[int, Strategy, Strategy, int], float] = {}
    switches = Switches(layered, shardings, cluster)
    for cut in range(len(layered.layers) - 1):
        before, after = layered.layers[cut], layered.layers[cut + 1]
        for source in strategies:
            for target in strategies:
                forms = (before.class_index, source), (after.class_index, target)
                if _is_same(source, target) or any(shardings.why_not(*f) for f in forms):
                    continue
                for count in workload.micro_batch_counts:
                    batch = workload.global_batch_size // count
                    time_ms = switches.ms(cut, source, target, batch, workload.world_size)
                    if time_ms > 0:
                        priced[cut, source, target, count] = time_ms
    return priced


def _is_same(source: Strategy, target: Strategy) -> bool:
    return layout_of(source) == layout_of(target)


def layout_of(strategy: Strategy) -> tuple[int, bool, int, int]:
    """What decides where the parts of an activation lie, given the ranks of a stage."""
    return *strategy.form, strategy.ulysses, strategy.cp


@dataclass(frozen=True)
class _Crossing:
    """A value that a layer takes: its place among the inputs, and its size by the batch's."""

    place: int
    name: str
    bytes_per_sample: float
    constant_bytes: float
    is_float: bool
    data: Placement

    @staticmethod
    def of(
        place: int, name: str, value: torch.Tensor, data: Placement, symbol: object
    ) -> _Crossing:
        small, large = (
            torch.Size(concrete_shape(value, symbol, size)).numel() * value.dtype.itemsize
            for size in (2, 4)
        )
        slope = (large - small) / 2
        return _Crossing(
            place, name, slope, small - 2 * slope, value.dtype.is_floating_point, data
        )

    def bytes(self, batch: int) -> float:
        return self.bytes_per_sample * batch + self.constant_bytes


class Switches:
    """Time of crossing from one layer to the next, forward + backward, one micro-batch."""

    def __init__(
        self, layered: LayeredGraph, shardings: ShardingTable, cluster: ClusterProfile
    ) -> None:
        self.layered, self.shardings, self.cluster = layered, shardings, cluster
        self._known: dict[Hashable, float] = {}
        self._crossed: dict[tuple[int, int], tuple[_Crossing, ...]] = {}

    def ms(
        self, cut: int, source: Strategy, target: Strategy, batch: int, world_size: int
    ) -> float:
        """``batch`` samples over the ``world_size`` ranks of a stage, after layer ``cut``."""
        if _is_same(source, target):
            return 0.0
        classes = [self.layered.layers[i].class_index for i in (cut, cut + 1)]
        key = (*classes, layout_of(source), layout_of(target), batch, world_size)
        if key not in self._known:
            self._known[key] = self._ms(cut, source, target, batch, world_size)
        return self._known[key]

    def _ms(
        self, cut: int, source: Strategy, target: Strategy, batch: int, world_size: int
    ) -> float:
        before, after = self.layered.layers[cut], self.layered.layers[cut + 1]
        placed = self.shardings.get(before.class_index, source).outputs
        made = dict(zip(before.outputs, placed, strict=True))
        wanted = self.shardings.get(after.class_index, target).inputs
        pieces = [s.ulysses * s.cp for s in (source, target)]
        total_ms = 0.0
        for crossing in self._crossings(cut):
            whole, data = int(crossing.bytes(batch)), crossing.data
            tensor = wanted[crossing.place]
            layouts = Layout(source.tp, made.get(crossing.name, R), data), Layout(
                target.tp, tensor, data
            )
            for step in steps(*layouts):
                total_ms += self._step_ms(step, whole, data, world_size, crossing.is_float)
            if pieces[0] != pieces[1] and data.is_shard:
                # Parts of a sequence become whole samples or the other way: an exchange among the
                # data ranks, of what each holds.
                ranks = max(source.data_ranks, target.data_ranks)
                share = whole / min(source.data_ranks, target.data_ranks)
                exchange_ms = self.cluster.group_ms(
                    "all_to_all", share, ranks, min(source.tp, target.tp)
                )
                total_ms += (1 + crossing.is_float) * exchange_ms
        return total_ms

    def _crossings(self, cut: int) -> tuple[_Crossing, ...]:
        """What layer ``cut + 1`` takes from layers in front of it."""
        layers = self.layered.layers
        pair = layers[cut].class_index, layers[cut + 1].class_index
        if pair not in self._crossed:
            after = layers[cut + 1]
            found = self.layered.layer_class(after)
            self._crossed[pair] = tuple(
                _Crossing.of(place, name, node.meta["val"], data, self.layered.graph.batch_symbol)
                for place, (name, node, data) in enumerate(
                    zip(after.inputs, placeholders(found.graph), found.data_inputs, strict=False)
                )
                if isinstance(node.meta.get("val"), torch.Tensor)
                and name not in self.layered.graph.inputs.names
            )
        return self._crossed[pair]

    def _step_ms(
        self, step: Step, whole_bytes: int, data: Placement, world_size: int, is_float: bool
    ) -> float:
        """``whole_bytes``: the value over all ranks; a rank's block of the batch is 1/dp of it."""
        small, large = step.axis
        size, stride = (small, 1) if small == large else (large // small, small)
        block = whole_bytes // (world_size // large) if data.is_shard else whole_bytes
        found = conversion(step.source, step.target)
        if found is None or size == 1:
            return 0.0
        kinds = [found.forward, *([found.backward] if is_float else [])]
        moving = [kind for kind in kinds if kind not in ("none", "local")]
        return sum(self.cluster.group_ms(kind, block, size, stride) for kind in moving)
