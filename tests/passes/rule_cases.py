"""One call of every operator that has a sharding rule, as a graph of one node."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from galvatron_compile.graph import note

aten = torch.ops.aten
SDPA = aten.scaled_dot_product_attention.default


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
