"""Element-wise operators, operators linear in an operand, and constants."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import fx

from galvatron_compile.passes.sharding.rules_base import (
    Rule,
    RuleFunction,
    Site,
    aligned,
)
from galvatron_compile.passes.sharding.views import shape_of
from galvatron_compile.placement import P, Placement, R, S

# Element by element like those that torch tags as pointwise, but without the tag.
UNTAGGED_POINTWISE = frozenset(
    [
        "__and__",
        "__or__",
        "__xor__",
        "__lshift__",
        "__rshift__",
        "to",
        "_to_copy",
        "contiguous",
        "detach",
        "alias",
        "lift_fresh_copy",
        "dropout",
        "native_dropout",
        "floor_divide",
        "hardswish",
        "log_sigmoid",
        "celu",
        "masked_fill",
        "type_as",
        "bernoulli",
        "square",
        "conj",
        "fill",
        "zeros_like",
        "ones_like",
        "full_like",
        "empty_like",
        "rand_like",
        "randn_like",
        "clone",
        "where",
        "positive",
        "copy",
        "clip",
        "clamp",
    ]
)

# Outputs that do not depend on the values of the input, only on its shape.
CONSTANT_LIKE = frozenset(["zeros_like", "ones_like", "full_like", "empty_like"])

# For each operator, the sets of arguments in which it is jointly linear: partial sums in exactly
# these give partial sums, every other tensor being V. A scalar cannot stand in for a tensor here:
# add(P, 1) would add the 1 on every rank.
LINEAR_IN: dict[str, tuple[tuple[str, ...], ...]] = {
    "add": (("self", "other"),),
    "sub": (("self", "other"),),
    "mul": (("self",), ("other",)),
    "div": (("self",),),
    "neg": (("self",),),
    "positive": (("self",),),
    "clone": (("self",),),
    "contiguous": (("self",),),
    "alias": (("self",),),
    "to": (("self",),),
    "_to_copy": (("self",),),
    "addcmul": (("self", "tensor1"), ("self", "tensor2")),
}


def pointwise(site: Site) -> Iterator[Rule]:
    """Any output dim may be sharded; an operand that is broadcast along it must be V."""
    out = site.shape
    for dim, size in enumerate(out):
        for outer in site.shards(size):
            where: dict[str, Any] = {}
            for name, _, value in site.slots:
                if name == "other" and site.name in ("to", "type_as"):
                    continue  # only its dtype is used
                where[name] = aligned(shape_of(value.meta["val"]), out, dim, outer)
            yield site.rule(f"shard {dim}", where, S(dim, outer))
    yield from linear_in(site)


def linear_in(site: Site) -> Iterator[Rule]:
    value = site.node.meta["val"]
    if not (isinstance(value, torch.Tensor) and value.dtype.is_floating_point):
        return  # casting partial sums to integers rounds each part
    if site.arguments.get("rounding_mode") is not None:
        return
    for names in LINEAR_IN.get(site.name, ()):
        if all(site.has(name) and is_float(site.arguments[name]) for name in names):
            yield site.rule("partial", dict.fromkeys(names, P), P)


def is_float(node: fx.Node) -> bool:
    return bool(node.meta["val"].dtype.is_floating_point)


def constant_like(site: Site) -> Iterator[Rule]:
    yield from pointwise(site)
    for index in range(len(site.slots)):
        yield site.rule("values unused", {site.slots[index][0]: P}, R)


def factory(site: Site) -> Iterator[Rule]:
    """A constant of a given size: sharded where its size is; inputs lend only dtype and device.

    On the data axis only: sizes are nodes there, local by themselves. Nothing differentiable can
    come out of a constant, so on the tensor axis it is R. ``arange`` is no such constant: its
    values tell the ranks apart (see the batch pass).
    """
    if not site.data:
        return
    for dim, size in enumerate(site.shape):
        for outer in site.shards(size):
            yield from over_any_input(site, f"shard {dim}", S(dim, outer))
    if not any(site.shards(size) for size in site.shape):
        yield from over_any_input(site, "constant", R)


def over_any_input(site: Site, name: str, output: Placement) -> Iterator[Rule]:
    """The same output for every placement of the first input."""
    yield site.rule(name, {}, output)
    if site.slots:
        argument, _, value = site.slots[0]
        yield site.rule(name, {argument: P}, output)
        for dim, size in enumerate(shape_of(value.meta["val"])):
            for outer in site.shards(size):
                yield site.rule(name, {argument: S(dim, outer)}, output)


ELEMENTWISE: dict[str, RuleFunction] = {
    **dict.fromkeys(UNTAGGED_POINTWISE, pointwise),
    **dict.fromkeys(CONSTANT_LIKE, constant_like),
    **dict.fromkeys(
        [
            "full",
            "zeros",
            "ones",
            "empty",
            "rand",
            "randn",
            "new_zeros",
            "new_ones",
            "new_full",
            "new_empty",
        ],
        factory,
    ),
}
