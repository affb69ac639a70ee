"""FLOPs, bytes and time of every node, written on the class graphs for people to read."""

from __future__ import annotations

from dataclasses import dataclass

from galvatron_compile.graph import LayeredGraph, note
from galvatron_compile.passes.layer_estimate import LARGE, Estimator
from galvatron_compile.passes.tally import OperatorCount
from galvatron_compile.strategy import Strategy


@dataclass(frozen=True)
class NodeCost:
    """What a node's forward does for one sample on one rank; ``time_us`` is the roofline's."""

    flops: float
    num_bytes: float
    time_us: float

    def __str__(self) -> str:
        flops = f"{_scaled(self.flops)}FLOP, " if self.flops else ""
        return f"{flops}{_scaled(self.num_bytes)}B, {self.time_us:.3g} µs a sample"


def note_costs(layered: LayeredGraph, estimator: Estimator, strategies: list[Strategy]) -> None:
    """Note ``cost`` on every node that does work, in the first form that each class has.

    With tp 1 among the strategies that is the whole layer; else one rank's part of it.
    """
    for class_index, layer_class in enumerate(layered.classes):
        legal = [s for s in strategies if estimator.shardings.why_not(class_index, s) is None]
        if not legal:
            continue
        _, counted = estimator.tallies_of(class_index, min(legal, key=lambda s: s.tp))
        for node in layer_class.graph.graph.nodes:
            cost = _sum([_per_sample(c, estimator) for c in counted.by_node.get(node.name, ())])
            if cost.num_bytes:
                note(node, cost=cost)


def _per_sample(count: OperatorCount, estimator: Estimator) -> NodeCost:
    """The count over its samples: what does not grow with the batch is shared by them."""
    time_ms = estimator.operator_ms(count)
    return NodeCost(count.flops / LARGE, count.num_bytes / LARGE, time_ms * 1e3 / LARGE)


def _sum(costs: list[NodeCost]) -> NodeCost:
    return NodeCost(
        sum(cost.flops for cost in costs),
        sum(cost.num_bytes for cost in costs),
        sum(cost.time_us for cost in costs),
    )


def _scaled(number: float) -> str:
    for factor, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= factor:
            return f"{number / factor:.3g} {prefix}"
    return f"{number:.3g} "
