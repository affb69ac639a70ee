"""Change of layout between layers that run with different degrees.

A value between layers has a layout: the tensor-parallel degree ``tp`` of the layer that made it
(which fixes how the ranks split into data × tensor), its placement on that tensor axis, and its
placement on the data axis. Going from one tp to another, the ranks of the *merge* axis change
their role from data to tensor or back, and the ordinary conversions along that axis do the rest:
merging batch shards is an all-gather S → R whose gradient is a slice, and so on.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import fx

from galvatron_compile.collectives import conversion
from galvatron_compile.errors import UnsupportedError
from galvatron_compile.graph import note
from galvatron_compile.mesh import Axis, Mesh
from galvatron_compile.placement import Placement, R


@dataclass(frozen=True)
class Layout:
    """tp: tensor degree; tensor, data: placement on the tensor axis and on the data axis."""

    tp: int
    tensor: Placement
    data: Placement

    def __str__(self) -> str:
        return f"tp{self.tp}:{self.tensor} data:{self.data}"


@dataclass(frozen=True)
class Step:
    """One conversion: along which axis, named by the degrees it lies between, and what."""

    axis: tuple[int, int]  # (tp, tp): the tensor axis; (small, large): the merge axis
    source: Placement
    target: Placement


def steps(source: Layout, target: Layout) -> list[Step]:
    """The conversions, in order, that bring a value from one layout to another.

    A sequence-sharded value is gathered before the degree changes and sliced after it; degrees of
    which neither divides the other are bridged by their least common multiple.
    """
    if source == target:
        return []
    if source.tp == target.tp:
        return [Step((source.tp, source.tp), source.tensor, target.tensor)]
    taken = []
    if source.tensor != R:
        taken.append(Step((source.tp, source.tp), source.tensor, R))
    bridge = math.lcm(source.tp, target.tp)
    if bridge != source.tp and source.data != R:
        taken.append(Step((source.tp, bridge), source.data, R))
    if bridge != target.tp and target.data != R:
        taken.append(Step((target.tp, bridge), R, target.data))
    if target.tensor != R:
        taken.append(Step((target.tp, target.tp), R, target.tensor))
    return taken


class Resharder:
    """Inserts conversions into an outer graph, each once per (value, layout)."""

    def __init__(self, graph: fx.Graph, root: torch.nn.Module, mesh: Mesh) -> None:
        self.graph, self.root, self.mesh = graph, root, mesh
        self.done: dict[tuple[fx.Node, Layout], fx.Node] = {}
        self.axes: dict[str, fx.Node] = {}

    def convert(self, value: fx.Node, source: Layout, target: Layout) -> fx.Node:
        key = (value, target)
        if key not in self.done:
            node = value
            for step in steps(source, target):
                node = self._insert(node, step)
            if node is not value:
                node.meta["val"] = value.meta.get("val")
            self.done[key] = node
        return self.done[key]

    def _insert(self, value: fx.Node, step: Step) -> fx.Node:
        small, large = step.axis
        axis = self.mesh.tensor(small) if small == large else self.mesh.merge(small, large)
        found = conversion(step.source, step.target)
        if found is None:
            raise UnsupportedError(
                f"cannot change {value.name} from {step.source} to {step.target} along {axis}; "
                "give the layers on both sides of it the same strategy"
            )
        node = self.graph.call_function(
            found.function, (value, *found.arguments, self._axis(axis))
        )
        note(node, reshard=f"{step.source}→{step.target} along {axis}")
        return node

    def _axis(self, axis: Axis) -> fx.Node:
        if axis.name not in self.axes:
            setattr(self.root, f"axis_{axis.name}", axis)
            # The axis is a plain object, so it must stand before its first use in the graph.
            self.axes[axis.name] = self.graph.create_node("get_attr", f"axis_{axis.name}")
        return self.axes[axis.name]
