"""Small models as one layer class each, and what a class computes on one rank."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import fx, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from galvatron_compile.graph import LayerClass
from galvatron_compile.mesh import Axis
from galvatron_compile.passes.capture import capture
from galvatron_compile.passes.sharding.apply import localise
from galvatron_compile.passes.sharding.sharded_layer import ShardedLayer
from galvatron_compile.placement import Placement, R, S

BATCH, SEQ, VOCAB = 4, 8, 32


class Promote(TorchFunctionMode):
    """Casts to float32 that a model hard-codes become casts to float64."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        wide = {torch.float32: torch.float64}
        func = torch.Tensor.double if func is torch.Tensor.float else func
        swap = lambda a: wide.get(a, a) if isinstance(a, torch.dtype) else a  # noqa: E731
        return func(*map(swap, args), **{k: swap(v) for k, v in (kwargs or {}).items()})


class Hidden(nn.Module):
    """Attention and a gated MLP under odd names, between hidden states; mean of squares as loss."""

    def __init__(self, width: int = 16, heads: int = 4, dropout: float = 0.0) -> None:
        super().__init__()
        self.fig = nn.LayerNorm(width)
        self.oak, self.elm, self.ash = (nn.Linear(width, width) for _ in range(3))
        self.yew = nn.Linear(width, width)
        self.ivy = nn.LayerNorm(width)
        self.fir = nn.Linear(width, 4 * width)
        self.bay = nn.Linear(4 * width, width)
        self.heads, self.dropout = heads, dropout

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, s, width = x.shape
        y = self.fig(x)
        q, k, v = (
            layer(y).view(b, s, self.heads, -1).transpose(1, 2)
            for layer in (self.oak, self.elm, self.ash)
        )
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + F.dropout(self.yew(mixed.transpose(1, 2).reshape(b, s, width)), self.dropout)
        return x + self.bay(F.dropout(F.gelu(self.fir(self.ivy(x))), self.dropout))


def hidden(**options: Any) -> tuple[nn.Module, dict[str, Any]]:
    model = nn.Sequential(Hidden(**options))

    class Loss(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.front = nn.Embedding(VOCAB, 16)
            self.block = model

        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            return self.block(self.front(tokens)).square().sum()

    return Loss(), {"tokens": torch.randint(0, VOCAB, (BATCH, SEQ))}


def labelled(model: nn.Module) -> tuple[nn.Module, dict[str, Any]]:
    tokens = torch.randint(0, VOCAB, (BATCH, SEQ))
    model.config.use_cache = False
    return model, {"input_ids": tokens, "labels": tokens.clone()}


def llama(kv_heads: int = 2, layers: int = 1, tied: bool = False) -> tuple[nn.Module, Any]:
    config = transformers.LlamaConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=kv_heads,
        vocab_size=VOCAB,
        tie_word_embeddings=tied,
    )
    return labelled(transformers.LlamaForCausalLM(config))


def gpt2() -> tuple[nn.Module, Any]:
    config = transformers.GPT2Config(
        n_embd=16,
        n_layer=1,
        n_head=4,
        vocab_size=VOCAB,
        n_positions=16,
        attn_pdrop=0.0,
        embd_pdrop=0.0,
        resid_pdrop=0.0,
    )
    return labelled(transformers.GPT2LMHeadModel(config))


CASES: dict[str, Callable[[], tuple[nn.Module, Any]]] = {
    "hidden": hidden,
    "dropout": lambda: hidden(dropout=0.5),
    "one head": lambda: hidden(heads=1),
    "llama 2 kv heads": llama,
    "llama 1 kv head, tied": lambda: llama(1, tied=True),
    "gpt2": gpt2,
}


def whole_class(name: str) -> tuple[LayerClass, list[torch.Tensor]]:
    """A captured model as one class, and values for all placeholders of its graph."""
    torch.manual_seed(0)
    model, batch = CASES[name]()
    model = model.double().train()
    with Promote():
        graph = capture(model, batch)
    module = graph.module
    values: list[torch.Tensor] = list(batch.values())
    kinds, data = ["activation"] * len(values), [S(0)] * len(values)
    place = module.graph.find_nodes(op="placeholder")[-1]
    for kind, table in (("parameter", graph.parameters), ("buffer", graph.buffers)):
        for node in module.graph.find_nodes(op="get_attr"):
            if node.target in table:
                with module.graph.inserting_after(place):
                    made = module.graph.placeholder(node.name + "_")
                made.meta.update(node.meta)
                node.replace_all_uses_with(made)
                module.graph.erase_node(node)
                values.append(table[node.target])
                kinds.append(kind)
                place = made
    output = module.graph.output_node()
    if not isinstance(output.args[0], tuple | list):
        output.args = ((output.args[0],),)
    module.recompile()
    return LayerClass(name, module, tuple(kinds), tuple(data), (R,)), values


def block(layer_class: LayerClass) -> LayerClass:
    """The decoder block alone: from the embedded tokens to the last residual sum."""
    source = layer_class.graph.graph
    # by their printed names, since functions that mention torch.ops do not pickle
    adds = [n for n in source.nodes if str(n.target) == "aten.add.Tensor"]
    looked_up = [n for n in source.nodes if str(n.target) == "aten.embedding.default"]
    shape = looked_up[0].meta["val"].shape
    sums = [n for n in adds if n.meta["val"].shape == shape and isinstance(n.args[1], fx.Node)]
    embeddings = [n in looked_up for n in sums[0].all_input_nodes]
    first = sums[0] if all(embeddings) else sums[0].args[0]
    return cut(layer_class, first, sums[-1])


def cut(layer_class: LayerClass, first: fx.Node, last: fx.Node) -> LayerClass:
    """The part of a class that makes ``last`` from ``first``, which becomes an input."""
    source = layer_class.graph.graph
    kinds = dict(zip(source.find_nodes(op="placeholder"), layer_class.kinds, strict=True))
    needed: dict[fx.Node, None] = {}

    def visit(node: fx.Node) -> None:
        if node not in needed and node is not first:
            needed[node] = None
            for operand in node.all_input_nodes:
                visit(operand)

    visit(last)
    graph = fx.Graph()
    found = [first] + [n for n in kinds if n in needed]
    copies = {}
    for node in found:
        copies[node] = graph.placeholder(node.name)
        copies[node].meta = dict(node.meta)
    for node in source.nodes:
        if node in needed and node not in copies:
            copies[node] = graph.node_copy(node, lambda argument: copies[argument])
    graph.output((copies[last],))
    names = tuple(kinds.get(node, "activation") for node in found)
    data = [S(0)] * names.count("activation")
    return LayerClass("block", fx.GraphModule({}, graph), names, tuple(data), (S(0),))


def values_of(
    part: LayerClass, whole: LayerClass, values: list[torch.Tensor]
) -> list[torch.Tensor]:
    """Values for the placeholders of a cut: random hidden states, the whole's for all others."""
    names = [node.name for node in whole.graph.graph.find_nodes(op="placeholder")]
    known = dict(zip(names, values, strict=True))
    found = []
    for node in part.graph.graph.find_nodes(op="placeholder"):
        shape = [BATCH, *node.meta["val"].shape[1:]]
        random = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        found.append(known.get(node.name, random))
    return found


def slice_of(value: torch.Tensor, placement: Placement, axis: Axis) -> torch.Tensor:
    """What a rank keeps of a whole value, by the definition of a placement."""
    if not placement.is_shard:
        return value
    shape = list(value.shape)
    d, outer = placement.dim, int(placement.outer)  # type: ignore[call-overload]
    split = value.reshape(*shape[:d], outer, axis.size, -1, *shape[d + 1 :])
    shape[d] //= axis.size
    return split.select(d + 1, axis.index).reshape(shape)


def run(
    module: fx.GraphModule,
    kinds: tuple[str, ...],
    values: list[Any],
    weigh: Callable[[torch.Tensor], torch.Tensor],
    *more: Any,
) -> tuple[torch.Tensor, list[torch.Tensor | None]]:
    """The output, weighed to a scalar, and gradients of all parameters and floating inputs."""
    leaves = [
        value.detach().clone().requires_grad_(value.is_floating_point() and kind != "buffer")
        for value, kind in zip(values, kinds, strict=True)
    ]
    (output,) = module(*leaves, *more)
    (output * weigh(output)).sum().backward()
    return output.detach(), [leaf.grad for leaf in leaves if leaf.requires_grad]


def largest_error(sharded: ShardedLayer, axis: Axis, values: list[torch.Tensor]) -> float:
    """Of the output and every gradient on this rank, relative to the whole run's largest entry.

    Deferred (V) parameter gradients are summed over the axis first, as the runtime does.
    """
    layer_class = sharded.layer_class
    placements = {"activation": iter(sharded.inputs), "parameter": iter(sharded.parameters)}
    placed = [next(placements.get(kind, iter([R]))) for kind in layer_class.kinds]
    local = [slice_of(v, p, axis) for v, p in zip(values, placed, strict=True)]
    fixed = torch.linspace(-1, 1, 10_000, dtype=torch.float64)

    def weigh(output: torch.Tensor) -> torch.Tensor:
        return fixed[: output.numel()].reshape(output.shape)

    reference, wanted = run(layer_class.graph, layer_class.kinds, values, weigh)
    weights = slice_of(weigh(reference), sharded.outputs[0], axis)
    module = localise(sharded, axis)
    output, gradients = run(module, layer_class.kinds, local, lambda _: weights, 7)
    differentiable = [
        p for p, v, kind in zip(placed, values, layer_class.kinds, strict=True)
        if v.is_floating_point() and kind != "buffer"
    ]  # fmt: skip
    # A key bias has gradient 0 up to rounding, so gradients count from a millionth of the largest.
    floor = 1e-6 * max(float(whole.abs().max()) for whole in wanted if whole is not None)
    errors = [_error(output, reference, sharded.outputs[0], axis, 0.0)]
    for gradient, whole, placement in zip(gradients, wanted, differentiable, strict=True):
        assert (gradient is None) == (whole is None)
        if gradient is not None and whole is not None:
            if placement.kind == "V":
                torch.distributed.all_reduce(gradient, group=axis.group)
            errors.append(_error(gradient, whole, placement, axis, floor))
    return max(errors)


def _error(
    local: torch.Tensor, whole: torch.Tensor, placement: Placement, axis: Axis, floor: float
) -> float:
    difference = float((local - slice_of(whole, placement, axis)).abs().max())
    return difference / max(float(whole.abs().max()), floor)
