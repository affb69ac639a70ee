"""Layers: composed in order they are the model; equal ones share a class; names do not matter."""

from __future__ import annotations

import functools
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import fx, nn

from galvatron_compile.graph import Graph, LayeredGraph, note, noted
from galvatron_compile.interpret import run_graph, run_layers
from galvatron_compile.passes.batch import batch as split_over_samples
from galvatron_compile.passes.capture import capture
from galvatron_compile.passes.layers import find_layers
from galvatron_compile.placement import S
from galvatron_compile.printer import fingerprint

sys.path.insert(0, str(Path(__file__).parent))
import captured_models as models

GOLDEN = Path(__file__).parents[1] / "golden"


@pytest.fixture(autouse=True)
def _float64() -> Iterator[None]:
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@functools.cache
def odd_gpt(blocks: int = 3, tied: bool = True) -> tuple[nn.Module, LayeredGraph]:
    """Capture is the slow part: once for all tests that only read."""
    model = models.OddGPT(blocks, tied)
    return model, find_layers(capture(model, models.token_batch(4)))


@functools.cache
def transformers_layers(kind: str) -> tuple[nn.Module, Any, Graph, LayeredGraph]:
    model, batches = models.transformers_model(kind)
    graph = capture(model, batches(4))
    return model, batches, graph, find_layers(graph)


@pytest.mark.parametrize("blocks", [2, 3])
@pytest.mark.parametrize("tied", [True, False])
def test_layers_of_a_hand_written_gpt_compose_to_the_model(blocks: int, tied: bool) -> None:
    model, layered = odd_gpt(blocks, tied)
    names = [layer.name for layer in layered.layers]
    assert names == ["embedding", *(f"plums.{n}" for n in range(blocks)), "norm", "head"]
    assert len(layered.classes) == 4
    batch = models.token_batch(5)
    reference = models.eager(model, model(**batch))
    models.assert_equal_to(reference, model, run_layers(layered, batch))
    assert ("apple.weight" in layered.layers[-1].parameters) is tied


@pytest.mark.parametrize(
    ("kind", "names", "classes"),
    [
        ("llama", ["embedding", *(f"model.layers.{n}" for n in range(3)), "norm", "head"], 4),
        ("llama_tied", ["embedding", *(f"model.layers.{n}" for n in range(3)), "norm", "head"], 4),
        ("gpt2", ["embedding", *(f"transformer.h.{n}" for n in range(3)), "norm", "head"], 4),
        ("bert", None, 4),
        ("vit", None, 4),
        ("t5", None, 8),
    ],
)
def test_layers_of_transformers_models_compose_to_the_model(
    kind: str, names: list[str] | None, classes: int
) -> None:
    model, batches, graph, layered = transformers_layers(kind)
    found = [layer.name for layer in layered.layers]
    assert names is None or found == names
    assert len(layered.classes) == classes, str(layered)
    batch = batches(3)
    reference = models.eager(model, model(**batch).loss)
    models.assert_equal_to(reference, model, run_graph(graph, batch))
    models.assert_equal_to(reference, model, run_layers(layered, batch))


def test_every_node_is_in_one_layer_and_layers_depend_on_earlier_ones_only() -> None:
    _, _, _, layered = transformers_layers("t5")
    known = set(layered.graph.inputs.names)
    for layer in layered.layers:
        assert known.issuperset(layer.inputs), layer.name
        assert known.isdisjoint(layer.outputs)
        known.update(layer.outputs)
    assert layered.loss in known


def test_what_t5s_layers_pass_on_is_noted_as_what_it_is() -> None:
    """The encoder's result and both position biases carry gradients to several layers; masks do
    not, and nothing of a mask depends on a parameter.
    """
    model, batches = models.transformers_model("t5")
    layered = find_layers(split_over_samples(capture(model, batches(4))))
    nodes = {node.name: node for node in layered.graph.module.graph.nodes}
    trained: set[fx.Node] = set()
    for node in nodes.values():
        if node.target in layered.graph.parameters or trained & set(node.all_input_nodes):
            trained.add(node)
    passed = [(layer.name, nodes[name]) for layer in layered.layers for name in layer.outputs]
    for made_in, node in passed:
        assert noted(node, "differentiable") == (node in trained), (made_in, node)
    num_readers = Counter(name for layer in layered.layers for name in layer.inputs)
    kept = [(made_in, node) for made_in, node in passed if num_readers[node.name] > 1]
    assert [
        (made_in, tuple(node.meta["val"].shape[1:]), noted(node, "data"))
        for made_in, node in kept
        if noted(node, "differentiable")
    ] == [
        ("encoder.block.0", (4, 8, 8), "V"),  # two encoder blocks behind the first read it
        ("bridge", (8, 16), "S(0)"),
        ("decoder.block.0", (4, 8, 8), "V"),
    ]
    shapes = [tuple(n.meta["val"].shape[1:]) for _, n in kept if not noted(n, "differentiable")]
    assert shapes == [(1, 8, 8), (1, 8, 8), (1, 8, 8), (4, 8, 8)]  # masks; a bias that is zero


def test_no_batch_size_crosses_a_cut() -> None:
    _, layered = odd_gpt()
    for layer_class in layered.classes:
        places = layer_class.graph.graph.find_nodes(op="placeholder")
        assert all(isinstance(p.meta["val"], torch.Tensor) for p in places)
        assert len(places) == len(layer_class.kinds)
        assert list(layer_class.kinds) == sorted(
            layer_class.kinds, key=["activation", "parameter", "buffer"].index
        )


def test_renaming_every_module_changes_no_fingerprint() -> None:
    _, odd = odd_gpt()
    renamed = find_layers(capture(models.RenamedGPT(), models.token_batch(4, ids="x", labels="y")))
    assert fingerprint(odd) == fingerprint(renamed)
    _, shorter = odd_gpt(2)
    _, untied = odd_gpt(tied=False)
    assert len({fingerprint(found) for found in (odd, shorter, untied)}) == 3


def test_frozen_blocks_are_a_class_of_their_own() -> None:
    model = models.OddGPT(4)
    model.plums[1].requires_grad_(False)
    layered = find_layers(capture(model, models.token_batch(4)))
    indices = [layer.class_index for layer in layered.layers]
    assert indices == [0, 1, 2, 1, 1, 3, 4]


def test_a_sequential_model_is_cut_at_its_members() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
    batch = (torch.randn(4, 8), torch.randint(0, 3, (4,)))
    layered = find_layers(
        capture(model, batch, lambda out, given: nn.functional.cross_entropy(out, given[1]))
    )
    assert [layer.class_index for layer in layered.layers] == [0, 0, 1, 2]
    reference = models.eager(model, nn.functional.cross_entropy(model(batch[0]), batch[1]))
    models.assert_equal_to(reference, model, run_layers(layered, batch))


class Tower(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 12), nn.Linear(12, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.relu(self.up(x)))


class Towers(nn.Module):
    """Two parts in no list, with work of the model's own in front, between and behind."""

    def __init__(self) -> None:
        super().__init__()
        self.reader, self.writer, self.out = Tower(), Tower(), nn.Linear(8, 3)
        self.scale = nn.Parameter(torch.randn(8))

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        h = self.reader((x * self.scale).tanh())
        h = self.writer(h.roll(1, 1) * 2.0)
        return nn.functional.cross_entropy(self.out(h), y)


def test_parts_in_no_list_are_layers_and_the_loss_stays_with_the_head() -> None:
    model = Towers()
    batch = (torch.randn(4, 8), torch.randint(0, 3, (4,)))
    layered = find_layers(capture(model, batch))
    assert [layer.name for layer in layered.layers] == ["embedding", "reader", "writer", "head"]
    reference = models.eager(model, model(*batch))
    models.assert_equal_to(reference, model, run_layers(layered, batch))


class NoBlocks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.three = nn.Linear(8, 16), nn.Linear(16, 6), nn.Linear(6, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = torch.relu(self.one(x)).view(x.shape[0], 2, 8)
        h = torch.tanh(self.two(h.reshape(x.shape[0], 16)))
        return (self.three(h) + x.sum(1, keepdim=True)).square().mean()


def test_a_model_without_blocks_is_cut_where_one_value_crosses() -> None:
    model = NoBlocks()
    layered = find_layers(capture(model, (torch.randn(4, 8),)))
    assert len(layered.layers) > 1
    assert all(len(layer.outputs) == 1 for layer in layered.layers)
    batch = (torch.randn(7, 8),)
    reference = models.eager(model, model(*batch))
    models.assert_equal_to(reference, model, run_layers(layered, batch))


class Skips(nn.Module):
    """No blocks, and a block-free parameter tensor added at the end: one layer is right too."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x * self.weight).sum(1).mean()


def test_a_model_of_one_parameter_is_one_layer() -> None:
    layered = find_layers(capture(Skips(), (torch.randn(4, 8),)))
    assert len(layered.layers) == 1


class SizesOnly(nn.Module):
    """Blocks that ask for the batch size of a value with batch and length merged."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch = x.shape[0]
        h = x.reshape(batch * 6, 4)
        for block in self.blocks:
            h = block(h.view(batch, 6, 4)).reshape(batch * 6, 4) + h
        return h.square().mean()


def test_batch_sizes_are_computed_again_from_merged_dims() -> None:
    model = SizesOnly()
    layered = find_layers(capture(model, (torch.randn(4, 6, 4),)))
    assert all("x" not in layer.inputs for layer in layered.layers[2:])
    batch = (torch.randn(3, 6, 4),)
    reference = models.eager(model, model(*batch))
    models.assert_equal_to(reference, model, run_layers(layered, batch))


def test_data_placements_noted_on_nodes_reach_the_classes() -> None:
    graph = capture(models.OddGPT(), models.token_batch(4))
    for node in graph.module.graph.nodes:
        value = node.meta["val"]
        if isinstance(value, torch.Tensor) and value.dim() == 3 and node.op == "call_function":
            note(node, data="S(0)")
    layered = find_layers(graph)
    block = layered.layer_class(layered.layers[1])
    assert block.data_inputs == (S(0),) and block.data_outputs == (S(0),)


def test_printed_layers_are_the_golden_ones() -> None:
    _, layered = odd_gpt()
    assert f"{layered}\n" == (GOLDEN / "layers_odd_gpt.txt").read_text()


def test_the_fingerprint_does_not_depend_on_the_device() -> None:
    """A plan made on a laptop's meta device, or by a rank with another GPU, is for this model."""

    class Positions(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = torch.nn.Embedding(8, 4)
            self.blocks = torch.nn.ModuleList(torch.nn.Linear(4, 4) for _ in range(3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = x + self.table(torch.arange(x.shape[1], device=x.device))
            for block in self.blocks:
                x = torch.tanh(block(x))
            return x.square().sum()

    def found(device: str) -> str:
        with torch.device(device):
            model, x = Positions(), torch.randn(2, 8, 4)
        return fingerprint(find_layers(capture(model, {"x": x})))

    assert found("cpu") == found("meta")
