"""Losses of graphs: which are replaced, which logits they read, and what may be written over."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from fuse_cases import ALWAYS, BF16, F32, F64, built, call, check, r
from torch import Tensor, fx

from galvatron_compile import fused, operators
from galvatron_compile.passes.fuse import fuse_graph


def loss(
    before: Callable[..., Any] | None = None, ignore_index: int = -100, smoothing: float = 0.0
) -> Callable[[fx.Graph, list[fx.Node]], Any]:
    """A graph: logits, perhaps through ``before``, targets → the sum of the losses."""

    def make(graph: fx.Graph, places: list[fx.Node]) -> Any:
        logits, labels = places
        read = logits if before is None else before(graph, logits)
        given = (read, labels, None, ignore_index, smoothing)
        return call(graph, operators.cross_entropy_sum, *given)

    return make


def cast(dtype: torch.dtype) -> Callable[..., Any]:
    return lambda graph, x: call(graph, torch.ops.aten.to.dtype, x, dtype)


TARGET = torch.tensor([0, 4, -100, 3, 3, 6])


@pytest.mark.parametrize(
    ("dtype", "to", "reads"),
    [(F32, None, F32), (F64, None, F64), (BF16, F32, BF16), (F64, F32, F32), (F32, F64, F64),
     (F32, BF16, BF16)],
)  # fmt: skip
def test_casts_of_logits_go_where_nothing_is_lost(
    dtype: torch.dtype, to: torch.dtype | None, reads: torch.dtype
) -> None:
    inputs = r(6, 7, dtype=dtype), TARGET
    module = built(loss(before=None if to is None else cast(to)), *inputs)
    after, fusions = fuse_graph(module, ALWAYS)
    assert [fusion.taken for fusion in fusions] == [True]
    [found] = [n for n in after.graph.nodes if n.target in LOSSES]
    assert found.args[0].meta["val"].dtype == reads
    one, other = module(*inputs), after(*inputs)
    assert one.dtype == other.dtype == found.meta["val"].dtype
    rtol = 2e-2 if BF16 in (dtype, to) else 1e-6
    torch.testing.assert_close(other, one, rtol=rtol, atol=0)


LOSSES = (fused.cross_entropy, fused.cross_entropy_over)


def losses(
    between: Callable[[fx.Graph, fx.Node], fx.Node], also: Callable[[fx.Graph, fx.Node], Any] | None
) -> tuple[fx.GraphModule, tuple[Tensor, ...]]:
    """Logits of a linear layer, something between them and the loss, perhaps a second reader."""

    def make(graph: fx.Graph, places: list[fx.Node]) -> Any:
        x, weight, labels = places
        logits = between(graph, call(graph, torch.ops.aten.linear.default, x, weight))
        value = call(graph, operators.cross_entropy_sum, logits, labels, None, -100, 0.0)
        return value if also is None else (value, also(graph, logits))

    inputs = r(2, 3, 4), r(7, 4), TARGET
    return built(make, *inputs), inputs


def rows(graph: fx.Graph, x: fx.Node) -> fx.Node:
    return call(graph, torch.ops.aten.view.default, x, [-1, 7])


def capped(graph: fx.Graph, x: fx.Node) -> fx.Node:
    return call(graph, torch.ops.aten.tanh.default, rows(graph, x))


def test_the_gradient_goes_over_logits_that_nothing_else_reads() -> None:
    """Not over those that a backward reads (of tanh), nor those that something else may."""
    over, other = fused.cross_entropy_over, fused.cross_entropy

    def itself(graph: fx.Graph, x: fx.Node) -> fx.Node:
        return x

    def base(graph: fx.Graph, x: fx.Node) -> fx.Node:
        return x.args[0]  # type: ignore[return-value]

    def under(graph: fx.Graph, x: fx.Node) -> fx.Node:
        return rows(graph, call(graph, torch.ops.aten.reshape.default, x, [3, 2, 7]))

    cases = [
        (rows, None, over), (under, None, over), (capped, None, other), (rows, itself, other),
        (rows, base, other),
    ]  # fmt: skip
    for between, also, wanted in cases:
        module, inputs = losses(between, also)
        after, fusions = fuse_graph(module, ALWAYS)
        assert [fusion.taken for fusion in fusions] == [True]
        assert [n.target for n in after.graph.nodes if n.target in LOSSES] == [wanted]
        assert check(module, *inputs) == ["cross_entropy"]


def test_logits_that_are_given_stay_as_they_are() -> None:
    after, _ = fuse_graph(built(loss(), r(6, 7), TARGET), ALWAYS)
    logits = r(6, 7).requires_grad_()
    before = logits.detach().clone()
    after(logits, TARGET).backward()
    assert torch.equal(logits, before)


def test_the_gradient_over_the_logits_takes_their_memory() -> None:
    logits = (2 * r(6, 7).requires_grad_()).clone()
    seen: list[Tensor] = []
    logits.register_hook(seen.append)
    fused.cross_entropy_over(logits, TARGET, -100, None).backward()
    assert seen[0].data_ptr() == logits.data_ptr()


def test_logits_that_are_read_elsewhere_keep_their_cast() -> None:
    def also(graph: fx.Graph, places: list[fx.Node]) -> Any:
        wide = cast(F32)(graph, places[0])
        value = call(graph, operators.cross_entropy_sum, wide, places[1], None, -100, 0.0)
        z = call(graph, torch.ops.aten.logsumexp.default, wide, [1])
        return (value, z)

    inputs = r(6, 7, dtype=BF16), TARGET
    after, fusions = fuse_graph(built(also, *inputs), ALWAYS)
    assert [fusion.taken for fusion in fusions] == [True]
    [found] = [n for n in after.graph.nodes if n.target in LOSSES]
    assert found.args[0].target is torch.ops.aten.to.dtype


@pytest.mark.parametrize("ignored", [-100, 3])
def test_targets_that_are_ignored(ignored: int) -> None:
    inputs = r(6, 7), TARGET.clamp(min=0)
    assert check(built(loss(ignore_index=ignored), *inputs), *inputs) == ["cross_entropy"]


def test_losses_that_are_not_of_class_indices_alone_stay() -> None:
    inputs = r(6, 7), TARGET
    assert check(built(loss(smoothing=0.1), *inputs), *inputs) == []
    inputs = r(6, 7), r(6, 7).softmax(1)
    assert check(built(loss(), *inputs), *inputs) == []
    inputs = r(2, 7, 3), torch.randint(7, (2, 3))
    assert check(built(loss(), *inputs), *inputs) == []

    def weighted(graph: fx.Graph, places: list[fx.Node]) -> Any:
        return call(graph, operators.cross_entropy_sum, *places)

    assert fuse_graph(built(weighted, r(6, 7), TARGET, r(7).abs()), ALWAYS)[1] == ()


def test_logits_are_viewed_as_they_were_before_their_cast() -> None:
    def cast_then_viewed(graph: fx.Graph, places: list[fx.Node]) -> Any:
        logits = rows(graph, cast(F32)(graph, places[0]))
        return call(graph, operators.cross_entropy_sum, logits, places[1], None, -100, 0.0)

    inputs = r(2, 3, 7, dtype=BF16), TARGET
    module = built(cast_then_viewed, *inputs)
    assert check(module, *inputs, rtol=2e-2) == ["cross_entropy"]
    after, _ = fuse_graph(module, ALWAYS)
    [found] = [n for n in after.graph.nodes if n.target in LOSSES]
    viewed = found.args[0]
    assert viewed.meta["val"].shape == (6, 7) and viewed.meta["val"].dtype == BF16
    assert viewed.args[0].op == "placeholder"


def test_a_view_of_logits_that_something_else_reads_stays() -> None:
    def both(graph: fx.Graph, places: list[fx.Node]) -> Any:
        logits = rows(graph, cast(F32)(graph, places[0]))
        value = call(graph, operators.cross_entropy_sum, logits, places[1], None, -100, 0.0)
        return (value, call(graph, torch.ops.aten.logsumexp.default, logits, [1]))

    inputs = r(2, 3, 7, dtype=BF16), TARGET
    module = built(both, *inputs)
    assert check(module, *inputs, rtol=2e-2) == ["cross_entropy"]
