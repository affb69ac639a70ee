"""What a pattern of the fuse pass gives, and how patterns read graphs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

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


def read_outside(found: Match) -> str:
    """The name of a node that something outside reads and that would no longer be there, or ""."""
    gone = set(found.covers)
    inside = (node for node in found.covers if node not in found.outputs)
    return next((node.name for node in inside if not set(node.users) <= gone), "")


def reads_itself(found: Match) -> bool:
    """Whether the call would read a node that it stands for, as with silu(x) * silu(x)."""
    read: list[Node] = []
    fx.map_arg(found.args, read.append)
    return not set(read).isdisjoint(found.covers)


def inputs(match: Match) -> list[Node]:
    """Tensors that the call reads."""
    flat = [x for each in match.args for x in (each if isinstance(each, list) else [each])]
    found = [x for x in flat if isinstance(x, fx.Node) and x.op != "get_attr"]
    return [x for x in found if isinstance(val(x), Tensor)]


def is_op(node: Any, *names: str) -> bool:
    """A call of an ATen operator of one of these names, of any overload, that nothing by keyword
    makes another (``add`` has a factor, ``mean`` a dtype)."""
    if not isinstance(node, fx.Node) or node.op != "call_function" or node.kwargs:
        return False
    packet = getattr(node.target, "overloadpacket", None)
    return packet is not None and str(packet) in {f"aten.{name}" for name in names}


def is_call(node: Any, function: Callable[..., Any]) -> bool:
    return isinstance(node, fx.Node) and node.op == "call_function" and node.target is function


def past_casts(node: Any, chain: list[Node]) -> Any:
    """What a row of casts to other floating dtypes starts from; the casts go to ``chain``."""
    while is_op(node, "to") and _is_cast(node):
        chain.append(node)
        node = node.args[0]
    return node


def past_widening(node: Any, chain: list[Node]) -> Any:
    """What a row of casts that lose nothing starts from; the casts go to ``chain``."""
    casts: list[Node] = []
    past_casts(node, casts)
    for cast in casts:
        if not holds(val(cast).dtype, val(cast.args[0]).dtype):
            break
        chain.append(cast)
        node = cast.args[0]
    return node


def holds(wide: torch.dtype, narrow: torch.dtype) -> bool:
    """Whether every number of a floating dtype is one of the other too."""
    one, other = torch.finfo(wide), torch.finfo(narrow)
    return one.eps <= other.eps and one.max >= other.max and one.tiny <= other.tiny


def _is_cast(node: Node) -> bool:
    before, after = val(node.args[0]), val(node)
    floating = before.is_floating_point() and after.is_floating_point()
    return floating and before.device == after.device


def is_tensor(node: Any) -> bool:
    return isinstance(node, fx.Node) and isinstance(val(node), Tensor)


def alike(one: Any, other: Any) -> bool:
    return one.shape == other.shape and one.dtype == other.dtype


def val(node: Any) -> Any:
    return node.meta.get("val")


def precedes(node: Node, other: Node) -> bool:
    return node.op in ("placeholder", "get_attr") or node < other


def ordered(nodes: list[Node]) -> Outputs:
    return tuple(sorted(set(nodes)))
