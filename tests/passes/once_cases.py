"""Models whose layers repeat, some in ways that only look alike; and what both captures share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from galvatron_compile.graph import LayeredGraph
from galvatron_compile.passes.batch import batch
from galvatron_compile.passes.capture import capture
from galvatron_compile.passes.capture_once import understand_once
from galvatron_compile.passes.layers import find_layers
from galvatron_compile.passes.stand_in import RESULT
from galvatron_compile.printer import fingerprint, structural_key

WIDTH = 8


def understand(model: nn.Module, example: Any, loss_fn: Any = None) -> LayeredGraph:
    return find_layers(batch(capture(model, example, loss_fn)))


def assert_same(once: LayeredGraph, full: LayeredGraph) -> None:
    assert fingerprint(once) == fingerprint(full)
    for ours, theirs in zip(once.layers, full.layers, strict=True):
        assert ours.name == theirs.name
        assert ours.class_index == theirs.class_index
        assert ours.parameters == theirs.parameters
        assert len(ours.buffers) == len(theirs.buffers)
    for mine, other in zip(once.classes, full.classes, strict=True):
        assert (mine.name, mine.kinds) == (other.name, other.kinds)
        assert (mine.data_inputs, mine.data_outputs) == (other.data_inputs, other.data_outputs)
    a, b = once.graph, full.graph
    assert list(a.parameters) == list(b.parameters)
    assert all(a.parameters[name] is b.parameters[name] for name in b.parameters)
    assert {n for n in a.buffers if "lifted" not in n} == {
        n for n in b.buffers if "lifted" not in n
    }
    assert all(a.buffers[name] is b.buffers[name] for name in a.buffers if "lifted" not in name)
    assert (a.tied, a.inputs) == (b.tied, b.inputs)
    assert (a.example_batch_size, a.splits_batch) == (b.example_batch_size, b.splits_batch)
    assert (a.denominators is None) == (b.denominators is None)
    if a.denominators is not None and b.denominators is not None:
        assert structural_key(a.denominators.graph, (), a.batch_symbol) == structural_key(
            b.denominators.graph, (), b.batch_symbol
        )
    assert computing(once) == computing(full)
    assert RESULT not in {node.target for node in a.module.graph.nodes}


def computing(layered: LayeredGraph) -> list[tuple[str, Any]]:
    """Every node with the calls of modules that it is in, in order; sizes and inputs left out."""
    return [
        (str(node.target), list(node.meta.get("nn_module_stack", {}).values()))
        for node in layered.graph.module.graph.nodes
        if node.op == "call_function" and isinstance(node.meta["val"], torch.Tensor)
    ]


def check(model: nn.Module, example: Any) -> LayeredGraph:
    once = understand_once(model, example)
    assert_same(once, understand(model, example))
    return once


# --- blocks of all kinds ------------------------------------------------------------------------


class Block(nn.Module):
    """Two linear layers with a skip; subclasses say what is strange about them."""

    def __init__(self, index: int = 0) -> None:
        super().__init__()
        self.layer_idx = index
        self.one, self.two = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def change(self, x: torch.Tensor) -> torch.Tensor:
        return self.two(torch.relu(self.one(x)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.change(x)


class Chain(nn.Module):
    """Blocks one after the other, and a mean square as loss."""

    def __init__(self, make: Callable[[int], nn.Module], depth: int = 8) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH)
        self.blocks = nn.ModuleList(make(index) for index in range(depth))

    def body(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return x

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.body(self.first(x)).square().mean()


def example() -> tuple[torch.Tensor]:
    return (torch.randn(4, WIDTH),)


class Doubling(Block):
    """Every other block does something else, told by its index when it runs."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = super().forward(x)
        return x * 2 if self.layer_idx % 2 else x


class Listed(Block):
    """The index looks up a list that all blocks share."""

    powers = (1, 1, 1, 1, 1, 2, 1, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) ** self.powers[self.layer_idx]


class Scaled(Block):
    """The index goes straight into an operator written in C++."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.mul(super().forward(x), self.layer_idx)


class LastIsOther(Block):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(super().forward(x)) if self.layer_idx == 6 else super().forward(x)


class Windowed(Block):
    """Two settings in turn, read when it runs: blocks with the same one are alike."""

    def __init__(self, index: int) -> None:
        super().__init__(index)
        self.window = 2 + index % 2

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * self.window


class Named(Block):
    """The same with a setting that is no number."""

    def __init__(self, index: int) -> None:
        super().__init__(index)
        self.kind = "full" if index % 2 else "sliding"

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) if self.kind == "full" else x.cumsum(-1) + self.change(x)


# --- code around the blocks ---------------------------------------------------------------------


class UNet(Chain):
    def body(self, x: torch.Tensor) -> torch.Tensor:
        half, skips = len(self.blocks) // 2, []
        for block in self.blocks[:half]:
            x = block(x)
            skips.append(x)
        for index in range(half, len(self.blocks)):
            x = self.blocks[index](x + skips.pop())
        return x


class Collecting(Chain):
    def body(self, x: torch.Tensor) -> torch.Tensor:
        states = [x]
        for index, block in enumerate(self.blocks):
            states.append(block(states[-1] * index))
        return torch.stack(states).sum(0)


class Looping(Chain):
    """Runs its blocks twice, without gradients the first time."""

    def body(self, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            start = super().body(x)
        return super().body(x + start)


class Noting(Block):
    """A second result, constants in the code, and parts without gradient."""

    def __init__(self, index: int) -> None:
        super().__init__(index)
        self.register_buffer("scale", torch.full((WIDTH,), float(index)))

    def forward(
        self, x: torch.Tensor, settings: dict[str, Any]
    ) -> tuple[torch.Tensor, dict[str, Any]]:
        with torch.no_grad():
            gate = torch.sigmoid(self.one(x))
        held = self.change(x.detach() * self.scale + torch.tensor([0.5] * WIDTH))
        y = x + held * gate
        return y, {"penalty": y.square().mean(), "given": settings["mask"], "kind": None}


class Penalised(Chain):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        settings = {"mask": x > 0, "eps": 1e-5}
        x, penalties = self.first(x), []
        for block in self.blocks:
            x, more = block(x, settings)
            penalties.append(more["penalty"])
            assert more["given"] is settings["mask"] and more["kind"] is None
        return (x * settings["mask"]).square().mean() + sum(penalties)


class Refusing(Block):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.shape[0] > 3 and self.layer_idx == 7:
            raise ValueError("no more than 3, please")
        return super().forward(x)
