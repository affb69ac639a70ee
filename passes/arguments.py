"""Example arguments for a layer graph, from the shapes it was captured with."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from galvatron_compile.graph import noted


def placeholders(graph: fx.GraphModule) -> list[fx.Node]:
    return list(graph.graph.find_nodes(op="placeholder"))


def concrete_shape(value: torch.Tensor, batch_symbol: Any, batch_size: int) -> tuple[int, ...]:
    """The shape with ``batch_size`` put in for the symbol."""
    return tuple(concrete_size(size, batch_symbol, batch_size) for size in value.shape)


def concrete_size(size: Any, batch_symbol: Any, batch_size: int) -> int:
    if isinstance(size, int):
        return size
    expression = size.node.expr if isinstance(size, torch.SymInt) else size
    return int(expression.subs({batch_symbol: batch_size}))


def make_arguments(
    graph: fx.GraphModule,
    batch_symbol: Any,
    batch_size: int,
    device: torch.device,
) -> list[Any]:
    """One value per placeholder: small random floats, zeros for integers, all-true masks, seed 0.

    Zeros are legal indices and class labels for any model; all-true masks hide nothing.
    """
    made: list[Any] = []
    for node in placeholders(graph):
        value = node.meta.get("val")
        if not isinstance(value, torch.Tensor):
            made.append(0)
            continue
        shape = concrete_shape(value, batch_symbol, batch_size)
        if value.dtype.is_floating_point:
            made.append(torch.randn(shape, dtype=value.dtype, device=device) * 0.02 + 0.01)
        elif value.dtype is torch.bool:
            made.append(torch.ones(shape, dtype=torch.bool, device=device))
        else:
            made.append(torch.zeros(shape, dtype=value.dtype, device=device))
    return made


def differentiable_flags(graph: fx.GraphModule, kinds: tuple[str, ...]) -> list[bool]:
    """Per placeholder (kinds, then the seed): whether the layer's backward gives it a gradient."""
    flags = []
    for node, kind in zip(placeholders(graph), (*kinds, "seed"), strict=True):
        is_float = (
            isinstance(node.meta.get("val"), torch.Tensor)
            and node.meta["val"].dtype.is_floating_point
        )
        wanted = kind == "parameter" or bool(noted(node, "differentiable", False))
        flags.append(is_float and wanted and kind in ("activation", "parameter"))
    return flags
