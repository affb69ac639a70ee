"""Patterns of a collective beside a matrix product, which can be one kernel that hides it."""

from __future__ import annotations

from galvatron_compile import collectives, fused
from galvatron_compile.passes.fuse_patterns import Match, Node, is_call, is_op, ordered, val


def overlapping(node: Node) -> Match | None:
    """The pattern that ends at ``node``, or begins there, if any."""
    return gather_linear(node) or linear_reduce_scatter(node)


def gather_linear(node: Node) -> Match | None:
    """all-gather of an input → all linear layers that read it. Their weights become one, so that
    the input is gathered once and there is one gradient to be scattered."""
    if not is_call(node, collectives.all_gather) or not node.users:
        return None
    value, dim, outer, axis = node.args
    readers = ordered(list(node.users))
    if dim == val(node).ndim - 1 or not all(_is_linear(user, node) for user in readers):
        return None
    weights = [user.args[1] for user in readers]
    biases = [user.args[2] if len(user.args) > 2 else None for user in readers]
    if any(x is not None and x.op not in ("placeholder", "get_attr") for x in weights + biases):
        return None  # the call stands in front of the first reader: later weights must be there
    args = (value, weights, biases, dim, outer, axis)
    covers = ordered([node, *readers])
    return Match(
        "all_gather → linear", fused.gather_linear, args, readers, covers, readers[0], several=True
    )


def linear_reduce_scatter(node: Node) -> Match | None:
    """linear → reduce-scatter of its output; a bias that was made P for the sum is added behind."""
    if not is_call(node, collectives.reduce_scatter):
        return None
    product, dim, outer, axis = node.args
    if not is_op(product, "linear") or len(product.users) > 1 or dim == val(node).ndim - 1:
        return None
    covers, bias = [product, node], None
    if len(product.args) > 2 and product.args[2] is not None:
        split = product.args[2]
        if not is_call(split, collectives.split_sum) or split.args[1] is not axis:
            return None
        covers.append(split)
        bias = split.args[0]
    args = (*product.args[:2], bias, dim, outer, axis)
    return Match(
        "linear → reduce_scatter", fused.linear_reduce_scatter, args, (node,), ordered(covers), node
    )


def near_miss(node: Node) -> Match | None:
    """A collective whose neighbours cannot be one kernel with it, as a match of itself alone."""
    if is_call(node, collectives.all_gather):
        name = "all_gather → linear"
    elif is_call(node, collectives.reduce_scatter):
        name = "linear → reduce_scatter"
    else:
        return None
    return Match(name, node.target, node.args, (node,), (node,), node)


WHY_NOT = {
    "all_gather → linear": "not only linear layers read it",
    "linear → reduce_scatter": "what it sums is not the output of one linear layer",
}


def _is_linear(node: Node, value: Node) -> bool:
    """A linear layer that reads ``value`` as its input alone."""
    return is_op(node, "linear") and node.args[0] is value and value not in node.args[1:]
