"""Norms beside additions, casts and conversions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from fuse_cases import ALWAYS, BF16, built, call, check, exported, norm, r
from torch import Tensor, fx

from galvatron_compile import collectives, fused
from galvatron_compile.passes.fuse import fuse_graph
from galvatron_compile.passes.fuse_match import holds


def test_an_addition_of_two_norms_goes_into_one_and_the_other_reads_it() -> None:
    def two(x: Tensor, y: Tensor, w: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        total = x + y
        return w * norm(total), v * norm(total, 1e-2), total

    inputs = r(2, 8), r(2, 8), r(8), r(8)
    assert check(exported(two, *inputs), *inputs) == ["add_rms_norm", "rms_norm"] or check(
        exported(two, *inputs), *inputs
    ) == ["rms_norm", "add_rms_norm"]


def test_a_weight_made_behind_the_addition_leaves_the_addition() -> None:
    def late(x: Tensor, y: Tensor, w: Tensor) -> Tensor:
        total = x + y
        return norm(total) * (w + 1.0) + total

    inputs = r(2, 8), r(2, 8), r(8)
    assert check(exported(late, *inputs), *inputs) == ["rms_norm"]


def test_an_addition_with_a_factor_is_not_that_of_a_residual() -> None:
    def scaled(x: Tensor, y: Tensor, w: Tensor) -> Tensor:
        return w * norm(torch.add(x, y, alpha=2))

    inputs = r(2, 8), r(2, 8), r(8)
    assert check(exported(scaled, *inputs), *inputs) == ["rms_norm"]
    inputs = r(2, 8), r(8), r(8)
    assert check(exported(lambda x, y, w: w * norm(x + y), *inputs), *inputs) == ["rms_norm"]


def test_an_addition_that_widens_is_not_that_of_a_residual() -> None:
    inputs = r(2, 8, dtype=torch.float32), r(2, 8), r(8)
    module = exported(lambda x, y, w: w * norm(x + y), *inputs)
    assert check(module, *inputs) == ["rms_norm"]


def test_a_layer_norm_that_does_not_say_its_eps() -> None:
    def bare(graph: fx.Graph, places: list[fx.Node]) -> Any:
        return call(graph, torch.ops.aten.layer_norm.default, places[0], [8])

    inputs = (1e-3 * r(2, 8),)
    assert check(built(bare, *inputs), *inputs) == ["layer_norm"]


def test_a_norm_in_float32_of_16_bits() -> None:
    """As in Hugging Face: rounded once where the casts round twice."""
    inputs = r(2, 8, dtype=BF16), r(8, dtype=BF16)
    graph = exported(lambda x, w: w * norm(x.float()).bfloat16(), *inputs)
    assert check(graph, *inputs, rtol=2e-2) == ["rms_norm"]


def test_a_sum_over_ranks_with_itself_is_added_once() -> None:
    """The residual must not be the sum that goes."""

    def twice(graph: fx.Graph, places: list[fx.Node]) -> Any:
        axis = graph.get_attr("axis")
        total = call(graph, collectives.all_reduce, places[0], axis)
        added = call(graph, torch.ops.aten.add.Tensor, total, total)
        return call(graph, torch.ops.aten.rms_norm.default, added, [8], places[1], 1e-6)

    after, fusions = fuse_graph(built(twice, r(2, 8), r(8)), ALWAYS)
    assert [fusion.name for fusion in fusions if fusion.taken] == ["add_rms_norm"]
    assert any(node.target is collectives.all_reduce for node in after.graph.nodes)


@pytest.mark.parametrize("first", [True, False])
def test_a_sum_over_ranks_may_be_either_term(first: bool) -> None:
    def added(graph: fx.Graph, places: list[fx.Node]) -> Any:
        x, residual, weight = places
        total = call(graph, collectives.all_reduce, x, graph.get_attr("axis"))
        terms = (total, residual) if first else (residual, total)
        both = call(graph, torch.ops.aten.add.Tensor, *terms)
        return call(graph, torch.ops.aten.rms_norm.default, both, [8], weight, 1e-6)

    inputs = r(2, 8), r(2, 8), r(8)
    module = built(added, *inputs)
    assert check(module, *inputs) == ["all_reduce + add_rms_norm"]
    after, _ = fuse_graph(module, ALWAYS)
    [found] = [n for n in after.graph.nodes if n.target is fused.all_reduce_add_rms_norm]
    assert [x.name for x in found.args[:3]] == ["x0", "x1", "x2"]


def test_a_sum_over_ranks_that_is_read_elsewhere_stays() -> None:
    def kept(graph: fx.Graph, places: list[fx.Node]) -> Any:
        x, residual, weight = places
        total = call(graph, collectives.all_reduce, x, graph.get_attr("axis"))
        both = call(graph, torch.ops.aten.add.Tensor, total, residual)
        return (call(graph, torch.ops.aten.rms_norm.default, both, [8], weight, 1e-6), total)

    inputs = r(2, 8), r(2, 8), r(8)
    assert check(built(kept, *inputs), *inputs) == ["add_rms_norm"]


def test_which_dtype_holds_which() -> None:
    f64, f32, f16, bf16 = torch.float64, torch.float32, torch.float16, torch.bfloat16
    every = (f64, f32, f16, bf16, torch.float8_e4m3fn)
    held = {(a, b) for a in every for b in every if holds(a, b)}
    wider = {(f64, f32), (f64, f16), (f64, bf16), (f32, f16), (f32, bf16)}
    small = {(a, torch.float8_e4m3fn) for a in (f64, f32, f16, bf16)}
    assert held == wider | small | {(a, a) for a in every}
    assert not holds(torch.float8_e4m3fnuz, torch.float8_e4m3fn)  # ends at 240, not 448


def test_a_norm_of_integers_reads_them_as_they_were_cast() -> None:
    inputs = torch.arange(16).view(2, 8), r(8)
    module = exported(lambda x, w: w * norm(x.double()), *inputs)
    assert check(module, *inputs) == ["rms_norm"]


def test_a_conversion_inside_of_a_norm_goes_in_front_of_it() -> None:
    """The weight is V there; gradients of the value are summed once, in front of the norm."""

    def inside(graph: fx.Graph, places: list[fx.Node]) -> Any:
        aten = torch.ops.aten
        x, weight = places
        square = call(graph, aten.pow.Tensor_Scalar, x, 2)
        mean = call(graph, aten.mean.dim, square, [-1], True)
        root = call(graph, aten.rsqrt.default, call(graph, aten.add.Tensor, mean, 1e-6))
        scaled = call(graph, aten.mul.Tensor, x, root)
        axis = graph.get_attr("axis")
        varying = call(graph, collectives.all_reduce_gradient, scaled, axis)
        return call(graph, aten.mul.Tensor, weight, varying)

    inputs = r(2, 8), r(8)
    module = built(inside, *inputs)
    assert check(module, *inputs) == ["rms_norm"]
    after, _ = fuse_graph(module, ALWAYS)
    [turned] = [n for n in after.graph.nodes if n.target is collectives.all_reduce_gradient]
    assert turned.args[0].op == "placeholder" and turned.meta["val"].shape == (2, 8)
    [norm_] = turned.users
    assert norm_.args[0] is turned


def test_an_addition_in_front_of_a_conversion_stays() -> None:
    """Its other readers get gradients that are not summed."""

    def inside(graph: fx.Graph, places: list[fx.Node]) -> Any:
        aten = torch.ops.aten
        x, other, weight = places
        total = call(graph, aten.add.Tensor, x, other)
        square = call(graph, aten.pow.Tensor_Scalar, total, 2)
        mean = call(graph, aten.mean.dim, square, [-1], True)
        root = call(graph, aten.rsqrt.default, call(graph, aten.add.Tensor, mean, 1e-6))
        scaled = call(graph, aten.mul.Tensor, total, root)
        varying = call(graph, collectives.all_reduce_gradient, scaled, graph.get_attr("axis"))
        return (call(graph, aten.mul.Tensor, weight, varying), total)

    inputs = r(2, 8), r(2, 8), r(8)
    assert check(built(inside, *inputs), *inputs) == ["rms_norm"]
