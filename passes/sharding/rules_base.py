"""What a sharding rule is, and what the rule functions share."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import fx

from galvatron_compile.graph import noted
from galvatron_compile.passes.sharding.views import Size, can_shard, map_shard, shape_of, size_of
from galvatron_compile.placement import Placement, R, S, V

Emit = Callable[["Emitter"], fx.Node]


@dataclass(frozen=True)
class Emitter:
    """Where and from what a rule writes its local operator.

    graph: the new graph, its insertion point set. node: the original. args, kwargs: the node's,
    tensor inputs replaced by local values. axis: the get_attr node of the Axis. size: its ranks.
    """

    graph: fx.Graph
    node: fx.Node
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    axis: fx.Node
    size: int

    def argument(self, name: str) -> Any:
        """A local argument by name, its default where the node does not give it."""
        names = argument_names(self.node.target)
        place = names.index(name)
        if place < len(self.args):
            return self.args[place]
        if name in self.kwargs or not isinstance(self.node.target, torch._ops.OpOverload):
            return self.kwargs[name]
        return self.node.target._schema.arguments[place].default_value

    def call(self, **changed: Any) -> fx.Node:
        """The operator on the local values, with some arguments changed by name."""
        args, kwargs = list(self.args), dict(self.kwargs)
        names = argument_names(self.node.target)
        for name, value in changed.items():
            place = names.index(name)
            if place < len(args):
                args[place] = value
            else:
                kwargs[name] = value
        return self.graph.call_function(self.node.target, tuple(args), kwargs)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Rule:
    """One legal way to run a node on the ranks of one axis.

    inputs: one placement per entry of :func:`tensor_inputs`, in that order. For ``getitem`` of a
        list-valued node it is the placement of the element taken.
    outputs: one per output (list-valued nodes: per element; a size: one R).
    emit: writes the local operator; None means the same operator on the local inputs.
    """

    name: str
    inputs: tuple[Placement, ...]
    outputs: tuple[Placement, ...]
    emit: Emit | None = field(default=None, compare=False)


def is_tensor_valued(value: object) -> bool:
    """A tensor, or a list or tuple with one (the value of split, unbind, layer norm, …)."""
    if isinstance(value, list | tuple):
        return any(isinstance(entry, torch.Tensor) for entry in value)
    return isinstance(value, torch.Tensor)


def tensor_inputs(node: fx.Node) -> list[fx.Node]:
    """Every tensor-valued input, in args then kwargs, flattened, duplicates kept.

    A list-valued input (of ``getitem``) counts as one.
    """
    found: list[fx.Node] = []

    def visit(argument: fx.Node) -> fx.Node:
        if is_tensor_valued(argument.meta.get("val")):
            found.append(argument)
        return argument

    fx.map_arg(node.args, visit)
    fx.map_arg(node.kwargs, visit)
    return found


def argument_names(target: object) -> list[str]:
    if isinstance(target, torch._ops.OpOverload):
        return [argument.name for argument in target._schema.arguments]
    try:
        return list(inspect.signature(target).parameters)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return []


def packet_name(target: object) -> str:
    """The operator's name without its overload; that of a Python function otherwise."""
    if isinstance(target, torch._ops.OpOverload):
        return str(target.overloadpacket.__name__)
    return str(getattr(target, "__name__", target))


def is_differentiable(node: fx.Node) -> bool:
    """Whether a gradient may flow through ``node``: as noted by the batch pass, else by dtype."""
    known = noted(node, "differentiable")
    if known is not None:
        return bool(known)
    value = node.meta.get("val")
    values = value if isinstance(value, list | tuple) else [value]
    return any(isinstance(v, torch.Tensor) and v.dtype.is_floating_point for v in values)


@dataclass(frozen=True)
class Site:
    """One node for which rules are wanted, on an axis of size ``n`` (see ``views``).

    data: the data axis, where nothing is localised and no operator may need the axis.
    outers: the outer factors worth trying, 1 first.
    """

    node: fx.Node
    n: Size
    data: bool
    outers: tuple[Size, ...]

    @cached_property
    def name(self) -> str:
        return packet_name(self.node.target)

    @cached_property
    def arguments(self) -> dict[str, Any]:
        """Every argument by its name, defaults filled in."""
        names = argument_names(self.node.target)
        bound = dict(zip(names, self.node.args, strict=False)) | dict(self.node.kwargs)
        if isinstance(self.node.target, torch._ops.OpOverload):
            for argument in self.node.target._schema.arguments:
                if argument.has_default_value():
                    bound.setdefault(argument.name, argument.default_value)
        return bound

    @cached_property
    def slots(self) -> list[tuple[str, int, fx.Node]]:
        """(argument name, index within a list argument, node) per entry of ``tensor_inputs``."""
        names = argument_names(self.node.target) or [f"arg{i}" for i in range(len(self.node.args))]
        named = [*zip(names, self.node.args, strict=False), *self.node.kwargs.items()]
        found = []
        for name, value in named:
            entries = value if isinstance(value, list | tuple) else [value]
            for index, entry in enumerate(entries):
                if isinstance(entry, fx.Node) and is_tensor_valued(entry.meta.get("val")):
                    found.append((name, index, entry))
        return found

    @cached_property
    def num_outputs(self) -> int:
        value = self.node.meta.get("val")
        return len(value) if isinstance(value, list | tuple) else 1

    @cached_property
    def shape(self) -> tuple[Size, ...]:
        """Of the (first) output."""
        value = self.node.meta["val"]
        return shape_of(value[0] if isinstance(value, list | tuple) else value)

    def input_shape(self, name: str) -> tuple[Size, ...]:
        return shape_of(self.arguments[name].meta["val"])

    def has(self, name: str) -> bool:
        return any(slot == name for slot, _, _ in self.slots)

    def shards(self, size: Size) -> list[Size]:
        """The outers with which a dim of this size can be sharded."""
        return [outer for outer in self.outers if can_shard(size, outer, self.n)]

    def view(
        self, source: Sequence[Size], target: Sequence[Size], dim: int, outer: Size
    ) -> tuple[int, Size] | None:
        return map_shard(source, target, dim, outer, self.n)

    def rule(
        self,
        name: str,
        where: Mapping[str, Placement | Sequence[Placement]],
        outputs: Placement | Sequence[Placement],
        emit: Emit | None = None,
        default: Placement = V,
    ) -> Rule:
        """A rule from placements by argument name; arguments not named are ``default``."""
        inputs = []
        for slot, index, _ in self.slots:
            placement = where.get(slot, default)
            inputs.append(placement if isinstance(placement, Placement) else placement[index])
        if isinstance(outputs, Placement):
            outputs = [outputs] * self.num_outputs
        return Rule(name, tuple(inputs), tuple(outputs), None if self.data else emit)


RuleFunction = Callable[[Site], Iterable[Rule]]


def aligned(shape: Sequence[Size], out: Sequence[Size], dim: int, outer: Size) -> Placement:
    """Placement of an operand broadcast (from the right) to ``out`` that is sharded on ``dim``."""
    own = dim - (len(out) - len(shape))
    return S(own, outer) if own >= 0 and shape[own] == out[dim] else V


def canonical(rule: Rule, inputs: Sequence[fx.Node], node: fx.Node) -> Rule:
    """V and R are one placement for a value without a gradient; say R."""
    plain = tuple(
        R if placement == V and not is_differentiable(value) else placement
        for placement, value in zip(rule.inputs, inputs, strict=True)
    )
    outputs = rule.outputs
    if not is_differentiable(node):
        outputs = tuple(R if placement == V else placement for placement in outputs)
    return Rule(rule.name, plain, outputs, rule.emit)


def normal_dim(dim: int, rank: int) -> int:
    return dim % rank if rank else 0


def normal_dims(dims: int | Sequence[int] | None, rank: int) -> list[int]:
    """Dims without negatives; None and an empty list mean all, as in torch's reductions."""
    if dims is None or (isinstance(dims, list | tuple) and not dims):
        return list(range(rank))
    chosen = [dims] if isinstance(dims, int) else dims
    return [normal_dim(dim, rank) for dim in chosen]


def entry_size(entry: object) -> Size:
    """The size that an entry of a size argument stands for (an int, a SymInt or a node)."""
    return size_of(entry.meta["val"] if isinstance(entry, fx.Node) else entry)
