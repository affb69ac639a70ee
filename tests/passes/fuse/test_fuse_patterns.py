"""Norms, gates, rotary embeddings: patterns, and what looks like one and is not; values stay."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from fuse_cases import ALWAYS, BF16, built, call, check, exported, r
from torch import Tensor, fx

from galvatron_compile import collectives, fused
from galvatron_compile.passes.fuse import fuse_graph
from galvatron_compile.passes.fuse_match import holds


def norm(x: Tensor, eps: float = 1e-6) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)


def turn(x: Tensor, cos: Any, sin: Any) -> Tensor:
    half = x.shape[-1] // 2
    return x * cos + torch.cat((-x[..., half:], x[..., :half]), -1) * sin


def squared(x: Tensor) -> Tensor:
    found = norm(x)
    return found * found


def gated_by_itself(x: Tensor) -> Tensor:
    silu = F.silu(x)
    return silu * silu


def of_a_sum_of_itself(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    total = x + x
    return w * norm(total), total


TAKEN: dict[str, tuple[str, Callable[..., Any], tuple[Tensor, ...]]] = {
    "norm": ("rms_norm", lambda x, w: w * norm(x), (r(2, 3, 8), r(8))),
    "weight behind": ("rms_norm", lambda x, w: norm(x) * w, (r(2, 3, 8), r(8))),
    "weight of Gemma": ("rms_norm", lambda x, w: norm(x) * (1.0 + w), (r(2, 3, 8), r(8))),
    "a positive dim": (
        "rms_norm",
        lambda x, w: w * (x * torch.rsqrt(x.pow(2).mean(2, keepdim=True) + 1e-6)),
        (r(2, 3, 8), r(8)),
    ),
    "sum of itself": ("add_rms_norm", of_a_sum_of_itself, (r(2, 8), r(8))),
    "of torch": ("rms_norm", lambda x, w: F.rms_norm(x, (8,), w, 0.1), (r(2, 8), r(8))),
    "of torch, no eps": ("rms_norm", lambda x, w: F.rms_norm(1e-8 * x, (8,), w), (r(2, 8), r(8))),
    "of torch, of a sum": (
        "add_rms_norm", lambda x, y, w: F.rms_norm(x + y, (8,), w, 0.1), (r(2, 8), r(2, 8), r(8)),
    ),
    "layer norm": (
        "layer_norm", lambda x, w, b: F.layer_norm(x, (8,), w, b, 0.1), (r(2, 8), r(8), r(8)),
    ),
    "layer norm, bare": ("layer_norm", lambda x: F.layer_norm(x, (8,)), (r(2, 8),)),
    "layer norm of a sum": (
        "add_layer_norm",
        lambda x, y, w: F.layer_norm(x + y, (8,), w),
        (r(2, 8), r(2, 8), r(8)),
    ),
    "gate": ("swiglu", lambda x, y: F.silu(x) * y, (r(2, 8), r(2, 8))),
    "gate behind": ("swiglu", lambda x, y: y * F.silu(x), (r(2, 8), r(2, 8))),
    "gate of itself": ("swiglu", lambda x: F.silu(x) * x, (r(2, 8),)),
    "turned": ("rotary", turn, (r(2, 3, 4, 6), r(2, 1, 4, 6), r(2, 1, 4, 6))),
    "turned by one table": ("rotary", turn, (r(2, 3, 4, 6), r(1, 1, 4, 6), r(1, 1, 4, 6))),
    "turned in part": (
        "rotary",
        lambda x, c, s: torch.cat((turn(x[..., :4], c, s), x[..., 4:]), -1),
        (r(2, 3, 5, 6), r(2, 1, 5, 4), r(2, 1, 5, 4)),
    ),
}  # fmt: skip

WEIGHT, TABLES = r(8), (r(2, 1, 4, 6), r(2, 1, 4, 6))
LEFT: dict[str, tuple[Callable[..., Any], tuple[Tensor, ...]]] = {
    "a weight that spreads": (lambda x, w: w * norm(x), (r(2, 3, 8), r(1))),
    "a value that spreads": (lambda x, w: w * norm(x), (r(2, 3, 1), WEIGHT)),
    "a weight of rows": (lambda x, w: w * norm(x), (r(8, 8), r(8, 1))),
    "a norm with a norm for its weight": (squared, (r(8),)),
    "a scaled eps": (
        lambda x, w: w * (x * torch.rsqrt(
            torch.add(x.pow(2).mean(-1, keepdim=True), 1e-2, alpha=3))),
        (r(2, 8), WEIGHT),
    ),
    "a mean in few digits": (
        lambda x, w: w * (x * torch.rsqrt(
            x.pow(2).mean(-1, keepdim=True, dtype=BF16) + 1e-6)),
        (r(2, 8), WEIGHT),
    ),
    "another value is squared": (
        lambda x, y, w: w * (y * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)),
        (r(2, 8), r(2, 8), WEIGHT),
    ),
    "fewer digits inside": (lambda x, w: w * norm(x.float()).double(), (r(2, 8), WEIGHT)),
    "fewer digits behind": (lambda x, w: w * norm(x).bfloat16().double(), (r(2, 8), WEIGHT)),
    "a norm over two dims": (
        lambda x, w: F.layer_norm(x, (3, 8), w), (r(2, 3, 8), r(3, 8)),
    ),
    "an rms norm over two dims": (
        lambda x, w: F.rms_norm(x, (3, 8), w), (r(2, 3, 8), r(3, 8)),
    ),
    "an rms norm without a weight": (lambda x: F.rms_norm(x, (8,)), (r(2, 8),)),
    "gated by itself": (gated_by_itself, (r(2, 8),)),
    "another gate": (lambda x, y: F.gelu(x) * y, (r(2, 8), r(2, 8))),
    "a gate that spreads": (lambda x, y: F.silu(x) * y, (r(2, 1), r(2, 8))),
    "a number for up": (lambda x: F.silu(x) * 2.0, (r(2, 8),)),
    "an odd dim": (turn, (r(2, 3, 4, 5), r(2, 1, 4, 5), r(2, 1, 4, 5))),
    "heads behind positions": (turn, (r(2, 1, 3, 6), r(2, 1, 1, 6), r(2, 1, 1, 6))),
    "one row for all positions": (turn, (r(2, 3, 4, 6), r(2, 1, 1, 6), r(2, 1, 1, 6))),
    "tables for more batches": (turn, (r(1, 3, 4, 6), *TABLES)),
    "a table for each head": (turn, (r(2, 3, 4, 6), r(2, 3, 4, 6), r(2, 3, 4, 6))),
    "numbers for tables": (lambda x: turn(x, 2.0, 3.0), (r(2, 3, 4, 6),)),
    "three dims": (turn, (r(3, 4, 6), r(3, 4, 6), r(3, 4, 6))),
    "turned the other way": (
        lambda x, c, s: x * c + torch.cat((x[..., 3:], -x[..., :3]), -1) * s,
        (r(2, 3, 4, 6), *TABLES),
    ),
    "both turned": (
        lambda x, c, s: x * c + torch.cat((-x[..., 3:], -x[..., :3]), -1) * s,
        (r(2, 3, 4, 6), *TABLES),
    ),
    "not turned": (
        lambda x, c, s: x * c + torch.cat((-x[..., :3], x[..., 3:]), -1) * s,
        (r(2, 3, 4, 6), *TABLES),
    ),
    "uneven parts": (
        lambda x, c, s: x * c + torch.cat((-x[..., 3:5], x[..., :4]), -1) * s,
        (r(2, 3, 4, 6), *TABLES),
    ),
    "bent, not turned": (
        lambda x, c, s: x * c + torch.cat((x[..., 3:].relu(), x[..., :3]), -1) * s,
        (r(2, 3, 4, 6), *TABLES),
    ),
    "thirds": (
        lambda x, c, s: x * c + torch.cat((-x[..., 2:], x[..., :2]), -1) * s,
        (r(2, 3, 4, 6), *TABLES),
    ),
    "pairs side by side": (
        lambda x, c, s: x * c + torch.cat((-x[..., 1::2], x[..., ::2]), -1) * s,
        (r(2, 3, 4, 6), *TABLES),
    ),
    "a part of another value": (
        lambda x, y, c, s: x * c + torch.cat((-y[..., 3:], x[..., :3]), -1) * s,
        (r(2, 3, 4, 6), r(2, 3, 4, 6), *TABLES),
    ),
    "twice the turned part": (
        lambda x, c, s: torch.add(
            x * c, torch.cat((-x[..., 3:], x[..., :3]), -1) * s, alpha=2),
        (r(2, 3, 4, 6), *TABLES),
    ),
    "joined along the positions": (  # which spread
        lambda x, c, s: x * c + torch.cat((-x[..., 1:], x[..., :1]), 2) * s,
        (r(2, 3, 1, 2), r(2, 1, 1, 2), r(2, 1, 1, 2)),
    ),
    "nothing joined": (
        lambda x, c, s: x * c + torch.cat((-x,), -1) * s, (r(2, 3, 4, 6), *TABLES),
    ),
    "means of rows for columns": (
        lambda x, w: w * (x * torch.rsqrt(x.pow(2).mean(-1) + 1e-6)), (r(8, 8), WEIGHT),
    ),
    "a mean of fourth powers": (
        lambda x, w: w * (x * torch.rsqrt(x.pow(4).mean(-1, keepdim=True) + 1e-6)),
        (r(2, 8), WEIGHT),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", TAKEN)
def test_a_pattern_is_replaced(case: str) -> None:
    name, function, inputs = TAKEN[case]
    assert check(exported(function, *inputs), *inputs) == [name]


@pytest.mark.parametrize("case", LEFT)
def test_what_is_no_pattern_stays(case: str) -> None:
    function, inputs = LEFT[case]
    assert check(exported(function, *inputs), *inputs) == []


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
