"""A mask that only says "causal" becomes the flag; others stay, and results are equal."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

from galvatron_compile.compiler import understand
from galvatron_compile.graph import Graph
from galvatron_compile.passes import attention as module
from galvatron_compile.passes.attention import attention
from galvatron_compile.passes.batch import batch
from galvatron_compile.passes.capture import capture
from galvatron_compile.precision import Precision

SDPA = torch.ops.aten.scaled_dot_product_attention.default
LENGTH, WIDTH = 6, 8
Mask = Callable[[Tensor], Tensor]


class Attends(nn.Module):
    """One head; ``mask`` of the activations makes the mask."""

    def __init__(self, mask: Mask, keys: int = LENGTH, **options: Any) -> None:
        super().__init__()
        self.mask, self.keys, self.options = mask, keys, options
        self.into, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, 1)
        self.register_buffer("triangle", torch.ones(LENGTH, LENGTH).tril().bool())

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.into(x).unsqueeze(1).chunk(3, -1)
        k, v = k[:, :, : self.keys], v[:, :, : self.keys]
        mask = self.triangle if self.mask is buffered else self.mask(x)
        mixed = F.scaled_dot_product_attention(q, k, v, mask, **self.options)
        return self.out(mixed).sum()


def positions(x: Tensor) -> tuple[Tensor, Tensor]:
    places = torch.arange(LENGTH, device=x.device)
    return places[:, None], places[None, :]


def causal(x: Tensor) -> Tensor:
    rows, columns = positions(x)
    return (columns <= rows).expand(x.shape[0], 1, LENGTH, LENGTH)


def added(x: Tensor) -> Tensor:
    lowest = torch.finfo(x.dtype).min
    return torch.full((LENGTH, LENGTH), lowest, dtype=x.dtype, device=x.device).triu(1)


def moved(x: Tensor) -> Tensor:
    """Made on the CPU and brought to the model's device."""
    return torch.ones(LENGTH, LENGTH).tril().to(x.device, torch.bool)


def infinite(x: Tensor) -> Tensor:
    zeros = torch.zeros(LENGTH, LENGTH, dtype=x.dtype, device=x.device)
    return zeros.masked_fill(~causal(x)[0, 0], float("-inf"))


def everything(x: Tensor) -> Tensor:
    return torch.ones(x.shape[0], 1, LENGTH, LENGTH, dtype=torch.bool, device=x.device)


def window(x: Tensor) -> Tensor:
    rows, columns = positions(x)
    return (columns <= rows) & (columns > rows - 3)


def wide_window(x: Tensor) -> Tensor:
    rows, columns = positions(x)
    return (columns <= rows) & (columns > rows - LENGTH)


def sloped(x: Tensor) -> Tensor:
    """Causal, with a bias for nearness."""
    rows, columns = positions(x)
    return (columns - rows).to(x.dtype).masked_fill(columns > rows, float("-inf"))


def leaning(x: Tensor) -> Tensor:
    """What lies ahead counts less, but counts."""
    rows, columns = positions(x)
    return (columns > rows).to(x.dtype) * -5.0


def drawn(x: Tensor) -> Tensor:
    """Drawn anew in every step, whatever comes out."""
    return (torch.rand(LENGTH, LENGTH, device=x.device) >= 0) & causal(x)


def of_the_batch(x: Tensor) -> Tensor:
    return causal(x) & (x[:, None, None, :, 0] < 1e9)


def first_sample(x: Tensor) -> Tensor:
    """The samples behind the first see everything."""
    samples = torch.arange(x.shape[0], device=x.device)[:, None, None, None]
    return causal(x) | (samples > 0)


def shifted(x: Tensor) -> Tensor:
    rows, columns = positions(x)
    return columns <= rows + 1


def short(x: Tensor) -> Tensor:
    """Two keys fewer than queries: the triangle begins in the upper left corner."""
    rows, columns = positions(x)
    return (columns <= rows)[:, : LENGTH - 2]


def buffered(x: Tensor) -> Tensor:
    """The mask is a buffer, which a state dict may change."""
    raise AssertionError


def captured(mask: Mask, **options: Any) -> tuple[nn.Module, Graph]:
    torch.manual_seed(3)
    model = Attends(mask, **options).double()
    return model, capture(model, (torch.randn(4, LENGTH, WIDTH, dtype=torch.float64),))


def call(graph: Graph) -> Any:
    (found,) = (n for n in graph.module.graph.nodes if n.target is SDPA)
    return found


def same_loss(model: nn.Module, graph: Graph) -> None:
    x = torch.randn(3, LENGTH, WIDTH, dtype=torch.float64)
    torch.testing.assert_close(graph.module(x), model(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("mask", [causal, added, infinite, wide_window])
def test_a_causal_mask_becomes_the_flag_and_its_computation_goes(mask: Mask) -> None:
    model, graph = captured(mask)
    found = attention(graph)
    assert call(found).args[3:] == (None, 0.0, True)
    names = {str(n.target) for n in found.module.graph.nodes}
    assert not names & {"aten.arange.default", "aten.le.Tensor", "aten.full.default"}
    assert call(graph).args[3] is not None, "the given graph stays as it was"
    same_loss(model, found)


@pytest.mark.parametrize("mask", [causal, moved])
def test_a_model_on_the_meta_device(mask: Mask) -> None:
    with torch.device("meta"):
        model = Attends(mask)
        example = torch.randn(4, LENGTH, WIDTH)
    assert call(attention(capture(model, (example,)))).args[3:] == (None, 0.0, True)


def test_options_of_the_operator_stay() -> None:
    model, graph = captured(causal, scale=0.3)
    found = attention(graph)
    assert call(found).kwargs == {"scale": 0.3}
    same_loss(model, found)


def test_dropout_stays() -> None:
    _, graph = captured(causal, dropout_p=0.25)
    assert call(attention(graph)).args[3:] == (None, 0.25, True)


def test_a_mask_that_lets_everything_through_goes() -> None:
    model, graph = captured(everything)
    found = attention(graph)
    assert call(found).args[3:] == (None, 0.0, False)
    same_loss(model, found)


def test_fewer_keys_than_queries() -> None:
    model, graph = captured(short, keys=LENGTH - 2)
    found = attention(graph)
    assert call(found).args[3:] == (None, 0.0, True)
    same_loss(model, found)


@pytest.mark.parametrize(
    "mask",
    [window, sloped, leaning, drawn, of_the_batch, first_sample, shifted, buffered],
)
def test_every_other_mask_stays(mask: Mask) -> None:
    model, graph = captured(mask)
    found = attention(graph)
    assert isinstance(call(found).args[3], torch.fx.Node)
    same_loss(model, found)


def test_a_mask_that_is_too_large_to_compute_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_MOST_ELEMENTS", LENGTH * LENGTH - 1)
    _, graph = captured(causal)
    assert isinstance(call(attention(graph)).args[3], torch.fx.Node)


def test_a_graph_without_masks_is_given_back() -> None:
    class Plain(Attends):
        def forward(self, x: Tensor) -> Tensor:
            q = self.into(x)[..., :WIDTH].unsqueeze(1)
            return F.scaled_dot_product_attention(q, q, q, is_causal=True).sum()

    graph = capture(Plain(causal), (torch.randn(4, LENGTH, WIDTH),))
    assert attention(graph) is graph


@pytest.mark.parametrize("padded", [False, True])
def test_transformers(padded: bool) -> None:
    """A Llama's mask goes, unless the batch brings one of its own."""
    config = transformers.LlamaConfig(
        num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, hidden_size=16,
        intermediate_size=24, vocab_size=32, use_cache=False,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).double()
    ids = torch.randint(0, 32, (4, LENGTH))
    given = {"input_ids": ids, "labels": ids.clone()}
    if padded:
        given["attention_mask"] = torch.ones_like(ids)
        given["attention_mask"][1, 4:] = 0
    graph = attention(capture(model, given))
    calls = [n for n in graph.module.graph.nodes if n.target is SDPA]
    assert len(calls) == 2
    for found in calls:
        assert isinstance(found.args[3], torch.fx.Node) if padded else found.args[5] is True
    torch.testing.assert_close(
        graph.module(*given.values()), model(**given).loss, rtol=1e-12, atol=1e-12
    )
    batch(graph)  # what follows takes it


def test_compile_understands_models_so() -> None:
    example = (torch.randn(4, LENGTH, WIDTH),)
    layered = understand(Attends(causal), example, lambda loss, _: loss, Precision())
    assert call(layered.graph).args[3:] == (None, 0.0, True)
