"""Time of what a layer sends in every micro-batch: inside its tensor group, along its sequence, to
experts, and to the neighbouring pipeline stages.

Ranks of a pipeline stage are numbered so that tensor-parallel peers are neighbours, then Ulysses,
then context-parallel peers, then data-parallel ones; groups are priced by their size and stride.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from galvatron_compile.cluster import ClusterProfile
from galvatron_compile.graph import LayeredGraph
from galvatron_compile.passes.arguments import concrete_shape, placeholders
from galvatron_compile.passes.class_facts import ClassFacts
from galvatron_compile.passes.layer_estimate import Estimator
from galvatron_compile.passes.pricing import overlapped_ms
from galvatron_compile.passes.sharding.sharded_layer import ShardedLayer
from galvatron_compile.passes.tally import ATTENTION
from galvatron_compile.placement import Placement
from galvatron_compile.strategy import Strategy


class Messages:
    """Forward and backward ms of each kind of message. ``local``: samples on one rank, which need
    not be whole (half of a sequence is half a sample)."""

    def __init__(
        self, layered: LayeredGraph, cluster: ClusterProfile, estimator: Estimator
    ) -> None:
        self.layered, self.cluster, self.estimator = layered, cluster, estimator
        symbol = layered.graph.batch_symbol
        self.facts = tuple(ClassFacts.of(found, symbol) for found in layered.classes)
        self._carried: dict[tuple[int, int, bool], tuple[float, float]] = {}

    def tensor(self, sharded: ShardedLayer, local: float) -> tuple[float, float, float]:
        """The collectives inside the layer; and those of forward whose results selective recompute
        does not keep: gathered inputs of products (reduced results are kept)."""
        gathers = tuple(
            item
            for item in sharded.collectives
            if (item.kind, item.direction) == ("all_gather", "forward")
        )
        forward_ms, backward_ms = self.estimator.collectives_ms(sharded, local)
        again_ms, _ = self.estimator.collectives_ms(replace(sharded, collectives=gathers), local)
        return forward_ms, backward_ms, again_ms

    def context(
        self, class_index: int, strategy: Strategy, local: float
    ) -> tuple[float, float, float]:
        """Forward and backward ms that dividing the sequence costs attention, and what of forward
        selective recompute runs again: the exchange of queries, keys and values.

        Ulysses: an all-to-all for each of queries, keys, values and the result, in both directions
        (arXiv 2309.14509, section 3.2). Ring: keys and values travel cp - 1 times forward, they and
        their gradients backward, beside the attention of the block at hand (arXiv 2310.01889).
        """
        forward_ms = backward_ms = again_ms = 0.0
        for found in self.facts[class_index].attentions:
            moved = local / strategy.tp
            if strategy.ulysses > 1:
                query_ms, key_ms = (
                    self.cluster.group_ms(
                        "all_to_all", num_bytes * moved, strategy.ulysses, strategy.tp
                    )
                    for num_bytes in (found.query_bytes, found.key_value_bytes / 2)
                )
                forward_ms += 2 * query_ms + 2 * key_ms
                backward_ms += 2 * query_ms + 2 * key_ms
                again_ms += query_ms + 2 * key_ms
            if strategy.cp > 1:
                hop_ms = self._hop_ms(found.key_value_bytes * moved, strategy)
                attention = self.estimator.part(class_index, strategy, local, ATTENTION)
                ring_ms = (strategy.cp - 1) * hop_ms
                forward_ms += self._beside(ring_ms, attention.forward_ms)
                backward_ms += self._beside(2 * ring_ms, attention.backward_ms)
        return forward_ms, backward_ms, again_ms

    def _hop_ms(self, num_bytes: float, strategy: Strategy) -> float:
        """To the next rank of the ring; its slowest link counts."""
        stride = strategy.tp * strategy.ulysses
        crosses = stride * strategy.cp > self.cluster.ranks_per_node
        apart = max(stride, self.cluster.ranks_per_node) if crosses else stride
        return self.cluster.group_ms("p2p", num_bytes, 2, apart)

    def _beside(self, communication_ms: float, compute_ms: float) -> float:
        together_ms = overlapped_ms(communication_ms, compute_ms, self.cluster.overlap_slowdown)
        return together_ms - compute_ms

    def experts(self, class_index: int, strategy: Strategy, local: float) -> float:
        """All-to-all of tokens to their experts and back (GShard, arXiv 2006.16668)."""
        experts = self.facts[class_index].experts
        if experts is None or strategy.ep == 1:
            return 0.0
        share = local / (strategy.tp if strategy.sequence_parallel else 1)
        return sum(
            self.cluster.group_ms("all_to_all", num_bytes * share, strategy.ep, strategy.tp)
            for num_bytes in (experts.sent_bytes, experts.returned_bytes)
        )

    def stages(
        self, class_index: int, sharded: ShardedLayer, local: float, stage_ranks: int, pp: int
    ) -> tuple[float, float]:
        """Outputs to the next of ``pp`` stages of ``stage_ranks`` each, gradients of inputs back.

        Only what is differentiable travels: masks and positions are made again where they are used.
        """
        if pp == 1:
            return 0.0, 0.0
        apart = stage_ranks
        if stage_ranks * pp > self.cluster.ranks_per_node:
            apart = max(apart, self.cluster.ranks_per_node)  # some cut lies between nodes
        sent, returned = self.bytes_carried(class_index, sharded)
        return (
            self.cluster.group_ms("p2p", sent * local, 2, apart),
            self.cluster.group_ms("p2p", returned * local, 2, apart),
        )

    def bytes_carried(self, class_index: int, sharded: ShardedLayer) -> tuple[float, float]:
        """Bytes of outputs and of inputs of one sample on one rank."""
        key = (class_index, sharded.tp, sharded.sequence_parallel)
        if key not in self._carried:
            graph = self.layered.classes[class_index].graph
            outputs: list[Any] = list(graph.graph.output_node().args[0])  # type: ignore[arg-type]
            inputs = placeholders(graph)[: len(sharded.inputs)]
            self._carried[key] = (
                self._bytes(outputs, sharded.outputs, sharded.tp),
                self._bytes(inputs, sharded.inputs, sharded.tp),
            )
        return self._carried[key]

    def _bytes(
        self, nodes: Sequence[fx.Node], placements: Sequence[Placement], tp: int
    ) -> float:
        symbol = self.layered.graph.batch_symbol
        total = 0.0
        for node, placement in zip(nodes, placements, strict=True):
            value = node.meta.get("val")
            if isinstance(value, torch.Tensor) and value.dtype.is_floating_point:
                slope = (_numel(value, symbol, 4) - _numel(value, symbol, 2)) / 2
                total += slope * value.dtype.itemsize / (tp if placement.is_shard else 1)
        return total


def _numel(value: Any, symbol: Any, batch_size: int) -> int:
    numel = 1
    for size in concrete_shape(value, symbol, batch_size):
        numel *= size
    return numel
