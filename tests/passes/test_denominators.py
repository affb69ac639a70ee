"""What the loss divides by is computed from the batch: no parameter, no layer, nothing gathered."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from in_parts import check
from torch import fx, nn
from torch.nn import functional as F

from galvatron_compile.errors import UnsupportedError
from galvatron_compile.graph import Graph, noted
from galvatron_compile.passes.batch import batch
from galvatron_compile.passes.capture import capture
from galvatron_compile.passes.denominators import Denominators
from galvatron_compile.torch_private import nodes_of_expression

Loss = Callable[[torch.Tensor, torch.Tensor, Any], torch.Tensor]
LOSSES: dict[str, Loss] = {
    "mean": lambda h, y, m: (h * y).mean(),
    "mse": lambda h, y, m: F.mse_loss(h, y),
    "bce": lambda h, y, m: F.binary_cross_entropy_with_logits(h, y.sigmoid()),
    "kl": lambda h, y, m: F.kl_div(h.log_softmax(-1), y.softmax(-1), reduction="batchmean"),
    "kl of all": lambda h, y, m: F.kl_div(h.log_softmax(-1), y.softmax(-1)),
    "regularised": lambda h, y, m: F.mse_loss(h, y) + 0.1 * m.inner.weight.square().sum(),
    "penalised": lambda h, y, m: F.mse_loss(h, y) + 0.1 * h.square().mean(),
    "size as a number": lambda h, y, m: (h - y).square().sum() / (3 * h.shape[0]),
    "view by the output's size": lambda h, y, m: (
        (h * (y.reshape(2 * h.shape[0], -1) > 0).reshape(h.shape[0], -1)).sum()
        / (y.reshape(2 * h.shape[0], -1) > 0).sum().clamp(min=1)
    ),
    "buffer": lambda h, y, m: F.cross_entropy(h, y.argmax(-1), m.weight),
}


class Deep(nn.Module):
    """Three linear layers and a loss, with class weights in a buffer and a frozen layer beside."""

    def __init__(self, loss: Loss) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner = nn.Linear(6, 6)
        self.blocks = nn.ModuleList([nn.Linear(6, 6), nn.Linear(6, 4)])
        self.frozen = nn.Linear(6, 4).requires_grad_(False)
        self.loss = loss
        self.register_buffer("weight", torch.tensor([0.5, 2.0, 1.0, 3.0]))
        self.double()

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        h = self.inner(x)
        for block in self.blocks:
            h = block(h.tanh())
        return self.loss(h, y, self)


def data() -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(2)
    return torch.randn(4, 6, dtype=torch.float64), torch.randn(4, 4, dtype=torch.float64)


def computed(graph: Graph) -> tuple[set[str], list[str]]:
    """Targets of the denominators' ``get_attr`` nodes, and the names of their calls."""
    assert graph.denominators is not None
    nodes = graph.denominators.graph.nodes
    held = {str(node.target) for node in nodes if node.op == "get_attr"}
    return held, [node.name for node in nodes if node.op == "call_function"]


@pytest.mark.parametrize("name", LOSSES)
def test_weights_come_from_the_batch_alone(name: str) -> None:
    graph = check(Deep(LOSSES[name]), data())
    assert graph.splits_batch
    held, calls = computed(graph)
    assert held == ({"weight"} if name == "buffer" else set())
    assert not [call for call in calls if "linear" in call or "tanh" in call]


def test_the_size_of_an_activation_is_that_of_a_batch_tensor() -> None:
    graph = batch(capture(Deep(LOSSES["mse"]), data()))
    assert graph.denominators is not None
    assert computed(graph) == (set(), ["sym_size_int", "mul", "full_default"])
    (count,) = graph.denominators(*data())
    assert count.item() == 16 and count.dtype == torch.float64


def test_a_meta_model_needs_no_parameter_for_them() -> None:
    model = copy.deepcopy(Deep(LOSSES["mse"])).to("meta")
    graph = batch(capture(model, data()))
    assert graph.denominators is not None
    assert not list(graph.denominators.parameters())


GATHERED: dict[str, Loss] = {
    # Both were wrong: a part's denominator saw the largest, or the last, of its own samples only.
    "largest sample": lambda h, y, m: (h * (y > y.amax(0) / 2)).sum() / (y > y.amax(0) / 2).sum(),
    "reversed": lambda h, y, m: (h * y).sum() / (y - y.flip(0)).exp().sum(),
    "frozen layer": lambda h, y, m: (
        (h.square() * m.frozen(m.x).exp()).sum() / m.frozen(m.x).exp().sum()
    ),
}


@pytest.mark.parametrize("name", GATHERED)
def test_a_weight_that_needs_more_than_the_own_samples_is_gathered_with_a_remark(name: str) -> None:
    graph = check(_Remember(GATHERED[name]), data())
    assert not graph.splits_batch
    assert computed(graph)[0] == set()
    remarks = [text for node in graph.module.graph.nodes if (text := noted(node, "remark"))]
    assert any("test_denominators.py:" in text for text in remarks)


class _Remember(Deep):
    """Its loss may use the input."""

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        self.x = x
        return super().forward(x, y)


def test_a_weight_of_a_parameter_is_refused_by_name() -> None:
    captured = capture(Deep(lambda h, y, m: m.inner.weight.sum() * h.sum()), data())
    graph = captured.module.graph
    made = Denominators(graph, captured.batch_symbol, captured.parameters)
    weight = next(node for node in graph.nodes if node.name.startswith("sum"))
    assert not made.can_sum(weight)
    made.sum_of(weight, ("a pass that did not ask",))
    with pytest.raises(UnsupportedError, match=r"the parameter inner\.weight; compute"):
        made.module(captured.module)


@pytest.mark.parametrize("size", [1, 4, 10])
def test_any_expression_in_the_batch_size_becomes_nodes(size: int) -> None:
    captured = capture(Deep(LOSSES["mse"]), data())
    symbol = captured.batch_symbol
    place = captured.module.graph.find_nodes(op="placeholder")[0]
    graph = fx.Graph()
    base = graph.placeholder("size")
    base.meta["val"] = place.meta["val"].shape[0]
    fake = base.meta["val"]
    wanted = [7 * fake, fake * fake + 3 * fake, (fake + 1) // 2, 2 * fake - 1]
    made = [nodes_of_expression(value.node.expr, {symbol: base}) for value in wanted]
    for node, value in zip(made, wanted, strict=True):
        assert node.meta["val"].node.expr == value.node.expr
    graph.output(tuple(made))
    found = fx.GraphModule(nn.Module(), graph)(size)
    assert found == (7 * size, size * size + 3 * size, math.ceil(size / 2), 2 * size - 1)
