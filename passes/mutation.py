"""In-place operators made functional.

``x.add_(y)`` becomes ``x = x.add(y)`` for all later uses; a write through slices and selects
(``x[:, 1:] = y``) becomes a concatenation, and other views of ``x`` are taken again. What would
need more than that is refused by line.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import fx

from galvatron_compile.errors import UnsupportedError
from galvatron_compile.passes.blame import where
from galvatron_compile.torch_private import size_expression

aten = torch.ops.aten


class Emit(Protocol):
    def __call__(
        self, target: Any, args: tuple[Any, ...], kwargs: Any, origin: fx.Node, value: Any = None
    ) -> fx.Node: ...


def is_inplace(node: fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return schema is not None and bool(schema.is_mutable)


class Mutations:
    """Which nodes of one exported graph share memory, and what a write to one does to the others.

    protected: placeholders that must not be written to, with what they are.
    parent: of a view, the node it is a view of.
    name_of: the node that an in-place operator returned again.
    """

    def __init__(self, emit: Emit, graph: fx.Graph, protected: Mapping[fx.Node, str]) -> None:
        self.emit = emit
        self.protected = protected
        self.order = {node: at for at, node in enumerate(graph.nodes)}
        self.parent: dict[fx.Node, fx.Node] = {}
        self.name_of: dict[fx.Node, fx.Node] = {}

    def follow(self, node: fx.Node) -> None:
        """Remember that ``node`` is a view of its input, if its operator says so."""
        schema = getattr(node.target, "_schema", None)
        views = schema is not None and schema.returns and schema.returns[0].alias_info is not None
        if views and node.args and isinstance(node.args[0], fx.Node):
            self.parent[node] = self.canonical(node.args[0])

    def canonical(self, node: fx.Node) -> fx.Node:
        while node in self.name_of:
            node = self.name_of[node]
        return node

    def rewrite(self, node: fx.Node, env: dict[fx.Node, Any]) -> fx.Node:
        """Emit the functional form of in-place ``node`` and redirect all that it wrote to."""
        assert isinstance(node.args[0], fx.Node)
        chain = [self.canonical(node.args[0])]
        while chain[-1] in self.parent:
            chain.append(self.parent[chain[-1]])
        if chain[-1] in self.protected:
            raise _refusal(node, f"{self.protected[chain[-1]]} is written to in forward")
        new = env[chain[0]] = self.functional(node, env)
        for view, base in itertools.pairwise(chain):
            env[base] = self.write_back(node, view, env[base], env[view])
        self.name_of[node] = chain[0]
        self.view_again(node, chain, env)
        for name in self.name_of:
            env[name] = env[self.canonical(name)]
        return new

    def view_again(self, node: fx.Node, chain: list[fx.Node], env: dict[fx.Node, Any]) -> None:
        """Other views of the tensor that was written to show its new contents from now on."""
        now = self.order[node]
        stale = set(chain)
        for view, base in self.parent.items():  # parents come first
            if view in chain or base not in stale:
                continue
            stale.add(view)
            if any(self.order.get(user, -1) > now for user in self._users(view)):
                mapped: Any = fx.node.map_arg((view.args, view.kwargs), lambda n: env[n])
                args, kwargs = mapped
                args = (env[base], *args[1:])
                env[view] = self.emit(view.target, args, kwargs, view, view.meta["val"])

    def _users(self, view: fx.Node) -> set[fx.Node]:
        names = [view, *(n for n in self.name_of if self.canonical(n) is view)]
        nested = [child for child, base in self.parent.items() if base is view]
        return {u for n in names for u in n.users} | {u for n in nested for u in self._users(n)}

    def functional(self, node: fx.Node, env: dict[fx.Node, Any]) -> fx.Node:
        """The value that in-place ``node`` leaves in its first argument."""
        mapped: Any = fx.node.map_arg((node.args, node.kwargs), lambda n: env[n])
        args, kwargs = mapped
        packet, _, overload = str(node.target).removeprefix("aten.").rpartition(".")
        written = args[0]
        if packet == "copy_":
            return self.assigned(node, args[1], written)
        if packet in ("zero_", "fill_"):
            fill = 0 if packet == "zero_" else args[1]
            if isinstance(fill, fx.Node):
                return self.assigned(node, fill, written)
            return self.emit(aten.full_like.default, (written, fill), {}, node, written.meta["val"])
        twin = getattr(aten, packet.removesuffix("_"), None)
        if not packet.endswith("_") or not hasattr(twin, overload):
            raise _refusal(node, f"{packet} has no functional form")
        new = self.emit(getattr(twin, overload), args, kwargs, node)
        return self.assigned(node, new, written)

    def assigned(self, node: fx.Node, source: fx.Node, written: fx.Node) -> fx.Node:
        """``source`` cast and expanded to what it overwrites."""
        value, old = source.meta["val"], written.meta["val"]
        if value.dtype != old.dtype:
            source = self.emit(aten.to.dtype, (source, old.dtype), {}, node)
        if _sizes(value) != _sizes(old):
            sizes = [
                size
                if isinstance(size, int)
                else self.emit(aten.sym_size.int, (written, dim), {}, node, size)
                for dim, size in enumerate(old.shape)
            ]
            source = self.emit(aten.expand.default, (source, sizes), {}, node, old)
        return source

    def write_back(self, node: fx.Node, view: fx.Node, base: fx.Node, part: fx.Node) -> fx.Node:
        """``base`` with the region that ``view`` shows replaced by ``part``."""
        if _sizes(part.meta["val"]) == _sizes(base.meta["val"]) and view.target in _SAME_REGION:
            return part
        if view.target is aten.select.int:
            dim, start, end, step = view.args[1], view.args[2], None, 1
            assert isinstance(dim, int) and isinstance(start, int)
            end = start + 1 if start != -1 else None
            part = self.emit(aten.unsqueeze.default, (part, dim), {}, node)
        elif view.target is aten.slice.Tensor:
            dim, start, end, step = _slice_arguments(view)
        else:
            raise _refusal(node, f"it writes through a view made by {view.target}")
        size = base.meta["val"].shape[dim]
        if step != 1 or not isinstance(size, int):
            return self.emit(
                aten.slice_scatter.default, (base, part, dim, start, end, step), {}, node
            )
        first, last, _ = slice(start, end).indices(size)
        pieces = [part]
        if first > 0:
            pieces.insert(0, self.emit(aten.slice.Tensor, (base, dim, 0, first), {}, node))
        if last < size:
            pieces.append(self.emit(aten.slice.Tensor, (base, dim, last, size), {}, node))
        return self.emit(aten.cat.default, (pieces, dim), {}, node) if len(pieces) > 1 else part


_SAME_REGION = frozenset({aten.slice.Tensor, aten.alias.default, aten.detach.default})


def _slice_arguments(view: fx.Node) -> tuple[Any, Any, Any, Any]:
    given = [*view.args[1:], *(0, None, None, 1)[len(view.args) - 1 :]]
    return given[0], given[1], given[2], given[3]


def _sizes(value: torch.Tensor) -> list[Any]:
    return [size_expression(size) for size in value.shape]


def _refusal(node: fx.Node, what: str) -> UnsupportedError:
    return UnsupportedError(f"{where(node)}: {what}; write this line without an in-place operator")
