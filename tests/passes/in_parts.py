"""Run what the batch pass returns in parts, and compare with the whole batch in eager mode.

Parts run in lockstep in one process; what the pass wants gathered over the data axis is gathered
by ``torch.cat``, whose gradient is the reduce-scatter that the runtime would do.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx, nn
from torch.overrides import TorchFunctionMode

from galvatron_compile.graph import Graph, noted
from galvatron_compile.passes.batch import batch
from galvatron_compile.passes.capture import capture
from galvatron_compile.passes.sharding.rules import tensor_inputs
from galvatron_compile.placement import Placement

SIZES = ((1, 3), (2, 1, 3))


class Promote(TorchFunctionMode):
    """Casts to float32 that a model hard-codes become casts to float64."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        def wide(value: Any) -> Any:
            return torch.float64 if value is torch.float32 else value

        func = torch.Tensor.double if func is torch.Tensor.float else func
        return func(*map(wide, args), **{k: wide(v) for k, v in (kwargs or {}).items()})


def total_loss(graph: Graph, inputs: Sequence[torch.Tensor], sizes: Sequence[int]) -> torch.Tensor:
    """Cut the batch into parts of these sizes, run them, and add the part losses up."""
    cut = [
        [value] * len(sizes) if dim is None else list(value.split(list(sizes), dim))
        for value, dim in zip(inputs, graph.inputs.batch_dims, strict=True)
    ]
    parts = [list(part) for part in zip(*cut, strict=True)]
    totals: tuple[torch.Tensor, ...] = ()
    if graph.denominators is not None:
        weights = [graph.denominators(*part) for part in parts]
        assert all(w.dim() == 0 and w.dtype == torch.float64 for part in weights for w in part)
        totals = tuple(sum(column) for column in zip(*weights, strict=True))
    return lockstep(graph.module, [[*part, *totals] for part in parts], sizes)


def lockstep(
    module: fx.GraphModule, parts: list[list[torch.Tensor]], sizes: Sequence[int]
) -> torch.Tensor:
    runs = [fx.Interpreter(module) for _ in parts]
    envs: list[dict[fx.Node, Any]] = [{} for _ in parts]
    places = iter(range(len(parts[0])))
    for node in module.graph.nodes:
        if node.op == "placeholder":
            at = next(places)
            for env, part in zip(envs, parts, strict=True):
                env[node] = part[at]
        elif node.op == "output":
            return sum(env[node.args[0]] for env in envs)
        else:
            for rank, (run, env) in enumerate(zip(runs, envs, strict=True)):
                run.env = env | converted(node, rank, envs, sizes)
                args, kwargs = run.fetch_args_kwargs_from_env(node)
                env[node] = getattr(run, node.op)(node.target, args, kwargs)
    raise AssertionError("no output")


def converted(
    node: fx.Node, rank: int, envs: list[dict[fx.Node, Any]], sizes: Sequence[int]
) -> dict[fx.Node, Any]:
    wanted = noted(node, "data_inputs")
    if not wanted:
        return {}
    found = {}
    for value, text in zip(tensor_inputs(node), wanted, strict=True):
        source, target = Placement.parse(noted(value, "data")), Placement.parse(text)
        if source.is_shard and not target.is_shard:
            found[value] = torch.cat([env[value] for env in envs], source.dim)
        elif target.is_shard and not source.is_shard:
            found[value] = envs[rank][value].split(list(sizes), target.dim)[rank]
    return found


def check(
    model: nn.Module,
    example: Any,
    loss_fn: Callable[[Any, Any], torch.Tensor] | None = None,
    sizes: Sequence[Sequence[int]] = SIZES,
) -> Graph:
    """Compare every cut with the captured graph on the whole batch; return the batched graph."""
    with Promote():
        captured = capture(model, example, loss_fn)
    code = captured.module.code
    graph = batch(captured)
    assert captured.module.code == code
    assert all(noted(node, "data") for node in graph.module.graph.nodes)
    values = list(example.values()) if isinstance(example, dict) else list(example)
    trained = {name: p for name, p in graph.parameters.items() if p.requires_grad}
    for cut in sizes:
        inputs = [repeated(v, sum(cut)) if v.dim() else v for v in values]
        wanted = captured.module(*inputs)
        want_grads = torch.autograd.grad(wanted, list(trained.values()), allow_unused=True)
        for split in (cut, [sum(cut)]):
            got = total_loss(graph, inputs, split)
            grads = torch.autograd.grad(got, list(trained.values()), allow_unused=True)
            torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-12)
            for name, a, b in zip(trained, grads, want_grads, strict=True):
                assert (a is None) == (b is None), name
                if a is not None:
                    torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-11, msg=lambda m: name + m)  # noqa: B023
    return graph


def repeated(value: torch.Tensor, size: int) -> torch.Tensor:
    """The first ``size`` samples of the example, its samples repeated with new content."""
    rows = [value[i % len(value)] for i in range(size)]
    return torch.stack([r.roll(i // len(value), -1) if r.dim() else r for i, r in enumerate(rows)])
