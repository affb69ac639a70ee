"""Capture once gives what the full capture gives; what repeats runs twice, what differs runs."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from galvatron_compile.errors import CaptureError
from galvatron_compile.graph import LayeredGraph
from galvatron_compile.interpret import run_graph, run_layers
from galvatron_compile.passes import capture_once as under_test
from galvatron_compile.passes.alike import alike_groups
from galvatron_compile.passes.batch import batch
from galvatron_compile.passes.capture import capture
from galvatron_compile.passes.capture_once import understand_once
from galvatron_compile.passes.layers import find_layers
from galvatron_compile.passes.stand_in import RESULT, Recorder
from galvatron_compile.printer import fingerprint, structural_key

sys.path.insert(0, str(Path(__file__).parent))
import captured_models as models

WIDTH = 8


@pytest.fixture(autouse=True)
def _float64() -> Iterator[None]:
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Per capture, how many calls stood in for others; empty where no stand-in was tried."""
    counts: list[int] = []
    leave = Recorder.__exit__

    def leaving(self: Recorder, *error: object) -> None:
        counts.append(len(self.calls) - sum(len(kind.real) for kind in set(self.calls)))
        leave(self, *error)

    monkeypatch.setattr(Recorder, "__exit__", leaving)
    return counts


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


# --- models that repeat -------------------------------------------------------------------------


def deep(kind: str, layers: int) -> tuple[nn.Module, Any]:
    """A tiny transformers model with that many layers."""
    model, batches = models.transformers_model(kind)
    config: Any = model.config
    for name in ("num_hidden_layers", "n_layer", "num_layers", "num_decoder_layers"):
        if hasattr(config, name):
            setattr(config, name, layers)
    return type(model)(config), batches


@pytest.mark.parametrize(
    ("kind", "layers", "stand_ins"),
    [
        ("llama", 6, 3), ("llama", 12, 9), ("llama_tied", 6, 3), ("gpt2", 6, 3), ("bert", 6, 3),
        ("vit", 6, 3), ("t5", 6, 4),
    ],
)  # fmt: skip
def test_transformers_models(kind: str, layers: int, stand_ins: int, ran: list[int]) -> None:
    model, batches = deep(kind, layers)
    check(model, batches(4))
    assert ran == [stand_ins]


@pytest.mark.parametrize("tied", [True, False])
def test_a_hand_written_gpt(tied: bool, ran: list[int]) -> None:
    check(models.OddGPT(8, tied), models.token_batch(4))
    assert ran == [5]


def test_a_module_dict(ran: list[int]) -> None:
    check(models.RenamedGPT(7), models.token_batch(4, ids="x", labels="y"))
    assert ran == [4]


def test_frozen_blocks_are_a_class_of_their_own(ran: list[int]) -> None:
    model = models.OddGPT(10)
    for block in model.plums[3:8]:
        block.requires_grad_(False)
    layered = check(model, models.token_batch(4))
    indices = [layer.class_index for layer in layered.layers]
    assert indices == [0, *[1] * 3, *[2] * 5, *[1] * 2, 3, 4]
    assert ran == [4]


def test_models_on_the_meta_device(ran: list[int]) -> None:
    with torch.device("meta"):
        model = models.OddGPT(6)
    example = {name: value.to("meta") for name, value in models.token_batch(4).items()}
    check(model, example)
    assert ran == [3]


def test_what_was_captured_once_computes_and_trains_like_the_model(ran: list[int]) -> None:
    model = models.OddGPT(6)
    graph = under_test.capture_once(model, models.token_batch(4))
    example = models.token_batch(5)
    reference = models.eager(model, model(**example))
    models.assert_equal_to(reference, model, run_graph(graph, example))
    models.assert_equal_to(reference, model, run_layers(find_layers(graph), example))
    assert ran == [3]


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


@pytest.mark.parametrize("block", [Doubling, Listed, Scaled, LastIsOther])
def test_blocks_that_read_their_index_all_run(block: type[Block], ran: list[int]) -> None:
    check(Chain(block), example())
    assert ran == [0]


class Windowed(Block):
    """Two settings in turn, read when it runs: blocks with the same one are alike."""

    def __init__(self, index: int) -> None:
        super().__init__(index)
        self.window = 2 + index % 2

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * self.window


def test_numbers_that_are_read_divide_blocks_into_classes(ran: list[int]) -> None:
    layered = check(Chain(Windowed, 12), example())
    assert len({layer.class_index for layer in layered.layers[1:-2]}) == 2
    assert ran == [6]  # the first shows that the number matters; then two of each, and the last


class Named(Block):
    """The same with a setting that is no number."""

    def __init__(self, index: int) -> None:
        super().__init__(index)
        self.kind = "full" if index % 2 else "sliding"

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) if self.kind == "full" else x.cumsum(-1) + self.change(x)


def test_alternating_layers_are_two_classes(ran: list[int]) -> None:
    layered = check(Chain(Named, 12), example())
    assert [layer.class_index for layer in layered.layers[:5]] == [0, 1, 2, 1, 2]
    assert ran == [6]


# --- blocks that do more than compute -----------------------------------------------------------

CALLS: list[int] = [0]
COUNT = 0


class CountsInAGlobal(Block):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        global COUNT
        COUNT += 1
        return super().forward(x) * (1 + COUNT % 2)


class CountsInAList(Block):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        CALLS[0] += 1
        return super().forward(x) * (1 + CALLS[0] % 2)


class CountsInItsClass(Block):
    count = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        type(self).count += 1
        return super().forward(x) * (1 + self.count % 2)


def counting_in_a_closure() -> type[Block]:
    count = 0

    class CountsInAClosure(Block):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            nonlocal count
            count += 1
            return super().forward(x) * (1 + count % 2)

    return CountsInAClosure


class WritesToItsInput(Block):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x.mul_(2)
        return super().forward(x)


class ReturnsALambda(Block):
    """Makes more of its result than tensors."""

    def forward(self, x: torch.Tensor) -> Any:
        y = super().forward(x)
        return lambda: y


class CallsLambdas(Chain):
    def body(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)()
        return x


class Keeps(Block):
    """Leaves a value in an attribute, which the model adds to its loss."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.kept = self.change(x)
        return x + self.kept


class AddsKept(Chain):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        loss = super().forward(x)
        return loss + sum(block.kept.square().mean() for block in self.blocks)


class Shared:
    def __init__(self) -> None:
        self.skips: list[torch.Tensor] = []
        self.doubling = False


class Skipping(Block):
    """Pushes its input to a stack that all blocks share, or adds what is on it: a U-Net."""

    def __init__(self, index: int, shared: Shared) -> None:
        super().__init__(index)
        self.shared = shared

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if len(self.shared.skips) < 3:
            self.shared.skips.append(x)
        return super().forward(x)


class SkippingChain(Chain):
    def __init__(self) -> None:
        self.shared = Shared()
        super().__init__(lambda index: Skipping(index, self.shared))

    def body(self, x: torch.Tensor) -> torch.Tensor:
        self.shared.skips.clear()
        return super().body(x) + sum(self.shared.skips)


class Reads(Block):
    """Takes a value that is not an argument."""

    def __init__(self, index: int, shared: Shared) -> None:
        super().__init__(index)
        self.shared = shared

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + self.shared.skips[0]


class ReadingChain(Chain):
    def __init__(self) -> None:
        self.shared = Shared()
        super().__init__(lambda index: Reads(index, self.shared))

    def body(self, x: torch.Tensor) -> torch.Tensor:
        self.shared.skips[:] = [torch.tanh(x)]
        return super().body(x)


class TakesAList(Block):
    """Appends to a list that it is given."""

    def forward(self, x: torch.Tensor, kept: list[torch.Tensor]) -> torch.Tensor:
        kept.append(x)
        return super().forward(x)


class GivesAList(Chain):
    def body(self, x: torch.Tensor) -> torch.Tensor:
        kept: list[torch.Tensor] = []
        for block in self.blocks:
            x = block(x, kept)
        return x + sum(kept)


class Store:
    """A class as a place for values."""

    steps = 0


class CountsInAnotherClass(Block):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        Store.steps += 1
        return super().forward(x) * (1 + Store.steps % 2)


class ToldBetweenCalls(Chain):
    """Sets what blocks read, late: the blocks in front of that are alike, as are the last two."""

    def __init__(self) -> None:
        self.shared = Shared()
        super().__init__(lambda index: Obeys(index, self.shared))

    def body(self, x: torch.Tensor) -> torch.Tensor:
        for index, block in enumerate(self.blocks):
            self.shared.doubling = index == 4
            x = block(x)
        return x


class Obeys(Block):
    def __init__(self, index: int, shared: Shared) -> None:
        super().__init__(index)
        self.shared = shared

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * 2 if self.shared.doubling else super().forward(x)


class TellsOne(Chain):
    """Sets an attribute of one block after the model was looked at."""

    def body(self, x: torch.Tensor) -> torch.Tensor:
        self.blocks[4].doubling = True
        result = super().body(x)
        self.blocks[4].doubling = False
        return result


class IsTold(Block):
    doubling = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * 2 if self.doubling else super().forward(x)


class DropsAtRandom(Block):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x if random.random() < 0.2 else super().forward(x)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Chain(CountsInAGlobal),
        lambda: Chain(CountsInAnotherClass),
        ToldBetweenCalls,
        lambda: TellsOne(IsTold),
        lambda: Chain(DropsAtRandom),
        lambda: Chain(CountsInAList),
        lambda: Chain(CountsInItsClass),
        lambda: Chain(counting_in_a_closure()),
        lambda: Chain(WritesToItsInput),
        lambda: CallsLambdas(ReturnsALambda),
        lambda: AddsKept(Keeps),
        SkippingChain,
        ReadingChain,
        lambda: GivesAList(TakesAList),
    ],
)
def test_blocks_with_side_effects_all_run(make: Callable[[], Chain], ran: list[int]) -> None:
    global COUNT
    model = make()
    found = []
    for way in (understand_once, understand):
        COUNT, CALLS[0], CountsInItsClass.count, Store.steps = 0, 0, 0, 0
        random.seed(2)
        found.append(way(model, example()))
    assert fingerprint(found[0]) == fingerprint(found[1])
    assert computing(found[0]) == computing(found[1])


def test_a_hook_inside_a_block_runs_for_all(ran: list[int]) -> None:
    model = Chain(Block)
    for block in model.blocks:
        block.one.register_forward_hook(lambda module, given, result: result * 2)
    check(model, example())
    assert ran == []


def test_a_hook_on_blocks_runs_for_all(ran: list[int]) -> None:
    model = Chain(Block)
    for block in model.blocks[::3]:
        block.register_forward_hook(lambda module, given, result: result * 2)
    check(model, example())
    assert ran == [5]


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


@pytest.mark.parametrize(("chain", "stand_ins"), [(UNet, 5), (Collecting, 5), (Looping, 9)])
def test_any_code_around_the_blocks(chain: type[Chain], stand_ins: int, ran: list[int]) -> None:
    check(chain(Block), example())
    assert ran == [stand_ins]


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


def test_blocks_with_several_results(ran: list[int]) -> None:
    check(Penalised(Noting), example())
    assert ran == [5]


# --- the model stays as it is -------------------------------------------------------------------


def test_the_model_is_left_as_it_was() -> None:
    model = Chain(Block)
    forward, before = vars(Block)["forward"], {n: dict(vars(m)) for n, m in model.named_modules()}
    understand_once(model, example())
    assert vars(Block)["forward"] is forward
    assert {n: dict(vars(m)) for n, m in model.named_modules()} == before


class Refusing(Block):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.shape[0] > 3 and self.layer_idx == 7:
            raise ValueError("no more than 3, please")
        return super().forward(x)


def test_errors_are_those_of_the_full_capture() -> None:
    model = Chain(Refusing)
    before = {n: dict(vars(m)) for n, m in model.named_modules()}
    forward = vars(Refusing)["forward"]
    with pytest.raises(CaptureError) as full:
        capture(model, example())
    with pytest.raises(CaptureError) as once:
        understand_once(model, example())
    assert str(once.value) == str(full.value)
    assert vars(Refusing)["forward"] is forward
    assert {n: dict(vars(m)) for n, m in model.named_modules()} == before


def test_groups_are_the_outermost_alike_modules() -> None:
    model = nn.ModuleDict({"a": Chain(Block, 5), "b": Chain(Block, 3)})
    (group,) = alike_groups(model, 4)
    assert [member.module for member in group.members] == list(model["a"].blocks)
    assert group.differing == (("", "layer_idx"),)
    assert alike_groups(nn.ModuleList(Chain(Block, 2) for _ in range(4)), 4)[0].members
