"""Every rule of every operator, run rank by rank in one process without any collective.

Inputs are cut as the rule says (P: random parts), each rank runs the local operator, and outputs
and gradients, put together as their placements say, must be those of the whole operator.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from rule_cases import CASES, SDPA, ids, one_node, x
from torch import fx

from galvatron_compile.passes.sharding.rules import Emitter, Rule, candidates, tensor_inputs
from galvatron_compile.passes.sharding.rules_base import is_differentiable
from galvatron_compile.passes.sharding.views import shape_of
from galvatron_compile.placement import Placement, R, S

aten = torch.ops.aten
OUTERS = (1, 2, 3)
COLLECTIVE = "vocabulary"  # needs an axis with peers: tested with the operators themselves


def blocks(value: torch.Tensor, place: Placement, n: int) -> list[torch.Tensor]:
    """The ranks' values: S cut, P and (for gradients, V) see the callers."""
    if not place.is_shard:
        return [value] * n
    size = value.shape[place.dim]
    cut = value.unflatten(place.dim, (place.outer, n, size // place.outer // n))
    return [cut.select(place.dim + 1, r).flatten(place.dim, place.dim + 1) for r in range(n)]


def parts(value: torch.Tensor, n: int) -> list[torch.Tensor]:
    random = [torch.randn_like(value) for _ in range(n - 1)]
    return [*random, value - sum(random)]


def joined(values: list[torch.Tensor], place: Placement) -> torch.Tensor:
    if not place.is_shard:
        return values[0]
    pieces = [v.unflatten(place.dim, (place.outer, -1)) for v in values]
    return torch.stack(pieces, place.dim + 1).flatten(place.dim, place.dim + 2)


def local_module(node: fx.Node, rule: Rule, n: int) -> fx.GraphModule:
    graph = fx.Graph()
    mapping = {old: graph.placeholder(old.name) for old in node.graph.find_nodes(op="placeholder")}
    args = fx.map_arg(node.args, mapping.__getitem__)
    kwargs = fx.map_arg(node.kwargs, mapping.__getitem__)
    if rule.emit is None:
        out = graph.call_function(node.target, args, kwargs)
    else:
        out = rule.emit(Emitter(graph, node, args, kwargs, None, n))  # type: ignore[arg-type]
    graph.output(out)
    return fx.GraphModule({}, graph)


def tensors(value: Any) -> list[torch.Tensor]:
    return list(value) if isinstance(value, list | tuple) else [value]


def check(node: fx.Node, rule: Rule, n: int) -> None:
    sources = tensor_inputs(node)
    inputs = [value.meta["val"] for value in sources]
    trained = [is_differentiable(value) for value in sources]
    assert len(rule.inputs) == len(inputs)
    full_in = [v.clone().requires_grad_(t) for v, t in zip(inputs, trained, strict=True)]
    identity = Rule("whole", (), ())
    full_out = tensors(local_module(node, identity, 1)(*full_in))
    assert len(rule.outputs) == len(full_out)
    live = [i for i, out in enumerate(full_out) if out.requires_grad]
    gradients = [torch.randn_like(full_out[i]) for i in live]
    if live:
        torch.autograd.backward([full_out[i] for i in live], gradients)

    local_in = []
    for value, place in zip(inputs, rule.inputs, strict=True):
        local_in.append(parts(value, n) if place.kind == "P" else blocks(value, place, n))
    local_out_gradients = [
        parts(g, n) if rule.outputs[i].kind == "V" else blocks(g, rule.outputs[i], n)
        for i, g in zip(live, gradients, strict=True)
    ]
    module = local_module(node, rule, n)
    outs, grads = [], []
    for rank in range(n):
        mine = [
            v[rank].detach().clone().requires_grad_(t)
            for v, t in zip(local_in, trained, strict=True)
        ]
        out = tensors(module(*mine))
        if live:
            torch.autograd.backward([out[i] for i in live], [g[rank] for g in local_out_gradients])
        outs.append(out)
        grads.append([v.grad if v.grad is not None else torch.zeros_like(v) for v in mine])

    for i, place in enumerate(rule.outputs):
        got = [out[i].detach() for out in outs]
        compare(got, place, full_out[i].detach(), summed="P")
    for i, place in enumerate(rule.inputs):
        if trained[i]:
            wanted = full_in[i].grad
            wanted = torch.zeros_like(inputs[i]) if wanted is None else wanted
            compare([g[i] for g in grads], place, wanted, summed="V")


def compare(got: list[torch.Tensor], place: Placement, wanted: torch.Tensor, summed: str) -> None:
    close = {"rtol": 1e-9, "atol": 1e-9} if wanted.is_floating_point() else {"rtol": 0, "atol": 0}
    if place.kind == summed:
        torch.testing.assert_close(sum(got), wanted, **close)
    elif place.is_shard:
        torch.testing.assert_close(joined(got, place), wanted, **close)
    else:
        for value in got:
            torch.testing.assert_close(value, wanted, **close)


@pytest.mark.parametrize("n", [2, 3])
@pytest.mark.parametrize("name", CASES)
def test_every_rule_gives_the_whole_operators_values_and_gradients(name: str, n: int) -> None:
    torch.manual_seed(0)
    target, args, kwargs = CASES[name]
    node = one_node(target, args, kwargs)
    rules = candidates(node, n, outers=OUTERS)
    assert rules[0].inputs == (R,) * len(tensor_inputs(node))
    for rule in rules:
        if rule.name == COLLECTIVE:
            continue
        try:
            check(node, rule, n)
        except (AssertionError, RuntimeError) as error:
            shapes = [tuple(shape_of(v.meta["val"])) for v in tensor_inputs(node)]
            text = (
                f"{rule.name}: {[*map(str, rule.inputs)]} -> {[*map(str, rule.outputs)]} {shapes}"
            )
            raise AssertionError(f"{text}\n{error}") from error


def names(target: Any, *args: Any, n: int = 2, **kwargs: Any) -> set[str]:
    return {rule.name for rule in candidates(one_node(target, args, kwargs), n, outers=OUTERS)}


def has(target: Any, args: tuple[Any, ...], inputs: str, outputs: str, **kwargs: Any) -> bool:
    rules = candidates(one_node(target, args, kwargs), 2, outers=OUTERS)
    pairs = {(" ".join(map(str, r.inputs)), " ".join(map(str, r.outputs))) for r in rules}
    return (inputs, outputs) in pairs


LINEAR = (x(2, 4, 12), x(6, 12), x(6))


@pytest.mark.parametrize(
    ("inputs", "outputs"),
    [("V S(0) S(0)", "S(2)"), ("S(2) S(1) P", "P"), ("S(1) V V", "S(1)"), ("P V P", "P")],
)
def test_a_linear_layer_can_be_column_row_and_sequence_parallel(inputs: str, outputs: str) -> None:
    assert has(aten.linear.default, LINEAR, inputs, outputs)


def test_a_fused_projection_of_three_pieces_is_split_block_by_block() -> None:
    assert has(aten.split.Tensor, (x(4, 18), 6, -1), "S(1,3)", "S(1) S(1) S(1)")
    assert not has(aten.split.Tensor, (x(4, 18), 6, -1), "S(1)", "S(1) S(1) S(1)")


def test_grouped_heads_are_split_only_where_the_key_heads_divide() -> None:
    query, key = x(2, 8, 3, 2), x(2, 2, 3, 2)
    assert "shard 1" in names(SDPA, query, key, key, enable_gqa=True, n=2)
    assert "shard 1" not in names(SDPA, query, key, key, enable_gqa=True, n=4)


def test_a_constant_is_never_added_to_a_partial_sum() -> None:
    assert "partial" not in names(aten.add.Tensor, x(4), 1.0)
    assert "partial" in names(aten.mul.Tensor, x(4), 2.0)


def test_a_vocabulary_can_be_split_in_the_lookup() -> None:
    assert has(aten.embedding.default, (x(12, 6), ids(12, 4)), "S(0) R", "P")


def test_an_operator_without_a_rule_runs_on_whole_values() -> None:
    assert names(aten.linalg_inv.default, x(4, 4)) == {"replicate", "same"}


def test_values_without_a_gradient_stay_whole_on_the_tensor_axis() -> None:
    assert names(aten.add.Tensor, ids(5, 4), ids(5, 4)) == {"replicate"}


def test_a_mask_with_one_head_is_not_split_over_heads() -> None:
    args = (*(x(2, 4, 3, 2),) * 3, ids(2, 2, 1, 3, 3).bool())
    assert has(SDPA, args, "S(1) S(1) S(1) R", "S(1)")
    assert S(1) not in {r.inputs[3] for r in candidates(one_node(SDPA, args, {}), 2, outers=(1,))}
