"""Patterns of a collective beside a matrix product, which can be one kernel that hides it."""

from __future__ import annotations

from collections.abc import Iterator

from galvatron_compile import collectives, fused
from galvatron_compile.passes.fuse_match import Match, Node, is_call, is_op, ordered, val


def overlapping(node: Node) -> Iterator[Match]:
    """The pattern that ends at ``node``, or begins there, if any."""
    if is_call(node, collectives.all_gather) and not _why_not_gather(node):
        yield _gather_linear(node)
    if is_call(node, collectives.reduce_scatter) and not _why_not_scatter(node):
        yield _linear_reduce_scatter(node)


def near_miss(node: Node) -> tuple[Match, str] | None:
    """A collective whose neighbours cannot be one kernel with it, as a match of itself alone, and
    why they cannot."""
    if is_call(node, collectives.all_gather):
        name, why_not = "all_gather → linear", _why_not_gather(node)
    elif is_call(node, collectives.reduce_scatter):
        name, why_not = "linear → reduce_scatter", _why_not_scatter(node)
    else:
        return None
    return Match(name, node.target, node.args, (node,), (node,), node), why_not


def _why_not_gather(node: Node) -> str:
    readers = list(node.users)
    if not readers or not all(_is_linear(user, node) for user in readers):
        return "not only linear layers read it"
    if node.args[1] == val(node).ndim - 1:
        return "it gathers the features that the products sum over"
    given = [x for user in readers for x in user.args[1:] if x is not None]
    made = next((x for x in given if x.op not in ("placeholder", "get_attr")), None)
    # The call stands in front of the first reader: later weights must be there by then.
    return "" if made is None else f"{made.name}, which a product reads, is no parameter as it is"


def _gather_linear(node: Node) -> Match:
    """all-gather of an input → all linear layers that read it. Their weights become one, so that
    the input is gathered once and there is one gradient to be scattered."""
    value, dim, outer, axis = node.args
    readers = ordered(list(node.users))
    weights = [user.args[1] for user in readers]
    biases = [user.args[2] if len(user.args) > 2 else None for user in readers]
    args = (value, weights, biases, dim, outer, axis)
    covers = ordered([node, *readers])
    return Match(
        "all_gather → linear", fused.gather_linear, args, readers, covers, readers[0], several=True
    )


def _why_not_scatter(node: Node) -> str:
    product, dim, _, axis = node.args
    if not is_op(product, "linear"):
        return "what it sums is not the output of one linear layer"
    if dim == val(node).ndim - 1:
        return "it scatters the features that the product makes"
    bias = product.args[2] if len(product.args) > 2 else None
    if bias is None or (is_call(bias, collectives.split_sum) and bias.args[1] is axis):
        return ""
    return f"its bias {bias.name} is not split for this sum"


def _linear_reduce_scatter(node: Node) -> Match:
    """linear → reduce-scatter of its output; a bias that was made P for the sum is added behind."""
    product, dim, outer, axis = node.args
    covers, bias = [product, node], None
    if len(product.args) > 2 and product.args[2] is not None:
        split = product.args[2]
        covers.append(split)
        bias = split.args[0]
    args = (*product.args[:2], bias, dim, outer, axis)
    return Match(
        "linear → reduce_scatter", fused.linear_reduce_scatter, args, (node,), ordered(covers), node
    )


def _is_linear(node: Node, value: Node) -> bool:
    return is_op(node, "linear") and node.args[0] is value
