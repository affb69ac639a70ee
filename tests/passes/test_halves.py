"""Explicit forward and backward graphs give what autograd gives, whole and in two halves."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import piece_cases as cases
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from piece_cases import constant
from torch import Tensor, fx
from torch.nn import functional as F

from galvatron_compile.random_operators import seeded

aten = torch.ops.aten
ROWS, WIDTH, TABLE = 4, 6, 5


def number(*shape: int, dtype: torch.dtype = torch.float64, grad: bool = True) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape) * 31 + len(shape))
    value = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
    return value.requires_grad_(grad)


# Layers by hand, one for each thing that once was or may be special.


def linear(x, w, b, seed):
    return (F.gelu(F.linear(x, w, b)),)


def attention(x, w, seed):
    q, k, v = (x @ w).view(2, ROWS, 2, 3, 3).unbind(3)
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    return (F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2),)


def chunks(x, w, seed):
    gate, up = (x @ w).chunk(2, -1)
    return (F.silu(gate) * up,)


def in_place(x, w, seed):
    y = x @ w
    y.add_(1.0)
    z = y * 2.0
    z.add_(y.sigmoid())
    return (z.tanh_(), y)


def in_place_on_a_view(x, w, seed):
    y = x @ w
    z = y.sin()
    z.view(-1).mul_(2.0)
    return (z.cos() * y,)


def embedding(ids, table, seed):
    return (F.embedding(ids, table).tanh(),)


def twice_one_table(ids, table, seed):
    h = F.embedding(ids, table).tanh()
    return (h @ table.t(),)


def dropout(x, w, seed):
    first = seeded(aten.dropout.default, seed, 0, 0, x @ w, 0.4, True)
    second = seeded(aten.dropout.default, seed, 1, 0, first, 0.4, True)
    return (first + second,)


def attention_dropout(x, seed):
    h = x.view(2, 2, ROWS, 3)
    out = seeded(
        aten.scaled_dot_product_attention.default, seed, 0, 0, h, h.sin(), h, None, 0.3
    )
    return (out,)


def norm_and_loss(x, target, scale, shift, w, seed):
    logits = F.layer_norm(x, (WIDTH,), scale, shift) @ w
    return (F.cross_entropy(logits, target, ignore_index=-100, reduction="sum"),)


def several_outputs(x, w, seed):
    top, where = (x @ w).max(-1, keepdim=True)
    values, order = x.sort(-1)
    return (top * values, where, order)


def input_is_output(x, y, w, seed):
    return (x, x @ w, y)


def nothing_to_learn_in_it(x, ids, w, seed):
    return (x @ w, (x.detach() > 0), ids + 1)


def unused(x, w, spare, seed):
    return (x @ w,)


def same_twice(x, w, seed):
    return (torch.relu(x @ w) @ w,)


def constants(x, seed):
    mask = torch.ones_like(x).cumsum(1) > 3.0
    masked = x.masked_fill(mask, torch.finfo(torch.float64).min).softmax(-1)
    return (masked * x.new_full((WIDTH,), 2.0) + constant(x, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0),)


def changed_constant(x, seed):
    step = constant(x, 1.0, 2.0)
    step.mul_(3.0)
    return (x.view(ROWS, -1, 2).exp() * step,)


def outputs_look_at_each_other(x, w, seed):
    y = x @ w
    return (y, y.view(-1), y.t(), y[1:])


def frozen(x, w, f, seed):
    return ((x @ f).tanh() @ w,)


def only_weights(x, w, b, seed):
    return (F.linear(x, w, b).square().mean(),)


ids = torch.tensor([[0, 3, 3], [4, 1, 0]])
target = torch.tensor([2, -100, 0, 5])
x, w, b = number(ROWS, WIDTH), number(WIDTH, WIDTH), number(WIDTH)
HAND: list[tuple[Callable[..., Any], list[Tensor], list[Tensor]]] = [
    (linear, [number(2, 3, WIDTH)], [w, b]),
    (attention, [number(2, ROWS, WIDTH)], [number(WIDTH, 18)]),
    (chunks, [x], [number(WIDTH, 8)]),
    (in_place, [x], [w]),
    (in_place_on_a_view, [x], [w]),
    (embedding, [ids], [number(TABLE, WIDTH)]),
    (twice_one_table, [ids], [number(TABLE, WIDTH)]),
    (dropout, [x], [w]),
    (attention_dropout, [number(ROWS * 2, WIDTH)], []),
    (norm_and_loss, [x, target], [number(WIDTH), number(WIDTH), w]),
    (several_outputs, [x], [w]),
    (input_is_output, [x, number(ROWS)], [w]),
    (nothing_to_learn_in_it, [x, ids], [w]),
    (unused, [x], [w, number(3)]),
    (same_twice, [x], [w]),
    (constants, [x], []),
    (changed_constant, [x], []),
    (outputs_look_at_each_other, [x], [w]),
    (frozen, [x], [w, number(WIDTH, WIDTH, grad=False)]),
    (only_weights, [number(ROWS, WIDTH, grad=False)], [w, b]),
]


@pytest.mark.parametrize(
    ("function", "values", "parameters"), HAND, ids=[case[0].__name__ for case in HAND]
)
def test_layers_equal_autograd(
    function: Any, values: list[Tensor], parameters: list[Tensor]
) -> None:
    cases.check(cases.written(function, values, parameters))


# Layers drawn at random: values of one shape that feed each other.


def _chunked(x: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return torch.cat([second * 0.5, first.sin()], -1)


def _viewed(x: Tensor) -> Tensor:
    return x.view(2, 2, WIDTH).transpose(0, 1).reshape(ROWS, WIDTH)


def _attended(x: Tensor) -> Tensor:
    q = x.view(1, ROWS, 2, WIDTH // 2).transpose(1, 2)
    return F.scaled_dot_product_attention(q, q.tanh(), q, is_causal=True).transpose(1, 2).reshape(
        ROWS, WIDTH
    )


def _in_place(x: Tensor) -> Tensor:
    y = x * 2.0
    y.add_(1.0)
    y[:, 1:].mul_(0.5)
    return y.sigmoid_()


def _selected(x: Tensor) -> Tensor:
    return torch.stack([row.cos() for row in x.unbind(0)])


def _masked(x: Tensor) -> Tensor:
    return x.masked_fill(x.detach() > 0.3, 0.0)


def _largest(x: Tensor) -> Tensor:
    values, where = x.sort(-1)
    return values * (where + 1)


def _expanded(x: Tensor) -> Tensor:
    return x[0].expand(ROWS, WIDTH)


def _made(x: Tensor) -> Tensor:
    return x * torch.ones_like(x).cumsum(0) + constant(x, *range(WIDTH))


def _looked_up(x: Tensor, ids: Tensor, table: Tensor) -> Tensor:
    return x + F.embedding(ids, table)


ONE: list[Callable[[Tensor], Tensor]] = [
    torch.tanh, F.gelu, F.silu, torch.t, torch.exp, torch.relu, torch.detach,
    _chunked, _viewed, _attended, _in_place, _selected, _masked, _largest, _expanded, _made,
]  # fmt: skip
TWO = [operator.add, operator.mul, torch.maximum]


@st.composite
def layers(draw: st.DrawFn) -> cases.Layer:
    """Up to eight operators over up to two values, four parameters and ids, and what they give."""
    graph = fx.Graph()
    count = draw(st.integers(1, 2))
    values = [number(ROWS, WIDTH, grad=draw(st.booleans())) * (1 + at) for at in range(count)]
    values = [v.detach().requires_grad_(v.requires_grad) for v in values]
    ids = torch.tensor([0, 3, 3, 1])
    shapes = {"w": (WIDTH, WIDTH), "b": (WIDTH,), "table": (TABLE, WIDTH), "spare": (3,)}
    parameters = [number(*shape, grad=draw(st.booleans())) for shape in shapes.values()]
    pool = [graph.placeholder(f"value_{at}") for at in range(count)]
    indices = graph.placeholder("ids")
    w, b, table, _ = (graph.placeholder(name) for name in shapes)
    seed = graph.placeholder("seed")
    call = graph.call_function
    for offset in range(draw(st.integers(1, 8))):
        x = draw(st.sampled_from(pool))
        kind = draw(st.sampled_from(["one", "one", "two", "linear", "twice", "norm", "drop", "id"]))
        if kind == "one":
            function = draw(st.sampled_from(ONE))
            made = call(function, (x,))
            made = call(torch.mm, (made, x)) if function is torch.t else made
            made = call(torch.mm, (x, made)) if function is torch.t else made
        elif kind == "two":
            made = call(draw(st.sampled_from(TWO)), (x, draw(st.sampled_from(pool))))
        elif kind == "linear":
            made = call(F.linear, (x, w, b))
        elif kind == "twice":
            made = call(torch.mm, (call(torch.mm, (x, w)), call(torch.t, (w,))))
        elif kind == "norm":
            made = call(F.layer_norm, (x, (WIDTH,), b))
        elif kind == "drop":
            made = call(seeded, (aten.dropout.default, seed, offset, 0, x, 0.4, True))
        else:
            made = call(_looked_up, (x, indices, table))
        # Values stay near 1, so that no comparison depends on how large they grow.
        pool.append(call(torch.tanh, (made,)) if draw(st.booleans()) else call(_bounded, (made,)))
    returned = draw(st.lists(st.sampled_from([*pool, indices]), min_size=1, max_size=3))
    graph.output(tuple(dict.fromkeys([pool[-1], *returned])))
    module = fx.GraphModule(torch.nn.Module(), graph)
    return cases.layer(module, [*values, ids], parameters)


def _bounded(x: Tensor) -> Tensor:
    return x / (1 + x.detach().abs().amax())


@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(layers())
def test_random_layers_equal_autograd(case: cases.Layer) -> None:
    if case.graph.trains:
        cases.check(case, tolerance=1e-10)


def test_bfloat16_layers_equal_autograd() -> None:
    x16, w16 = number(ROWS, WIDTH, dtype=torch.bfloat16), number(WIDTH, WIDTH, dtype=torch.bfloat16)
    cases.check(cases.written(in_place, [x16], [w16]), tolerance=5e-2)
    cases.check(cases.written(dropout, [x16], [w16]), tolerance=5e-2)
