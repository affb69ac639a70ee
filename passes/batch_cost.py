"""What it costs, in arbitrary units, to give an operator its inputs as a rule wants them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import fx

from galvatron_compile.graph import noted
from galvatron_compile.passes.denominators import Denominators
from galvatron_compile.passes.sharding.rules import Rule
from galvatron_compile.passes.sharding.views import quotient, shape_of
from galvatron_compile.placement import P, Placement, R, V

IMPOSSIBLE = float("inf")


@dataclass(frozen=True)
class ConversionCosts:
    """Of placements on the data axis. symbol: the batch size.

    Free is what changes no number; dividing by the number of parts and summing over them are
    cheap; gathering the batch is the last resort, and only where ``may_gather``.
    """

    symbol: Any
    denominators: Denominators

    def is_whole(self, node: fx.Node, placement: Placement) -> bool:
        """Not sharded although it has a dim of the batch's size: gathered from all ranks."""
        value = node.meta["val"]
        first = value[0] if isinstance(value, list | tuple) else value
        sized = any(quotient(size, self.symbol) is not None for size in shape_of(first))
        return sized and not placement.is_shard

    def of_rule(
        self,
        node: fx.Node,
        rule: Rule,
        inputs: list[fx.Node],
        placed: list[Placement],
        may_gather: bool,
    ) -> float:
        """Of all conversions of a rule's inputs; infinite where one of them is not possible."""
        total = 0.0
        for value, source, target in zip(inputs, placed, rule.inputs, strict=True):
            total += self.of_value(value, source, target, may_gather)
        made_whole = self.is_whole(node, rule.outputs[0]) if rule.outputs else False
        if made_whole and not any(map(self.is_whole, inputs, rule.inputs)):
            return IMPOSSIBLE  # its size is the rank's share, yet it would claim to be the whole
        return total

    def of_value(
        self, value: fx.Node, source: Placement, target: Placement, may_gather: bool
    ) -> float:
        if source == target or {source, target} == {R, V}:
            return 0
        tensor = value.meta["val"]
        if not hasattr(tensor, "dtype"):
            return IMPOSSIBLE
        if source in (R, V) and target == P:
            return 1 if tensor.dtype.is_floating_point else IMPOSSIBLE
        if source == P and target in (R, V):
            return 5 if self.denominators.can_sum(value) else IMPOSSIBLE
        if noted(value, "batch_index"):
            return IMPOSSIBLE
        if source.is_shard and target in (R, V):
            return 100 if may_gather else IMPOSSIBLE
        if source in (R, V) and target.is_shard and self.is_whole(value, source):
            return 10
        return IMPOSSIBLE
