"""The answer of the assignment: how one layer class lies on the ranks of a tensor axis."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from torch import fx

from galvatron_compile.graph import LayerClass
from galvatron_compile.placement import Placement

if TYPE_CHECKING:
    from galvatron_compile.passes.sharding.rules import Rule

CollectiveKind = Literal["all_reduce", "all_gather", "reduce_scatter", "all_to_all"]


@dataclass(frozen=True, slots=True)
class Collective:
    """One collective that a layer does over its tensor axis, for every micro-batch.

    A batch of b samples moves ``bytes_per_sample * b + constant_bytes``: the size of the whole
    tensor as one rank sees it (of what an all-reduce sums, of the gathered result of an
    all-gather, of the input of a reduce-scatter, of a rank's own shard for an all-to-all).
    ``value`` is the node whose value or gradient it moves.
    """

    kind: CollectiveKind
    direction: Literal["forward", "backward"]
    bytes_per_sample: float
    constant_bytes: float
    value: str

    def bytes(self, batch_size: float) -> float:
        return self.bytes_per_sample * batch_size + self.constant_bytes

    def __str__(self) -> str:
        parts = [f"{self.bytes_per_sample:.0f} B/sample"] if self.bytes_per_sample else []
        parts += [f"{self.constant_bytes:.0f} B"] if self.constant_bytes else []
        return f"{self.direction} {self.kind} of {self.value}: {' + '.join(parts) or '0 B'}"


@dataclass(frozen=True)
class ShardedLayer:
    """A layer class with a rule for every node on a tensor axis of ``tp`` ranks.

    inputs, parameters, outputs: placements, in the order of the class's activations, parameters
        and outputs. A parameter that is V is kept whole on every rank and gets a partial sum of
        its gradient: the runtime all-reduces it over the tensor axis, once a step.
    collectives: what the layer does for every micro-batch; that deferred sum is not among them.
    rules: the rule of every call node that makes tensors, by node name.
    placements: of every output of every node that makes tensors (placeholders included), by name.
    remarks: what a person should know, such as work that is repeated on every rank.
    objective: the assignment's price, comparable only between solutions of the same class.
    """

    layer_class: LayerClass
    tp: int
    sequence_parallel: bool
    inputs: tuple[Placement, ...]
    outputs: tuple[Placement, ...]
    parameters: tuple[Placement, ...]
    collectives: tuple[Collective, ...]
    remarks: tuple[str, ...] = ()
    rules: Mapping[str, Rule] = field(default_factory=dict, repr=False)
    placements: Mapping[str, tuple[Placement, ...]] = field(default_factory=dict, repr=False)
    objective: float = 0.0

    def __str__(self) -> str:
        degree = f"tp{self.tp}" + (".sp" if self.sequence_parallel else "")
        placeholders = self.layer_class.graph.graph.find_nodes(op="placeholder")
        names = [
            node.name
            for node, kind in zip(placeholders, self.layer_class.kinds, strict=True)
            if kind == "parameter"
        ]
        lines = [
            f"{self.layer_class.name} on {degree}:"
            f" ({', '.join(map(str, self.inputs))}) -> ({', '.join(map(str, self.outputs))})"
        ]
        width = max(map(len, names), default=0)
        for name, placement in zip(names, self.parameters, strict=True):
            node = next(n for n in placeholders if n.name == name)
            lines.append(f"  {name:{width}}  {_shape(node)}  {placement}")
        lines += [f"  {collective}" for collective in self.collectives]
        lines += [f"  remark: {remark}" for remark in self.remarks]
        return "\n".join(lines)


def _shape(node: fx.Node) -> str:
    return "x".join(str(size) for size in getattr(node.meta.get("val"), "shape", ()))
