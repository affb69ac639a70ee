"""Graphs of a few operators for the fuse pass, and what must stay as it is in them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn

from galvatron_compile.mesh import Axis
from galvatron_compile.passes.fuse import fuse_graph
from galvatron_compile.passes.fuse_prices import Prices

ALWAYS = Prices(torch.device("cpu"), None, 1, always=True)
F64, F32, BF16 = torch.float64, torch.float32, torch.bfloat16


def exported(function: Callable[..., Any], *inputs: Tensor) -> fx.GraphModule:
    """Without the assertions, as normalised graphs are."""

    class Whole(nn.Module):
        def forward(self, *inputs: Tensor) -> Any:
            return function(*inputs)

    graph = torch.export.export(Whole(), inputs, strict=False).graph_module.graph
    for node in list(graph.nodes):
        if node.target is torch.ops.aten._assert_tensor_metadata.default:
            graph.erase_node(node)
    return fx.GraphModule({}, graph)


def built(function: Callable[[fx.Graph, list[Any]], Any], *inputs: Tensor) -> fx.GraphModule:
    """By hand, for calls that nothing exports. Values of nodes are computed on the way."""
    graph = fx.Graph()
    places = []
    for i, value in enumerate(inputs):
        places.append(graph.placeholder(f"x{i}"))
        places[-1].meta["val"] = value
    graph.output(function(graph, places))
    return fx.GraphModule({"axis": Axis.dry_run("tp2", 2)}, graph)


def call(graph: fx.Graph, target: Any, *args: Any) -> fx.Node:
    node = graph.call_function(target, args)
    node.meta["val"] = target(*fx.map_arg(args, _value))
    return node


def _value(node: fx.Node) -> Any:
    return Axis.dry_run("tp2", 2) if node.op == "get_attr" else node.meta["val"]


def check(module: fx.GraphModule, *inputs: Tensor, rtol: float | None = None) -> list[str]:
    """Names of what was replaced. Values and gradients of the graph stay as they are.

    rtol: of a tensor's largest entry too, for 16 bits: where large numbers cancel, what is left
    has their roundings.
    """
    after, fusions = fuse_graph(module, ALWAYS)
    results = []
    for made in (module, after):
        given = [x.clone().requires_grad_(x.is_floating_point()) for x in inputs]
        found = made(*given)
        outputs = list(found) if isinstance(found, (tuple, list)) else [found]
        scaled = [(y * torch.arange(1, y.numel() + 1).view(y.shape)).sum() for y in outputs]
        wanted = [x for x in given if x.requires_grad]
        grads = torch.autograd.grad(sum(scaled), wanted, allow_unused=True)  # type: ignore[arg-type]
        results.append([*(y.detach() for y in outputs), *grads])
    for found, expected in zip(results[1], results[0], strict=True):
        atol = None if rtol is None else rtol * max(1.0, float(expected.abs().max()))
        torch.testing.assert_close(found, expected, rtol=rtol, atol=atol)
    return [fusion.name for fusion in fusions if fusion.taken]


def r(*shape: int, dtype: torch.dtype = F64) -> Tensor:
    return torch.randn(shape, dtype=dtype)


def norm(x: Tensor, eps: float = 1e-6) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)
