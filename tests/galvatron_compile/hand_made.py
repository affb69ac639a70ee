"""A small model and its stage program, written by hand, for tests of the runtime.

``tied`` is used by the first and the last layer; ``block.mix`` may be frozen; ``block.spare`` never
gets a gradient; 6 rows over 4 data ranks leave one rank without any.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
import torch.distributed as dist
from torch import fx
from torch.utils import _pytree as pytree

from galvatron_compile.graph import InputSpec, note
from galvatron_compile.layout import ParameterLayout
from galvatron_compile.mesh import Axis, Mesh
from galvatron_compile.parallel_model import ParallelModel
from galvatron_compile.passes.lower import lower
from galvatron_compile.placement import Placement, R, S, V
from galvatron_compile.plans import Plan
from galvatron_compile.precision import Precision
from galvatron_compile.program import StageGraph, StageProgram
from galvatron_compile.seeds import layer_seed
from galvatron_compile.strategy import Strategy
from galvatron_compile.units import ParameterUnit

WIDTH, HIDDEN, BATCH = 6, 8, 24
PLACEMENTS: dict[str, Placement] = {
    "tied": R,
    "bias": R,
    "block.gain": V,
    "block.up": S(0, 2),
    "block.up_bias": S(0, 2),
    "block.down": S(1),
    "block.mix": R,
    "block.spare": R,
    "block.scale": R,
    "out": R,
}


class _CopyIn(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, axis: Axis) -> torch.Tensor:
        ctx.axis = axis
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        gradient = gradient.clone()
        if ctx.axis.group is not None:
            dist.all_reduce(gradient, group=ctx.axis.group)
        return gradient, None


class _SumOut(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, axis: Axis) -> torch.Tensor:
        x = x.clone()
        if axis.group is not None:
            dist.all_reduce(x, group=axis.group)
        return x

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        return gradient, None


class First(torch.nn.Module):
    def forward(self, x: Any, bias: Any, tied: Any, seed: int) -> Any:
        return (x @ tied + bias,)


class Block(torch.nn.Module):
    def __init__(self, axis: Axis) -> None:
        super().__init__()
        self.axis = axis

    def forward(
        self, h: Any, gain: Any, up: Any, up_bias: Any, down: Any, mix: Any, spare: Any,
        scale: Any, shift: Any, seed: int,
    ) -> Any:  # fmt: skip
        inner = _CopyIn.apply(h @ mix, self.axis) * gain
        one, two = (inner @ up.t() + up_bias).chunk(2, -1)
        out = _SumOut.apply((one.tanh() * two) @ down.t(), self.axis)
        return (h + out * scale + shift, h.detach().argmax(-1))


class Last(torch.nn.Module):
    def forward(
        self, h: Any, picked: Any, target: Any, weight: Any, count: Any, out: Any, tied: Any,
        seed: int,
    ) -> Any:  # fmt: skip
        error = ((h @ tied.t()) * out - target).square().sum(-1)
        return ((error * weight).sum() / count + 0 * picked.sum(),)


class Net(torch.nn.Module):
    """The same on one device. ``also`` is the second name of ``tied``."""

    def __init__(self, frozen: bool) -> None:
        super().__init__()
        torch.manual_seed(1)
        half = HIDDEN
        for name, shape in {
            "tied": (WIDTH, WIDTH), "bias": (WIDTH,), "gain": (WIDTH,), "up": (2 * half, WIDTH),
            "up_bias": (2 * half,), "down": (WIDTH, half), "mix": (WIDTH, WIDTH), "spare": (3,),
            "scale": (), "out": (WIDTH,),
        }.items():  # fmt: skip
            value = torch.nn.Parameter(torch.randn(shape, dtype=torch.float64) * 0.5)
            value.requires_grad_(not (frozen and name == "mix"))
            setattr(self, name, value)
        self.also = self.tied
        self.register_buffer("shift", torch.full((WIDTH,), 0.25, dtype=torch.float64))

    def parameter(self, name: str) -> torch.nn.Parameter:
        return self.get_parameter(name.removeprefix("block."))

    def forward(self, x: Any, target: Any, weight: Any) -> torch.Tensor:
        (h,) = First()(x, self.bias, self.tied, 0)
        names = ("gain", "up", "up_bias", "down", "mix", "spare", "scale", "shift")
        block = Block(Axis("tp1", (0,), 0))
        h, picked = block(h, *(getattr(self, name) for name in names), 0)
        count = weight.sum()
        return Last()(h, picked, target, weight, count, self.out, self.tied, 0)[0]


def batch() -> dict[str, torch.Tensor]:
    torch.manual_seed(2)
    weight = (torch.rand(BATCH) > 0.4).double()
    weight[:7] = 0  # spread unevenly over ranks and micro-batches
    return {
        "x": torch.randn(BATCH, WIDTH, dtype=torch.float64),
        "target": torch.randn(BATCH, WIDTH, dtype=torch.float64),
        "weight": weight,
    }


def parallel(
    net: Net,
    *,
    tp: int = 1,
    zero: int = 0,
    micro_batches: int = 1,
    recompute: bool = False,
    precision: str | None = None,
) -> ParallelModel:
    """The stage program of this rank around ``net``'s parameters."""
    world = dist.get_world_size() if dist.is_initialized() else 1
    rank = dist.get_rank() if dist.is_initialized() else 0
    strategy = Strategy(
        tp=tp, dp=world // tp, zero=zero, recompute="full" if recompute else "none"
    )
    layers = ("first", "block", "last")
    plan = Plan("", world, BATCH, micro_batches, layers, (strategy,) * 3)
    mesh = Mesh.create(world, rank, {tp})
    groups = [["bias"], ["tied"], [n for n in PLACEMENTS if n.startswith("block.")], ["out"]]
    wanted = Precision.parse(precision)
    units = []
    for names in groups:
        layouts = [
            ParameterLayout(
                name,
                tuple(net.parameter(name).shape),
                PLACEMENTS[name],
                tp,
                strategy.dp,
                zero,
                net.parameter(name).requires_grad,
            )
            for name in names
        ]
        units.append(
            ParameterUnit(
                names[0],
                layouts,
                [net.parameter(name).detach() for name in names],
                data=mesh.data(tp),
                tensor=mesh.tensor(tp),
                precision=wanted,
                device=torch.device("cpu"),
                shared=names == ["tied"],
            )
        )
    module = _module(units, mesh, wanted.cast(net.get_buffer("shift")))
    counting = fx.Graph()
    leaves = [counting.placeholder(name) for name in ("x", "target", "weight")]
    counting.output((counting.call_method("sum", (leaves[2],)),))
    example = batch()
    program = StageProgram(
        stages=(StageGraph(0, (0, 1, 2), module, module),),
        plan=plan,
        mesh=mesh,
        units=tuple(units),
        denominators=fx.GraphModule(torch.nn.Module(), counting),
        inputs=InputSpec(
            tree=pytree.tree_structure(((), example)),
            names=("x", "target", "weight"),
            batch_dims=(0, 0, 0),
            shapes=tuple(tuple(value.shape) for value in example.values()),
            dtypes=(torch.float64,) * 3,
        ),
        layouts={layout.name: (0, layout) for unit in units for layout in unit.layouts},
        buffers={"shift": module.buffer_shift},
        tied={"also": "tied"},
        loss_dtype=wanted.compute_of(torch.float64),
    )
    return ParallelModel(lower(program, eager=True), wanted)


def _module(units: list[ParameterUnit], mesh: Mesh, shift: torch.Tensor) -> fx.GraphModule:
    root = torch.nn.Module()
    root.units = torch.nn.ModuleList(units)
    root.layers = torch.nn.ModuleList([First(), Block(mesh.tensor(_tp(mesh))), Last()])
    root.register_buffer("buffer_shift", shift)
    graph = fx.Graph(root)
    x, target, weight, count, seed = map(
        graph.placeholder, ("x", "target", "weight", "denominator_0", "seed")
    )

    def item(value: fx.Node, index: int) -> fx.Node:
        return graph.call_function(operator.getitem, (value, index))

    def layer(index: int, flags: list[bool], *args: Any) -> list[fx.Node]:
        mine = graph.call_function(layer_seed, (seed, index, 0))
        called = graph.call_module(f"layers.{index}", (*args, mine))
        outputs = [item(called, k) for k in range(len(flags))]
        for output, flag in zip(outputs, flags, strict=True):
            note(output, differentiable=flag)
        return outputs

    def parameters(unit: int) -> list[fx.Node]:
        called = graph.call_module(f"units.{unit}")
        return [item(called, k) for k in range(len(units[unit].layouts))]

    (h,) = layer(0, [True], x, *parameters(0), *parameters(1))
    shifted = graph.get_attr("buffer_shift")
    h, picked = layer(1, [True, False], h, *parameters(2), shifted)
    rest = (*parameters(3), *parameters(1))
    (loss,) = layer(2, [True], h, picked, target, weight, count, *rest)
    graph.output((loss,))
    return fx.GraphModule(root, graph)


def _tp(mesh: Mesh) -> int:
    return next(axis.size for name, axis in mesh.axes.items() if name.startswith("tp"))


def reference(
    frozen: bool, steps: int = 3
) -> tuple[list[float], dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Losses, the first step's gradients, and the final state of single-process training."""
    net = Net(frozen)
    names = [n.removeprefix("block.") for n in PLACEMENTS]
    optimizer = torch.optim.AdamW([net.get_parameter(n) for n in names], lr=0.05)
    losses: list[float] = []
    first: dict[str, torch.Tensor] = {}
    for _ in range(steps):
        loss = net(**batch())
        loss.backward()
        losses.append(loss.item())
        if not first:
            first = {
                n: net.parameter(n).grad.clone()
                for n in PLACEMENTS
                if net.parameter(n).grad is not None
            }
        optimizer.step()
        optimizer.zero_grad()
    return losses, first, {n: net.parameter(n).detach().clone() for n in PLACEMENTS}
