"""Local shapes: ``meta["val"]`` of every node, by running the graph on fake tensors."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from galvatron_compile.mesh import Axis
from galvatron_compile.placement import Placement
from galvatron_compile.torch_private import fake_mode_of


def local_value(value: Any, placement: Placement, size: int) -> Any:
    """A fake tensor of the shape that one of ``size`` ranks holds."""
    if not isinstance(value, torch.Tensor) or not placement.is_shard or size == 1:
        return value
    shape = list(value.shape)
    shape[placement.dim] = shape[placement.dim] // size
    with torch.no_grad():
        return value.new_empty(shape)


def whole_value(value: Any, placement: Placement, size: int) -> Any:
    """A fake tensor of the shape of the whole batch, gathered from ``size`` ranks' shares."""
    if not isinstance(value, torch.Tensor) or placement.is_shard:
        return value
    shape = [entry * size if isinstance(entry, torch.SymInt) else entry for entry in value.shape]
    with torch.no_grad():
        return value.new_empty(shape)


def propagate(module: fx.GraphModule) -> None:
    """Fill in ``meta["val"]`` from the placeholders' values on; collectives move nothing."""
    values = [node.meta.get("val") for node in module.graph.find_nodes(op="placeholder")]
    with torch.no_grad(), fake_mode_of(next((v for v in values if hasattr(v, "fake_mode")), None)):
        _Propagation(module).run(*values)


class _Propagation(fx.Interpreter):
    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if isinstance(result, Axis):
            return result if result.size == 1 else _dry(result)
        if n.op not in ("placeholder", "output"):
            n.meta["val"] = result
        return result


def _dry(axis: Axis) -> Axis:
    return Axis.dry_run(axis.name, axis.size, axis.index)
