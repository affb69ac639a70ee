"""Collectives beside products, mixtures of experts: what stays, and the reason that is given."""

from __future__ import annotations

import operator
from typing import Any

import pytest
import torch
from fuse_cases import ALWAYS, built, call, check, exported, r
from torch import Tensor, fx

from galvatron_compile import collectives, fused
from galvatron_compile.passes.fuse import fuse_graph


def gathered(graph: fx.Graph, x: fx.Node, *weights: fx.Node, dim: int = 1) -> list[fx.Node]:
    whole = call(graph, collectives.all_gather, x, dim, 1, graph.get_attr("axis"))
    return [call(graph, torch.ops.aten.linear.default, whole, weight) for weight in weights]


def test_parts_of_a_joined_product_may_be_viewed() -> None:
    """Each linear layer's output was contiguous; now it is a slice of one matrix."""

    def two(graph: fx.Graph, places: list[fx.Node]) -> Any:
        one, other = gathered(graph, *places)
        view = torch.ops.aten.view.default
        turned = call(graph, torch.ops.aten.unsqueeze.default, other, 0)
        pair = graph.call_function(torch.ops.aten.chunk.default, (one, 1, -1))
        pair.meta["val"] = one.meta["val"].chunk(1, -1)
        part = call(graph, operator.getitem, pair, 0)
        return (
            call(graph, view, one, [-1]), call(graph, view, turned, [-1]),
            call(graph, view, part, [-1]),
        )  # fmt: skip

    inputs = r(2, 3, 4), r(5, 4), r(6, 4)
    assert check(built(two, *inputs), *inputs) == ["all_gather → linear"]


def reasons(module: fx.GraphModule) -> list[str]:
    return [fusion.why_not for fusion in fuse_graph(module, ALWAYS)[1]]


def test_why_a_gather_is_left() -> None:
    def last(graph: fx.Graph, places: list[fx.Node]) -> Any:
        return gathered(graph, *places, dim=2)

    assert reasons(built(last, r(2, 3, 4), r(5, 8))) == [
        "it gathers the features that the products sum over"
    ]

    def made(graph: fx.Graph, places: list[fx.Node]) -> Any:
        return gathered(graph, places[0], call(graph, torch.ops.aten.neg.default, places[1]))

    assert reasons(built(made, r(2, 3, 4), r(5, 4))) == [
        "neg_default, which a product reads, is no parameter as it is"
    ]

    def kept(graph: fx.Graph, places: list[fx.Node]) -> Any:
        [product] = gathered(graph, *places)
        return (product, product.args[0])

    assert reasons(built(kept, r(2, 3, 4), r(5, 4))) == ["not only linear layers read it"]


def scattered(graph: fx.Graph, product: fx.Node, dim: int = 1) -> fx.Node:
    return call(graph, collectives.reduce_scatter, product, dim, 1, graph.get_attr("axis"))


def test_a_chain_of_patterns_reads_what_stands_there_now() -> None:
    """The call of one reads the result of another, of which neither node is left."""

    def chain(graph: fx.Graph, places: list[fx.Node]) -> Any:
        x, weight, scale = places
        product = call(graph, torch.ops.aten.linear.default, x, weight)
        y = scattered(graph, product)
        normed = call(graph, torch.ops.aten.rms_norm.default, y, [6], scale, 1e-6)
        return call(graph, torch.ops.aten.mul.Tensor, call(graph, torch.ops.aten.silu.default,
                    normed), y)  # fmt: skip

    module = built(chain, r(2, 4, 4), r(6, 4), r(6))
    after, fusions = fuse_graph(module, ALWAYS)
    assert [fusion.taken for fusion in fusions] == [True, True, True]
    called = [n.target for n in after.graph.nodes if n.op == "call_function"]
    assert called == [fused.linear_reduce_scatter, fused.rms_norm, fused.swiglu]


def test_why_a_sum_is_left() -> None:
    linear = torch.ops.aten.linear.default

    def last(graph: fx.Graph, places: list[fx.Node]) -> Any:
        return scattered(graph, call(graph, linear, *places), 2)

    inputs = r(2, 4, 4), r(6, 4)
    assert reasons(built(last, *inputs)) == ["it scatters the features that the product makes"]

    def other(graph: fx.Graph, places: list[fx.Node]) -> Any:
        return scattered(graph, places[0])

    assert reasons(built(other, *inputs)) == [
        "what it sums is not the output of one linear layer"
    ]

    def kept(graph: fx.Graph, places: list[fx.Node]) -> Any:
        product = call(graph, linear, *places)
        return (scattered(graph, product), product)

    assert reasons(built(kept, *inputs)) == ["linear_default is read elsewhere too"]

    def biased(graph: fx.Graph, places: list[fx.Node]) -> Any:
        return scattered(graph, call(graph, linear, *places))

    assert reasons(built(biased, *inputs, r(6))) == [
        "its bias x2 is not split for this sum"
    ]

    def split_elsewhere(graph: fx.Graph, places: list[fx.Node]) -> Any:
        other = graph.get_attr("axis")  # another node: another axis
        split = call(graph, collectives.split_sum, places[2], other)
        return scattered(graph, call(graph, linear, *places[:2], split))

    assert reasons(built(split_elsewhere, *inputs, r(6))) == [
        "its bias split_sum is not split for this sum"
    ]


@pytest.mark.parametrize("biased", [True, False])
def test_a_product_and_the_scatter_of_its_sum_are_one(biased: bool) -> None:
    def one(graph: fx.Graph, places: list[fx.Node]) -> Any:
        axis = graph.get_attr("axis")
        more = [call(graph, collectives.split_sum, places[2], axis)] if biased else []
        product = call(graph, torch.ops.aten.linear.default, *places[:2], *more)
        return call(graph, collectives.reduce_scatter, product, 1, 1, axis)

    module = built(one, r(2, 4, 4), r(6, 4), r(6))
    after, fusions = fuse_graph(module, ALWAYS)
    assert [fusion.taken for fusion in fusions] == [True]
    [found] = [n for n in after.graph.nodes if n.target is fused.linear_reduce_scatter]
    assert [getattr(x, "name", x) for x in found.args[:5]] == [
        "x0", "x1", "x2" if biased else None, 1, 1
    ]  # fmt: skip
    assert not any(n.target is collectives.split_sum for n in after.graph.nodes)


# Mixtures of experts, as transformers writes them with experts_implementation="batched_mm".


def mixture(x: Tensor, weights: Tensor, choice: Tensor, gates: Tensor) -> Tensor:
    k = choice.shape[1]
    rows = x.repeat_interleave(k, 0).unsqueeze(-1)
    products = torch.bmm(weights[choice.reshape(-1)], rows).squeeze(-1)
    return (products * gates.reshape(-1).unsqueeze(-1)).view(-1, k, weights.shape[1]).sum(1)


def test_a_mixture_of_experts_is_declined_with_a_reason() -> None:
    inputs = r(6, 4), r(3, 5, 4), torch.randint(3, (6, 2)), r(6, 2)
    module = exported(mixture, *inputs)
    assert check(module, *inputs) == []
    [found] = fuse_graph(module, ALWAYS)[1]
    assert found.name == "permute, unpermute"
    assert found.why_not.startswith("tokens are not sorted by expert")
    assert found.covers[0].startswith("index") and found.covers[-1].startswith("sum")


def test_another_sum_of_products_is_no_mixture() -> None:
    def weighted(x: Tensor, gates: Tensor) -> Tensor:
        return (x * gates).view(3, 2, 4).sum(1)

    assert fuse_graph(exported(weighted, r(6, 4), r(6, 1)), ALWAYS)[1] == ()
