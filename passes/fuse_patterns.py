"""Patterns of memory-bound operators that have a streaming kernel.

A matcher looks at a node that might be the last of its pattern and gives a :class:`Match`, or None.
Patterns are those of Hugging Face's modules and of torch.nn as torch.export writes them down, after
rewriting: a conversion R → V may stand inside a norm, whose weight is V.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx

from galvatron_compile import collectives, fused, operators

Node = Any  # fx.Node, whose arguments are typed as anything that they may be
Outputs = tuple[Node, ...]


@dataclass(frozen=True)
class Match:
    """A call that can stand for ``covers``.

    args: of the call; nodes among them are read as they are.
    outputs: nodes that the call's results stand for, in order.
    covers: all nodes that go, in graph order.
    at: where the call goes, in front of this node.
    converted: (value, axis): the value is converted R → V first.
    viewed: (value, view): the value is viewed first, as ``view`` views what it reads.
    several: the call gives a tuple, also of one.
    """

    name: str
    target: Callable[..., Any]
    args: tuple[Any, ...]
    outputs: Outputs
    covers: Outputs
    at: Node
    converted: tuple[Node, Any] | None = None
    viewed: tuple[Node, Node] | None = None
    several: bool = False


def streaming(node: Node) -> Match | None:
    """The pattern that ends at ``node``, if any."""
    matchers = (rms_norm, layer_norm, swiglu, rotary, cross_entropy)
    return next((found for matcher in matchers if (found := matcher(node)) is not None), None)


def read_outside(found: Match) -> str:
    """The name of a node that something outside reads and that would no longer be there, or ""."""
    gone = set(found.covers)
    inside = (node for node in found.covers if node not in found.outputs)
    return next((node.name for node in inside if not set(node.users) <= gone), "")


def rms_norm(node: Node) -> Match | None:
    """weight * (x * rsqrt(mean(x²) + eps)), in float32 between casts or not."""
    if not is_op(node, "mul"):
        return None
    for weight, scaled in (node.args[:2], node.args[1::-1]):
        chain: list[Node] = [node]
        product = past_casts(scaled, chain)
        axis = None
        if is_call(product, collectives.all_reduce_gradient):
            chain.append(product)
            axis = product.args[1]
            product = past_casts(product.args[0], chain)
        if is_vector(weight) and (found := _normalised(product, chain)) is not None:
            value, eps = found
            return _norm("rms_norm", node, value, (weight, eps), chain, axis)
    return None


def _normalised(node: Any, chain: list[Node]) -> tuple[Node, float] | None:
    """x and eps of x * rsqrt(mean(pow(x, 2), -1) + eps)."""
    if not is_op(node, "mul"):
        return None
    wide, root = node.args[:2]
    if not is_op(root, "rsqrt"):
        return None
    total = root.args[0]
    if not is_op(total, "add") or not isinstance(total.args[1], float):
        return None
    mean = total.args[0]
    if not is_op(mean, "mean") or list(mean.args[1]) != [-1] or mean.args[2:3] != (True,):
        return None
    power = mean.args[0]
    if not is_op(power, "pow") or power.args[1] != 2 or power.args[0] is not wide:
        return None
    chain += [node, root, total, mean, power]
    return past_casts(wide, chain), total.args[1]


def layer_norm(node: Node) -> Match | None:
    """aten.layer_norm over the last dim."""
    if not is_op(node, "layer_norm"):
        return None
    value, dims, *given = node.args
    weight, bias, eps = [*given, *(None, None, 1e-5)[len(given) :]][:3]
    if len(dims) != 1:
        return None
    return _norm("layer_norm", node, value, (weight, bias, eps), [node], None)


def _norm(
    name: str,
    node: Node,
    value: Node,
    rest: tuple[Any, ...],
    chain: list[Node],
    axis: Any,
) -> Match:
    """The norm of ``value``, with the addition that makes it where both can be one kernel."""
    target = getattr(fused, name)
    if axis is None and is_op(value, "add") and _adds(value) and not is_op(node, "add"):
        ahead = [x for x in rest if isinstance(x, fx.Node) and not precedes(x, value)]
        summed = next((x for x in value.args[:2] if _is_finished_here(x)), None)
        if not ahead and summed is not None and name == "rms_norm":
            residual = value.args[1] if summed is value.args[0] else value.args[0]
            args = (summed.args[0], residual, *rest, summed.args[1])
            return Match(
                "all_reduce + add_rms_norm", fused.all_reduce_add_rms_norm, args, (node, value),
                ordered([*chain, value, summed]), at=value,
            )  # fmt: skip
        if not ahead:
            both = getattr(fused, f"add_{name}")
            args = (value.args[0], value.args[1], *rest)
            return Match(
                f"add_{name}", both, args, (node, value), ordered([*chain, value]), at=value
            )
    converted = None if axis is None else (value, axis)
    return Match(name, target, (value, *rest), (node,), ordered(chain), node, converted)


def _is_finished_here(node: Node) -> bool:
    """A sum over ranks that only the addition reads."""
    return is_call(node, collectives.all_reduce) and len(node.users) == 1


def _adds(node: Node) -> bool:
    """x + y of equal shapes and dtypes."""
    if node.kwargs or not all(isinstance(x, fx.Node) for x in node.args[:2]):
        return False
    one, other = val(node.args[0]), val(node.args[1])
    return isinstance(one, Tensor) and isinstance(other, Tensor) and alike(one, other)


def swiglu(node: Node) -> Match | None:
    """silu(gate) * up."""
    if not is_op(node, "mul"):
        return None
    for silu, up in (node.args[:2], node.args[1::-1]):
        if is_op(silu, "silu") and isinstance(up, fx.Node) and alike(val(silu), val(up)):
            args = (silu.args[0], up)
            return Match("swiglu", fused.swiglu, args, (node,), ordered([silu, node]), node)
    return None


def rotary(node: Node) -> Match | None:
    """x * cos + cat(-x₂, x₁) * sin, with x₁ and x₂ the halves of the last dim."""
    if not is_op(node, "add") or not all(is_op(x, "mul") for x in node.args[:2]):
        return None
    straight, turned = node.args[:2]
    value, cos = straight.args[:2]
    joined, sin = turned.args[:2]
    if not is_op(joined, "cat") or joined.args[1:] not in ((-1,), (3,)):
        return None
    parts = joined.args[0]
    if len(parts) != 2 or not is_op(parts[0], "neg"):
        return None
    second, first = parts[0].args[0], parts[1]
    half = val(value).shape[-1] // 2
    if not _is_slice(first, value, 0, half) or not _is_slice(second, value, half, None):
        return None
    if val(value).ndim != 4 or any(val(x).ndim != 4 or val(x).shape[1] != 1 for x in (cos, sin)):
        return None
    covers = ordered([straight, first, second, parts[0], joined, turned, node])
    return Match("rotary", fused.rotary, (value, cos, sin), (node,), covers, node)


def _is_slice(node: Any, value: Node, start: int, end: int | None) -> bool:
    if not is_op(node, "slice") or node.args[0] is not value or len(node.args) < 4:
        return False
    size = val(value).shape[-1]
    dim, begins, ends = node.args[1:4]
    wanted = size if end is None else end
    return dim in (-1, 3) and begins == start and min(ends, size) == wanted


_LOSS = ("logits", "target", "weight", "ignore_index", "label_smoothing")


def cross_entropy(node: Node) -> Match | None:
    """The loss of rewritten graphs, whole or over a shard of the vocabulary; of class indices
    without class weights. Logits that were cast for it are read as they were before."""
    if is_call(node, operators.cross_entropy_sum):
        names: tuple[str, ...] = _LOSS
    elif is_call(node, operators.cross_entropy_sum_shard):
        names = (*_LOSS, "axis")
    else:
        return None
    given: dict[str, Any] = dict.fromkeys((*_LOSS, "axis"))
    given |= {"ignore_index": -100, "label_smoothing": 0.0}
    given |= dict(zip(names, node.args, strict=False)) | node.kwargs
    logits, target = given["logits"], given["target"]
    if given["weight"] is not None or given["label_smoothing"] or val(logits).ndim != 2:
        return None
    if val(target).is_floating_point():
        return None
    rest = (target, given["ignore_index"], given["axis"])
    chain, viewed = [node], None
    if is_op(logits, "view", "reshape") and len(logits.users) == 1:
        under: list[Node] = []
        source = past_casts(logits.args[0], under)
        if under and all(len(x.users) == 1 for x in under):
            chain += [logits, *under]
            viewed, logits = (source, logits), source
    else:
        logits = past_casts(logits, chain)
    name = "cross_entropy" if given["axis"] is None else "vocabulary-parallel cross_entropy"
    args = (logits, *rest)
    return Match(name, fused.cross_entropy, args, (node,), ordered(chain), node, viewed=viewed)


# Reading graphs.


def is_op(node: Any, *names: str) -> bool:
    """A call of an ATen operator of one of these names, of any overload."""
    if not isinstance(node, fx.Node) or node.op != "call_function":
        return False
    packet = getattr(node.target, "overloadpacket", None)
    return packet is not None and str(packet) in {f"aten.{name}" for name in names}


def is_call(node: Any, function: Callable[..., Any]) -> bool:
    return isinstance(node, fx.Node) and node.op == "call_function" and node.target is function


def past_casts(node: Any, chain: list[Node]) -> Any:
    """What a row of casts to other floating dtypes starts from; the casts go to ``chain``."""
    while is_op(node, "to", "_to_copy") and _is_cast(node):
        chain.append(node)
        node = node.args[0]
    return node


def _is_cast(node: Node) -> bool:
    before, after = val(node.args[0]), val(node)
    floating = before.is_floating_point() and after.is_floating_point()
    return floating and before.device == after.device


def is_vector(node: Any) -> bool:
    return isinstance(node, fx.Node) and isinstance(val(node), Tensor) and val(node).ndim == 1


def alike(one: Any, other: Any) -> bool:
    return one.shape == other.shape and one.dtype == other.dtype


def val(node: Any) -> Any:
    return node.meta["val"]


def precedes(node: Node, other: Node) -> bool:
    return node.op in ("placeholder", "get_attr") or node < other


def ordered(nodes: list[Node]) -> Outputs:
    return tuple(sorted(set(nodes)))


def inputs(match: Match) -> list[Node]:
    """Tensors that the call reads."""
    flat = [x for each in match.args for x in (each if isinstance(each, list) else [each])]
    found = [x for x in flat if isinstance(x, fx.Node) and x.op != "get_attr"]
    return [x for x in found if isinstance(val(x), Tensor)]
