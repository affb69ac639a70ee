"""Every rule of every operator, run rank by rank in one process without any collective.

Inputs are cut as the rule says (P: random parts), each rank runs the local operator, and outputs
and gradients, put together as their placements say, must be those of the whole operator.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import fx

from galvatron_compile.graph import note
from galvatron_compile.passes.sharding.rules import Emitter, Rule, candidates, tensor_inputs
from galvatron_compile.passes.sharding.rules_base import is_differentiable
from galvatron_compile.passes.sharding.views import shape_of
from galvatron_compile.placement import Placement, R, S

aten = torch.ops.aten
OUTERS = (1, 2, 3)
COLLECTIVE = "vocabulary"  # needs an axis with peers: tested with the operators themselves


def x(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def fixed(value: torch.Tensor) -> torch.Tensor:
    """A float that no gradient flows to, such as class weights."""
    value.constant = True  # type: ignore[attr-defined]
    return value


def ids(high: int, *shape: int) -> torch.Tensor:
    return torch.randint(0, high, shape)


def one_node(target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> fx.Node:
    """``target`` on placeholders for the tensors in args, with real tensors as values."""
    graph = fx.Graph()

    def lift(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            node = graph.placeholder(f"x{len(graph.nodes)}")
            node.meta["val"] = value
            if getattr(value, "constant", False):
                note(node, differentiable=False)
            return node
        if isinstance(value, list):
            return [lift(entry) for entry in value]
        return value

    node = graph.call_function(
        target, tuple(map(lift, args)), {k: lift(v) for k, v in kwargs.items()}
    )
    node.meta["val"] = target(*args, **kwargs)
    return node


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


SDPA = aten.scaled_dot_product_attention.default
CASES: dict[str, tuple[Any, tuple[Any, ...], dict[str, Any]]] = {
    "add broadcast": (aten.add.Tensor, (x(2, 6, 8), x(6, 1)), {}),
    "add scaled": (aten.add.Tensor, (x(4, 6), x(4, 6)), {"alpha": 2.5}),
    "add scalar": (aten.add.Tensor, (x(4, 6), 1.5), {}),
    "sub": (aten.sub.Tensor, (x(4), x(6, 4)), {}),
    "mul": (aten.mul.Tensor, (x(4, 12), x(12)), {}),
    "mul mask": (aten.mul.Tensor, (x(4, 6), ids(2, 4, 6)), {}),
    "div": (aten.div.Tensor, (x(4, 6), x(6)), {}),
    "div 0-dim": (aten.div.Tensor, (x(4, 6), torch.tensor(3)), {}),
    "div rounded": (aten.div.Tensor_mode, (x(4), 3.0), {"rounding_mode": "floor"}),
    "gelu": (aten.gelu.default, (x(4, 6),), {}),
    "pow": (aten.pow.Tensor_Scalar, (x(4, 6), 2), {}),
    "where": (aten.where.self, (ids(2, 4, 1).bool(), x(4, 6), x(6)), {}),
    "masked_fill": (aten.masked_fill.Scalar, (x(4, 6), ids(2, 6).bool(), -1.0), {}),
    "addcmul": (aten.addcmul.default, (x(4, 6), x(6), x(4, 1)), {}),
    "lerp": (aten.lerp.Scalar, (x(4, 6), x(4, 6), 0.3), {}),
    "to": (aten.to.dtype, (x(4, 6), torch.float64), {}),
    "to int": (aten.to.dtype, (x(4, 6), torch.int64), {}),
    "clone": (aten.clone.default, (x(4, 6),), {}),
    "zeros_like": (aten.zeros_like.default, (x(4, 6),), {}),
    "linear": (aten.linear.default, (x(2, 4, 12), x(6, 12), x(6)), {}),
    "linear no bias": (aten.linear.default, (x(4, 12), x(12, 12)), {}),
    "mm": (aten.mm.default, (x(4, 6), x(6, 12)), {}),
    "addmm": (aten.addmm.default, (x(12), x(4, 6), x(6, 12)), {}),
    "addmm scaled": (aten.addmm.default, (x(4, 1), x(4, 6), x(6, 2)), {"beta": 2, "alpha": 3}),
    "bmm": (aten.bmm.default, (x(4, 2, 6), x(4, 6, 2)), {}),
    "baddbmm": (aten.baddbmm.default, (x(1, 2, 4), x(4, 2, 6), x(4, 6, 4)), {}),
    "matmul": (aten.matmul.default, (x(2, 1, 4, 6), x(4, 6, 2)), {}),
    "matmul vector": (aten.matmul.default, (x(4, 6), x(6)), {}),
    "einsum": (aten.einsum.default, ("bshe,bthe->bhst", [x(2, 4, 2, 6), x(2, 6, 2, 6)]), {}),
    "einsum three": (aten.einsum.default, ("ab,bc,c->a", [x(4, 6), x(6, 2), x(2)]), {}),
    "conv2d": (aten.conv2d.default, (x(2, 4, 6, 6), x(6, 4, 3, 3), x(6), [3, 3]), {}),
    "conv1d grouped": (aten.conv1d.default, (x(2, 4, 6), x(4, 1, 3), x(4), [1], [1], [1], 4), {}),
    "view split": (aten.view.default, (x(2, 4, 12), [2, 4, 6, 2]), {}),
    "view minus": (aten.view.default, (x(2, 4, 12), [2, 4, -1, 6]), {}),
    "view merge": (aten.reshape.default, (x(2, 4, 6), [8, 6]), {}),
    "view qkv": (aten.view.default, (x(4, 18), [4, 3, 6]), {}),
    "flatten": (aten.flatten.using_ints, (x(2, 4, 6), 1), {}),
    "unflatten": (aten.unflatten.int, (x(2, 12), 1, [4, 3]), {}),
    "unflatten minus": (aten.unflatten.int, (x(2, 12), -1, [-1, 3]), {}),
    "transpose": (aten.transpose.int, (x(2, 4, 6), 1, -1), {}),
    "permute": (aten.permute.default, (x(2, 4, 6), [2, 0, 1]), {}),
    "t": (aten.t.default, (x(4, 6),), {}),
    "movedim": (aten.movedim.int, (x(2, 4, 6), 0, 2), {}),
    "unsqueeze": (aten.unsqueeze.default, (x(4, 6), 1), {}),
    "squeeze": (aten.squeeze.dim, (x(4, 1, 6), 1), {}),
    "expand": (aten.expand.default, (x(4, 1, 6), [2, 4, 2, -1]), {}),
    "broadcast_tensors": (aten.broadcast_tensors.default, ([x(4, 1), x(2, 4, 6)],), {}),
    "repeat": (aten.repeat.default, (x(4, 6), [2, 1, 3]), {}),
    "slice": (aten.slice.Tensor, (x(4, 6), 1, 2, 5), {}),
    "slice all": (aten.slice.Tensor, (x(4, 6), 1, 0, 2**63 - 1), {}),
    "slice size": (aten.slice.Tensor, (x(4, 6), 1, 0, 6), {}),
    "select": (aten.select.int, (x(2, 4, 6), 1, 3), {}),
    "cat": (aten.cat.default, ([x(4, 6), x(4, 6)], -1), {}),
    "cat uneven": (aten.cat.default, ([x(4, 6), x(4, 2)], 1), {}),
    "stack": (aten.stack.default, ([x(4, 6), x(4, 6)], 1), {}),
    "split": (aten.split.Tensor, (x(4, 12), 4, -1), {}),
    "split uneven": (aten.split.Tensor, (x(4, 12), 5, 1), {}),
    "split sizes": (aten.split_with_sizes.default, (x(4, 12), [4, 4, 4], 1), {}),
    "split uneven sizes": (aten.split_with_sizes.default, (x(4, 12), [8, 2, 2], 1), {}),
    "chunk": (aten.chunk.default, (x(4, 12), 2, -1), {}),
    "chunk uneven": (aten.chunk.default, (x(4, 6), 4, 1), {}),
    "unbind": (aten.unbind.int, (x(4, 2, 6), 1), {}),
    "pad": (aten.pad.default, (x(4, 6), [1, 0]), {}),
    "pad value": (aten.pad.default, (x(4, 6), [1, 2], "constant", 3.0), {}),
    "roll": (aten.roll.default, (x(4, 6), [1], [1]), {}),
    "roll flattened": (aten.roll.default, (x(4, 6), [1]), {}),
    "flip": (aten.flip.default, (x(4, 6), [-1]), {}),
    "cumsum": (aten.cumsum.default, (x(4, 6), 1), {}),
    "diff": (aten.diff.default, (x(4, 6), 1, -1, x(4, 2)), {}),
    "sort": (aten.sort.default, (x(4, 6), 0), {}),
    "topk": (aten.topk.default, (x(4, 6), 2), {}),
    "triu": (aten.triu.default, (x(2, 4, 4), 1), {}),
    "glu": (aten.glu.default, (x(4, 6), 1), {}),
    "softmax": (aten.softmax.int, (x(2, 4, 6), -1), {}),
    "log_softmax": (aten.log_softmax.int, (x(4, 6), 0), {}),
    "layer_norm": (aten.layer_norm.default, (x(2, 4, 6), [6], x(6), x(6)), {}),
    "layer_norm plain": (aten.layer_norm.default, (x(4, 2, 6), [2, 6]), {}),
    "native_layer_norm": (aten.native_layer_norm.default, (x(4, 6), [6], x(6), x(6), 1e-5), {}),
    "rms_norm": (aten.rms_norm.default, (x(4, 6), [6], x(6)), {}),
    "group_norm": (aten.group_norm.default, (x(4, 6, 2), 3, x(6), x(6)), {}),
    "sum": (aten.sum.dim_IntList, (x(2, 4, 6), [1, -1]), {}),
    "sum all": (aten.sum.default, (x(4, 6),), {}),
    "sum kept": (aten.sum.dim_IntList, (x(4, 6), [0], True), {}),
    "mean": (aten.mean.dim, (x(2, 4, 6), [-1], True), {}),
    "mean all": (aten.mean.default, (x(4, 6),), {}),
    "var": (aten.var.correction, (x(4, 6), [1]), {"correction": 0}),
    "amax": (aten.amax.default, (x(4, 6), [0]), {}),
    "max": (aten.max.dim, (x(4, 6), 1), {}),
    "argmax": (aten.argmax.default, (x(4, 6), 1), {}),
    "logsumexp": (aten.logsumexp.default, (x(4, 6), [1]), {}),
    "any": (aten.any.dim, (x(4, 6) > 1, 1), {}),
    "mse sum": (aten.mse_loss.default, (x(4, 6), x(4, 6), 2), {}),
    "mse mean": (aten.mse_loss.default, (x(4, 6), x(4, 6)), {}),
    "mse none": (aten.mse_loss.default, (x(4, 6), x(6), 0), {}),
    "huber": (aten.huber_loss.default, (x(4, 6), x(4, 6), 2, 0.5), {}),
    "bce": (
        aten.binary_cross_entropy_with_logits.default,
        (x(4, 6), x(4, 6).sigmoid(), fixed(x(6).exp()), None, 2),
        {},
    ),
    "cross entropy": (
        aten.cross_entropy_loss.default,
        (x(4, 6), ids(6, 4), fixed(x(6).exp()), 2),
        {},
    ),
    "cross entropy none": (aten.cross_entropy_loss.default, (x(4, 6), ids(6, 4), None, 0), {}),
    "cross entropy image": (
        aten.cross_entropy_loss.default,
        (x(2, 6, 4), ids(6, 2, 4), None, 2),
        {},
    ),
    "cross entropy mean": (aten.cross_entropy_loss.default, (x(4, 6), ids(6, 4)), {}),
    "cross entropy probabilities": (
        aten.cross_entropy_loss.default,
        (x(4, 6), x(4, 6).softmax(-1), None, 2),
        {},
    ),
    "attention": (SDPA, (x(2, 4, 3, 2), x(2, 4, 5, 2), x(2, 4, 5, 6)), {}),
    "attention mask": (
        SDPA,
        (x(2, 4, 3, 2), x(2, 4, 5, 2), x(2, 4, 5, 2), x(2, 1, 3, 5)),
        {"scale": 0.3},
    ),
    "attention head mask": (
        SDPA,
        (x(2, 4, 3, 2), x(2, 4, 3, 2), x(2, 4, 3, 2), x(4, 3, 3)),
        {},
    ),
    "attention causal": (SDPA, (x(2, 4, 3, 2),) * 3, {"is_causal": True}),
    "attention grouped": (
        SDPA,
        (x(2, 8, 3, 2), x(2, 4, 3, 2), x(2, 4, 3, 2)),
        {"enable_gqa": True},
    ),
    "embedding": (aten.embedding.default, (x(12, 6), ids(12, 2, 4), 3), {}),
    "embedding by frequency": (
        aten.embedding.default,
        (x(12, 6), ids(12, 4), -1, True),
        {},
    ),
    "gather": (aten.gather.default, (x(4, 6), 1, ids(6, 4, 2)), {}),
    "gather part": (aten.gather.default, (x(4, 6), 1, ids(6, 2, 2)), {}),
    "index_select": (aten.index_select.default, (x(4, 6), 1, ids(6, 2)), {}),
    "index": (aten.index.Tensor, (x(4, 6, 2), [None, ids(6, 4, 2)]), {}),
    "index pair": (aten.index.Tensor, (x(4, 6, 2), [ids(4, 2, 1), ids(6, 4)]), {}),
    "index apart": (aten.index.Tensor, (x(4, 6, 2), [ids(4, 4), None, ids(2, 4)]), {}),
}


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
