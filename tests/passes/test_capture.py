"""Capture: the graph is the model (loss and gradients), or the model's line is blamed."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from galvatron_compile.errors import CaptureError, ShapeError, UnsupportedError
from galvatron_compile.graph import Graph
from galvatron_compile.interpret import run_graph, run_layers
from galvatron_compile.passes.capture import capture
from galvatron_compile.passes.layers import find_layers
from galvatron_compile.passes.normalise import retarget_devices

sys.path.insert(0, str(Path(__file__).parent))
import captured_models as models

GOLDEN = Path(__file__).parents[1] / "golden"


@pytest.fixture(autouse=True)
def _float64() -> Iterator[None]:
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


class Ten(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8, bias=False)
        self.register_buffer("scale", torch.ones(8))

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        h = self.down(torch.relu(self.up(x).view(x.shape[0], 4, 4).flatten(1)))
        with torch.no_grad():
            peak = h.amax(-1, keepdim=True)
        error = (h - peak) * self.scale - x[:, :]
        return {"loss": error.square().mean()}


class Simple(nn.Module):
    """A linear layer with a step that a test chooses in front of the mean."""

    def __init__(self, step: Callable[[torch.Tensor], Any]) -> None:
        super().__init__()
        self.linear, self.step = nn.Linear(8, 8), step

    def forward(self, x: torch.Tensor) -> Any:
        return self.step(self.linear(x))


def same_as_eager(model: nn.Module, graph: Graph, batch: Any, loss: torch.Tensor) -> None:
    reference = models.eager(model, loss)
    models.assert_equal_to(reference, model, run_graph(graph, batch))


def test_printed_graph_is_the_golden_one_and_computes_the_model() -> None:
    model = Ten()
    graph = capture(model, (torch.randn(4, 8),))
    batch = (torch.randn(5, 8),)
    same_as_eager(model, graph, batch, model(*batch)["loss"])
    assert f"{graph}\n" == (GOLDEN / "graph_ten_nodes.txt").read_text()


def test_parameters_are_the_models_own_under_their_names() -> None:
    model = models.OddGPT()
    graph = capture(model, models.token_batch(4))
    assert graph.parameters.keys() == dict(model.named_parameters()).keys()
    assert all(graph.parameters[name] is p for name, p in model.named_parameters())
    assert all(graph.module.get_parameter(n) is p for n, p in model.named_parameters())
    assert graph.tied == {"melon.weight": "apple.weight"}
    targets = [n.target for n in graph.module.graph.nodes if n.op == "get_attr"]
    assert len(targets) == len(set(targets))


def test_every_node_has_a_value_and_module_paths_without_our_wrapper() -> None:
    graph = capture(models.OddGPT(), models.token_batch(4))
    graph.module.graph.lint()
    paths = set()
    for node in graph.module.graph.nodes:
        assert node.meta.get("val") is not None, node
        paths.update(path for path, _ in node.meta.get("nn_module_stack", {}).values())
    assert {"", "apple", "plums.0", "plums.2.foo"} <= paths
    assert not any(path.startswith("model") for path in paths)


def test_tuple_dict_and_nested_batches_with_a_loss_function_beside() -> None:
    class Nested(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(8, 3)

        def forward(self, pair: dict[str, torch.Tensor], shift: torch.Tensor) -> torch.Tensor:
            return self.linear(pair["left"] * pair["right"]) + shift

    def loss_of(outputs: torch.Tensor, batch: Any) -> torch.Tensor:
        target = batch["target"] if isinstance(batch, dict) else batch[2]
        return nn.functional.cross_entropy(outputs, target)

    def batch_of(size: int) -> dict[str, Any]:
        pair = {"left": torch.randn(size, 8), "right": torch.randn(size, 8)}
        target = torch.randint(0, 3, (size,))
        return {"pair": pair, "shift": torch.randn(3), "target": target}

    model = Nested()
    graph = capture(model, batch_of(4), loss_of)
    assert graph.inputs.names == ("pair_left", "pair_right", "shift", "target")
    assert graph.inputs.batch_dims == (0, 0, None, 0)
    batch = batch_of(6)
    same_as_eager(model, graph, batch, loss_of(model(batch["pair"], batch["shift"]), batch))

    graph = capture(model, tuple(batch_of(4).values()), loss_of)
    assert graph.inputs.names == ("pair_left", "pair_right", "shift", "batch_2")
    row = tuple(batch.values())
    same_as_eager(model, graph, row, loss_of(model(*row[:2]), row))


def test_entries_without_tensors_are_constants() -> None:
    model, batches = models.transformers_model("gpt2")
    graph = capture(model, batches(4))
    assert graph.inputs.constants == (("use_cache", False),)
    assert graph.inputs.names == ("input_ids", "labels")
    with pytest.raises(ShapeError, match="captured with False"):
        run_graph(graph, batches(2) | {"use_cache": True})


def test_a_batch_of_one_is_captured_for_any_batch() -> None:
    model = models.OddGPT()
    graph = capture(model, models.token_batch(1))
    batch = models.token_batch(5)
    same_as_eager(model, graph, batch, model(**batch))


def test_a_model_on_the_meta_device_is_captured() -> None:
    with torch.device("meta"):
        empty, _ = models.transformers_model("llama")
    _, batches = models.transformers_model("llama")
    torch.manual_seed(1)
    model, _ = models.transformers_model("llama")
    layered = find_layers(capture(empty, batches(4)))
    for layer_class in layered.classes:
        retarget_devices(layer_class.graph, torch.device("cpu"))
    batch = batches(3)
    reference = models.eager(model, model(**batch).loss)
    parameters, buffers = dict(model.named_parameters()), dict(model.named_buffers())
    models.assert_equal_to(reference, model, run_layers(layered, batch, parameters, buffers))


def test_values_under_no_grad_have_no_gradient() -> None:
    def step(h: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            weight = h.sigmoid()
        return (h * weight).mean()

    model = Simple(step)
    graph = capture(model, (torch.randn(4, 8),))
    batch = (torch.randn(3, 8),)
    same_as_eager(model, graph, batch, model(*batch))


def test_writes_in_place_become_functional() -> None:
    def step(h: torch.Tensor) -> torch.Tensor:
        out = torch.zeros_like(h)
        row = out[:, 2]
        out[:, 1:5] = h[:, :4]
        out[:, 6] = 3.0
        out[..., 2].add_(h[:, 7])
        out.mul_(2)
        return (out.exp() + row[:, None]).mean()

    model = Simple(step)
    graph = capture(model, (torch.randn(4, 8),))
    assert not any(
        node.target._schema.is_mutable
        for node in graph.module.graph.nodes
        if isinstance(node.target, torch._ops.OpOverload)
    )
    batch = (torch.randn(3, 8),)
    same_as_eager(model, graph, batch, model(*batch))


def two_views(h: torch.Tensor) -> torch.Tensor:
    return h.view(2, 2, 8).mean()


def branch_on_batch(h: torch.Tensor) -> torch.Tensor:
    return (h * 2 if h.shape[0] < 20 else h).mean()


def pairs(h: torch.Tensor) -> torch.Tensor:
    return h.view(2, -1, 8).square().mean()


def branch_on_data(h: torch.Tensor) -> torch.Tensor:
    return h.mean() if h.sum() > 0 else h.sum()


def through_numpy(h: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(h.detach().numpy()).mean() + h.mean()


def wrong_shape(h: torch.Tensor) -> torch.Tensor:
    return (h @ torch.ones(3, 3)).mean()


@pytest.mark.parametrize(
    ("step", "cause"),
    [
        (two_views, "batch size must be free"),
        (branch_on_batch, "batch size must be free"),
        (pairs, "batch size must be free"),
        (branch_on_data, "cannot be captured\n.*data-dependent"),
        (through_numpy, "cannot be captured"),
        (wrong_shape, "cannot be captured"),
    ],
)
def test_the_line_to_blame_is_named(step: Callable[[torch.Tensor], Any], cause: str) -> None:
    line = step.__code__.co_firstlineno + 1
    with pytest.raises(CaptureError, match=rf"test_capture\.py:{line}(?s:.*){cause}"):
        capture(Simple(step), (torch.randn(4, 8),))


def test_running_statistics_are_refused_by_name() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8))
    batch = (torch.randn(4, 8),)
    with pytest.raises(UnsupportedError, match=r"buffer '1\.running_mean'.*eval mode"):
        capture(model, batch, lambda out, _: out.mean())
    model.eval()
    graph = capture(model, batch, lambda out, _: out.square().mean())
    same_as_eager(model, graph, batch, model(*batch).square().mean())


def test_other_buffers_that_are_written_to_are_refused_by_name() -> None:
    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("seen", torch.zeros(()))
            self.linear = nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.seen.add_(1)
            return self.linear(x).mean()

    with pytest.raises(UnsupportedError, match=r"test_capture\.py:\d+: buffer 'seen' is written"):
        capture(Counts(), (torch.randn(4, 8),))


def test_autocast_inside_the_model_is_refused() -> None:
    def step(h: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return (h @ h.T).mean()

    with pytest.raises(UnsupportedError, match="autocast on cpu"):
        capture(Simple(step), (torch.randn(4, 8),))


@pytest.mark.parametrize(
    ("step", "batch", "message"),
    [
        (lambda h: h, (torch.randn(4, 8),), r"shape \[4, 8\]|shape \["),
        (lambda h: {"logits": h}, (torch.randn(4, 8),), "without a loss"),
        (lambda h: (h.mean() > 0), (torch.randn(4, 8),), "floating"),
        (lambda h: h.mean(), (), "no tensor"),
        (lambda h: h.mean(), (torch.randn(4, 8), torch.randn(4)), "does not take batch entry"),
        (lambda h: h.mean(), {"x": torch.randn(4, 8), "y": torch.randn(4)}, "batch entry y"),
        (lambda h: h.mean(), (torch.randn(4, 8), 3), "int among tensors"),
    ],
)
def test_missing_losses_and_wrong_batches_are_explained(
    step: Callable[[torch.Tensor], Any], batch: Any, message: str
) -> None:
    with pytest.raises(CaptureError, match=message):
        capture(Simple(step), batch)


def test_a_loss_function_with_parameters_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="make it a part of the model"):
        capture(Simple(lambda h: h), (torch.randn(4, 8),), Simple(torch.mean))
