"""One rule for everything that is an einsum: linear, the matmul family, einsum itself.

For a letter that the output has: operands that have it are sharded there, the others are V (their
gradient sums over the letter, of which a rank sees a part), and so is the output. For a letter
that is summed away: the same, and the output is P. And a product is linear in each operand.
A bias is one more operand of the sum: sharded with the output, P where the output is P.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import fx

from galvatron_compile.passes.sharding.rules_base import Rule, RuleFunction, Site, aligned
from galvatron_compile.passes.sharding.views import Size, shape_of
from galvatron_compile.placement import P, Placement, S, V

BATCH_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVW"


def letters_rules(
    site: Site,
    operands: Sequence[tuple[str, str]],
    output: str,
    bias: str | None = None,
) -> Iterator[Rule]:
    """Rules for ``operands`` = (argument name, letters), right-aligned broadcasting ignored.

    A dim of size 1 that is broadcast against a larger one is written ``.``; so is its sum.
    Several operands of one list argument share its name, in order.
    """
    sizes = _letter_sizes(site, operands)
    for letter, size in sizes.items():
        for outer in site.shards(size):
            placed = [
                S(letters.index(letter), outer) if letter in letters else V
                for _, letters in operands
            ]
            summed = letter not in output
            out: Placement = P if summed else S(output.index(letter), outer)
            where = _by_argument(operands, placed)
            if bias:
                shape = site.input_shape(bias)
                where[bias] = [P if summed else aligned(shape, site.shape, out.dim, outer)]
            yield site.rule(f"{'sum' if summed else 'shard'} {letter}", where, out)
    for index in range(len(operands)):
        placed = [P if i == index else V for i in range(len(operands))]
        where = _by_argument(operands, placed)
        if bias:
            where[bias] = [P]
        yield site.rule(f"partial {index}", where, P)


def _letter_sizes(site: Site, operands: Sequence[tuple[str, str]]) -> dict[str, Size]:
    sizes: dict[str, Size] = {}
    nodes = [value for _, _, value in site.slots]
    names = [name for name, _, _ in site.slots]
    used = dict.fromkeys(names, 0)
    for name, letters in operands:
        at = [i for i, slot in enumerate(names) if slot == name][used[name]]
        used[name] += 1
        for letter, size in zip(letters, _shape(nodes[at]), strict=True):
            if letter != ".":
                sizes[letter] = size
    repeated = {c for _, letters in operands for c in letters if letters.count(c) > 1}
    return {letter: size for letter, size in sizes.items() if letter not in repeated}


def _shape(node: fx.Node) -> tuple[Size, ...]:
    return shape_of(node.meta["val"])


def _by_argument(
    operands: Sequence[tuple[str, str]], placed: Sequence[Placement]
) -> dict[str, list[Placement]]:
    where: dict[str, list[Placement]] = {}
    for (name, _), placement in zip(operands, placed, strict=True):
        where.setdefault(name, []).append(placement)
    return where


def linear(site: Site) -> Iterator[Rule]:
    rank = len(site.input_shape("input"))
    batch = BATCH_LETTERS[: rank - 1]
    out = "o" if len(site.input_shape("weight")) == 2 else ""
    bias = "bias" if site.has("bias") else None
    yield from letters_rules(
        site, [("input", batch + "i"), ("weight", out + "i")], batch + out, bias
    )


def mm(site: Site) -> Iterator[Rule]:
    yield from letters_rules(site, [("self", "ij"), ("mat2", "jk")], "ik")


def addmm(site: Site) -> Iterator[Rule]:
    yield from letters_rules(site, [("mat1", "ij"), ("mat2", "jk")], "ik", "self")


def bmm(site: Site) -> Iterator[Rule]:
    yield from letters_rules(site, [("self", "bij"), ("mat2", "bjk")], "bik")


def baddbmm(site: Site) -> Iterator[Rule]:
    yield from letters_rules(site, [("batch1", "bij"), ("batch2", "bjk")], "bik", "self")


def mv(site: Site) -> Iterator[Rule]:
    yield from letters_rules(site, [("self", "ij"), ("vec", "j")], "i")


def dot(site: Site) -> Iterator[Rule]:
    yield from letters_rules(site, [("self", "i"), ("tensor", "i")], "")


def outer_product(site: Site) -> Iterator[Rule]:
    yield from letters_rules(site, [("self", "i"), ("vec2", "j")], "ij")


def matmul(site: Site) -> Iterator[Rule]:
    left, right = site.input_shape("self"), site.input_shape("other")
    batch_rank = max(len(left) - 2, len(right) - 2, 0)
    names = BATCH_LETTERS[:batch_rank]
    out_batch = site.shape[:batch_rank]

    def batch(shape: tuple[Size, ...]) -> str:
        own = shape[:-2]
        start = batch_rank - len(own)
        return "".join(
            names[start + i] if size == out_batch[start + i] else "." for i, size in enumerate(own)
        )

    left_core = "ij" if len(left) > 1 else "j"
    right_core = "jk" if len(right) > 1 else "j"
    output = names + ("i" if len(left) > 1 else "") + ("k" if len(right) > 1 else "")
    yield from letters_rules(
        site,
        [("self", batch(left) + left_core), ("other", batch(right) + right_core)],
        output,
    )


def einsum(site: Site) -> Iterator[Rule]:
    """Explicit equations without an ellipsis; others have no rule."""
    equation = str(site.arguments["equation"]).replace(" ", "")
    if "->" not in equation or "." in equation:
        return
    inputs, output = equation.split("->")
    terms = inputs.split(",")
    shapes = [_shape(node) for _, _, node in site.slots]
    if any(size == 1 for shape in shapes for size in shape):
        terms = [
            "".join("." if size == 1 else c for c, size in zip(term, shape, strict=True))
            for term, shape in zip(terms, shapes, strict=True)
        ]
    yield from letters_rules(site, [("tensors", term) for term in terms], output)


def convolution(site: Site) -> Iterator[Rule]:
    """Batch, output channels and (ungrouped) input channels; never the spatial dims."""
    source, weight = site.input_shape("input"), site.input_shape("weight")
    if len(source) != len(weight) or site.arguments.get("transposed"):
        return
    spatial = len(source) - 2
    grouped = site.arguments.get("groups", 1) != 1
    bias = site.has("bias")
    for outer in site.shards(source[0]):
        yield site.rule("batch", {"input": S(0, outer)}, S(0, outer))
    if grouped or spatial < 1:
        return
    for outer in site.shards(weight[0]):
        where = {"weight": S(0, outer), **({"bias": S(0, outer)} if bias else {})}
        yield site.rule("out channels", where, S(1, outer))
    for outer in site.shards(weight[1]):
        where = {"input": S(1, outer), "weight": S(1, outer), **({"bias": P} if bias else {})}
        yield site.rule("in channels", where, P)


MATMUL: dict[str, RuleFunction] = {
    "linear": linear,
    "mm": mm,
    "addmm": addmm,
    "bmm": bmm,
    "baddbmm": baddbmm,
    "mv": mv,
    "dot": dot,
    "outer": outer_product,
    "matmul": matmul,
    "einsum": einsum,
    **dict.fromkeys(["conv1d", "conv2d", "conv3d", "convolution"], convolution),
}
