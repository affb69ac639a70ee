"""What the assignment minimises: a surrogate of time, in units of one typical activation.

The sizes of a class are all that is known here, no hardware: one *unit* is the time to send the
median input of the class's matrix products around the ring once. The order of the prices does the
work. Repeating a product on every rank, or keeping its weight whole, costs far more than any
communication (`SPLIT_PRICE` for the whole class, in proportion to flops and to bytes), so a class
comes out as Megatron's whether it is 64 or 16,384 wide; then bytes on the wire; then a latency for
each collective, without which equal-cost plans with more collectives are found; then tie-breaks.
Ring volumes: an all-reduce sends 2 (n - 1) / n of the tensor per rank, an all-gather, a
reduce-scatter half of that, an all-to-all (n - 1) / n of a shard.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import sympy
import torch
from torch import fx

from galvatron_compile.graph import LayerClass
from galvatron_compile.placement import Placement
from galvatron_compile.torch_private import size_expression

if TYPE_CHECKING:
    from galvatron_compile.collectives import Conversion
    from galvatron_compile.passes.sharding.rules import Rule

SPLIT_PRICE = 300.0  # units, for all products of a class and once more for all their weights
LATENCY = 0.1  # units per collective
ELEMENTWISE = 0.01  # units for one unit of bytes that every rank writes
# The same under sequence parallel, whose purpose is that no rank keeps whole activations: without
# it a residual stream kept whole wins, which moves as many bytes with fewer collectives.
ELEMENTWISE_SEQUENCE = 0.5
LOCAL = 2e-3  # units per conversion, so that none is inserted for nothing
DEFERRED = 1e-3  # units per unit of bytes, for a gradient summed once a step
TIE = {"R": 0.0, "S": 1e-4, "V": 2e-4, "P": 4e-4}
TIE_STEP = 1e-5  # times the rule's place among the node's candidates
NOMINAL_BATCH = 4  # samples; the answer must not depend on the batch, only the ratios do, a little

_aten = torch.ops.aten
_PRODUCTS = {
    _aten.linear.default,
    _aten.addmm.default,
    _aten.mm.default,
    _aten.bmm.default,
    _aten.matmul.default,
    _aten.einsum.default,
    _aten.baddbmm.default,
    _aten.scaled_dot_product_attention.default,
}
_TABLES = {_aten.embedding.default}


def size_at(size: int | torch.SymInt, batch: int) -> int:
    """A size that may contain the batch symbol, at a batch of that many samples."""
    if isinstance(size, int):
        return size
    expression = sympy.sympify(size_expression(size))
    return int(expression.subs(dict.fromkeys(expression.free_symbols, batch)))


def numel_at(value: Any, batch: int) -> int:
    return math.prod(size_at(size, batch) for size in value.shape)


def bytes_at(value: Any, batch: int) -> int:
    """Of a tensor; 0 for anything else."""
    if not isinstance(value, torch.Tensor):
        return 0
    return numel_at(value, batch) * int(value.dtype.itemsize)


def linear_bytes(value: Any) -> tuple[float, float]:
    """(bytes per sample, constant bytes) of a tensor whose shape has the batch symbol or not."""
    two = bytes_at(value, 2)
    per_sample = bytes_at(value, 3) - two
    return float(per_sample), float(two - 2 * per_sample)


def output_values(node: fx.Node) -> tuple[Any, ...]:
    """What a node makes, from its metadata; () if there is no tensor among it."""
    value = node.meta.get("val")
    values = tuple(value) if isinstance(value, list | tuple) else (value,)
    return values if any(isinstance(item, torch.Tensor) for item in values) else ()


def ring_volume(kind: str, size: int) -> float:
    """What a rank sends, as a fraction of the bytes of the whole tensor."""
    share = (size - 1) / size
    return {
        "none": 0.0,
        "local": 0.0,
        "all_reduce": 2 * share,
        "all_gather": share,
        "reduce_scatter": share,
        "all_to_all": share / size,
    }[kind]


@dataclass(frozen=True)
class Prices:
    """Prices in units for one class on an axis of ``size`` ranks."""

    layer_class: LayerClass
    size: int
    sequence_parallel: bool
    inputs: dict[fx.Node, tuple[fx.Node, ...]] = field(repr=False)  # tensor inputs of every node

    @cached_property
    def flops(self) -> dict[fx.Node, float]:
        return {
            node: _flops(node, self.inputs[node])
            for node in self.layer_class.graph.graph.nodes
            if node.target in _PRODUCTS
        }

    @cached_property
    def weights(self) -> dict[fx.Node, int]:
        """Bytes of every parameter that a product or a table lookup uses, through views or not."""
        placeholders = self.layer_class.graph.graph.find_nodes(op="placeholder")
        kinds = dict(zip(placeholders, self.layer_class.kinds, strict=True))
        found: dict[fx.Node, int] = {}
        for node in self.layer_class.graph.graph.nodes:
            if node.target in _PRODUCTS | _TABLES:
                for operand in self.inputs[node]:
                    while len(inputs := self.inputs.get(operand, ())) == 1:
                        operand = inputs[0]
                    value = operand.meta["val"]
                    if kinds.get(operand) == "parameter" and value.dim() >= 2:
                        found[operand] = bytes_at(value, NOMINAL_BATCH)
        return found

    @cached_property
    def unit_bytes(self) -> float:
        sizes = sorted(
            bytes_at(self.inputs[node][0].meta["val"], NOMINAL_BATCH) for node in self.flops
        )
        if not sizes:
            nodes = self.layer_class.graph.graph.nodes
            values = [value for node in nodes for value in output_values(node)]
            sizes = [max((bytes_at(value, NOMINAL_BATCH) for value in values), default=1)]
        return float(max(1, sizes[len(sizes) // 2]))

    def conversion(self, value: Any, found: Conversion, differentiable: bool) -> float:
        kinds = [found.forward, found.backward] if differentiable else [found.forward]
        moved = sum(ring_volume(kind, self.size) for kind in kinds)
        calls = sum(ring_volume(kind, self.size) > 0 for kind in kinds)
        return self._units(value) * moved + LATENCY * calls + LOCAL

    def rule(self, node: fx.Node, rule: Rule, rank: int) -> float:
        """``rank`` is the rule's place among the node's candidates, the last tie-break."""
        split = any(placement.is_shard for placement in (*rule.inputs, *rule.outputs))
        share = 1 / self.size if split else 1.0
        price = TIE_STEP * rank + sum(_tie(placement) for placement in rule.outputs)
        if node in self.flops:
            total = sum(self.flops.values()) or 1.0
            return price + SPLIT_PRICE * share * self.flops[node] / total
        each = ELEMENTWISE_SEQUENCE if self.sequence_parallel else ELEMENTWISE
        return price + each * share * sum(map(self._units, output_values(node)))

    def parameter(self, node: fx.Node, placement: Placement) -> float:
        price = _tie(placement)
        if placement.kind == "V":
            price += DEFERRED * self._units(node.meta["val"])
        if node in self.weights:
            share = 1 / self.size if placement.is_shard else 1.0
            price += SPLIT_PRICE * share * self.weights[node] / sum(self.weights.values())
        return price

    def _units(self, value: Any) -> float:
        return bytes_at(value, NOMINAL_BATCH) / self.unit_bytes


def _tie(placement: Placement) -> float:
    symbolic = not isinstance(placement.outer, int)
    return TIE[placement.kind] + (1e-3 if symbolic else 0.0)


def _flops(node: fx.Node, inputs: tuple[fx.Node, ...]) -> float:
    """Multiply-adds times two of a product; only their ratios within a class matter."""
    value = output_values(node)[0]
    numel = float(numel_at(value, NOMINAL_BATCH))
    first = inputs[0].meta["val"]
    if node.target is _aten.scaled_dot_product_attention.default:
        keys = inputs[1].meta["val"]
        return 4.0 * numel * size_at(keys.shape[-2], NOMINAL_BATCH)
    if node.target is _aten.einsum.default:
        return 2.0 * _einsum_points(str(node.args[0]), inputs)
    if node.target in (_aten.addmm.default, _aten.baddbmm.default):
        first = inputs[1].meta["val"]
    return 2.0 * numel * size_at(first.shape[-1], NOMINAL_BATCH)


def _einsum_points(equation: str, inputs: tuple[fx.Node, ...]) -> float:
    """Size of the index space of an einsum; an ellipsis counts as the dims it stands for."""
    sizes: dict[str, int] = {}
    terms = equation.replace(" ", "").split("->")[0].split(",")
    for term, operand in zip(terms, inputs, strict=True):
        shape = [size_at(size, NOMINAL_BATCH) for size in operand.meta["val"].shape]
        rest = len(shape) - len(term.replace("...", ""))
        letters = term.replace("...", "".join(chr(0x100 + i) for i in range(rest)))
        sizes.update(zip(letters, shape, strict=True))
    return float(math.prod(sizes.values()))
