"""What looks like a pattern and is not one: graphs of a few operators, whose values must stay."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from galvatron_compile import collectives, fused, operators
from galvatron_compile.mesh import Axis
from galvatron_compile.passes.fuse import fuse_graph
from galvatron_compile.passes.fuse_prices import Prices

ALWAYS = Prices(torch.device("cpu"), None, 1, always=True)
F64, F32, BF16 = torch.float64, torch.float32, torch.bfloat16


def exported(function: Callable[..., Any], *inputs: Tensor) -> fx.GraphModule:
    """Without the assertions, as normalised graphs are."""

    class Whole(nn.Module):
        def forward(self, *inputs: Tensor) -> Any:
            return function(*inputs)

    graph = torch.export.export(Whole(), inputs, strict=False).graph_module.graph
    for node in list(graph.nodes):
        if node.target is torch.ops.aten._assert_tensor_metadata.default:
            graph.erase_node(node)
    return fx.GraphModule({}, graph)


def built(function: Callable[[fx.Graph, list[Any]], Any], *inputs: Tensor) -> fx.GraphModule:
    """By hand, for calls that nothing exports. Values of nodes are computed on the way."""
    graph = fx.Graph()
    places = []
    for i, value in enumerate(inputs):
        places.append(graph.placeholder(f"x{i}"))
        places[-1].meta["val"] = value
    graph.output(function(graph, places))
    return fx.GraphModule({"axis": Axis.dry_run("tp2", 2)}, graph)


def call(graph: fx.Graph, target: Any, *args: Any) -> fx.Node:
    node = graph.call_function(target, args)
    node.meta["val"] = target(*fx.map_arg(args, _value))
    return node


def _value(node: fx.Node) -> Any:
    return Axis.dry_run("tp2", 2) if node.op == "get_attr" else node.meta["val"]


def check(module: fx.GraphModule, *inputs: Tensor, rtol: float | None = None) -> list[str]:
    """Names of what was replaced. Values and gradients of the graph stay as they are."""
    after, fusions = fuse_graph(module, ALWAYS)
    results = []
    for made in (module, after):
        given = [x.clone().requires_grad_(x.is_floating_point()) for x in inputs]
        found = made(*given)
        outputs = list(found) if isinstance(found, (tuple, list)) else [found]
        scaled = [(y * torch.arange(1, y.numel() + 1).view(y.shape)).sum() for y in outputs]
        wanted = [x for x in given if x.requires_grad]
        grads = torch.autograd.grad(sum(scaled), wanted, allow_unused=True)  # type: ignore[arg-type]
        results.append([*(y.detach() for y in outputs), *grads])
    atol = None if rtol is None else rtol
    torch.testing.assert_close(results[1], results[0], rtol=rtol, atol=atol)
    return [fusion.name for fusion in fusions if fusion.taken]


def r(*shape: int, dtype: torch.dtype = F64) -> Tensor:
    return torch.randn(shape, dtype=dtype)


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
    "joined along the positions": (
        lambda x, c, s: x * c + torch.cat((-x[..., 1:], x[..., :1]), 2)[:, :, :2, :].repeat(
            1, 1, 1, 2) * s,
        (r(2, 3, 2, 2), r(2, 1, 2, 2), r(2, 1, 2, 2)),
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


# Losses.


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


# Collectives beside products.


def gathered(graph: fx.Graph, x: fx.Node, *weights: fx.Node, dim: int = 1) -> list[fx.Node]:
    whole = call(graph, collectives.all_gather, x, dim, 1, graph.get_attr("axis"))
    return [call(graph, torch.ops.aten.linear.default, whole, weight) for weight in weights]


def test_parts_of_a_joined_product_may_be_viewed() -> None:
    """Each linear layer's output was contiguous; now it is a slice of one matrix."""

    def two(graph: fx.Graph, places: list[fx.Node]) -> Any:
        one, other = gathered(graph, *places)
        view = torch.ops.aten.view.default
        turned = call(graph, torch.ops.aten.unsqueeze.default, other, 0)
        return (call(graph, view, one, [-1]), call(graph, view, turned, [-1]))

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
        "its bias x2 is not split for this sum alone"
    ]


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
