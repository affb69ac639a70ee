"""Operators that cut, join or reorder pieces along some dims and keep the others."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import fx

from galvatron_compile.passes.sharding.rules_base import (
    Emit,
    Emitter,
    Rule,
    RuleFunction,
    Site,
    normal_dim,
    normal_dims,
)
from galvatron_compile.passes.sharding.views import shape_of
from galvatron_compile.placement import P, R, S, V


def slice_(site: Site) -> Iterator[Rule]:
    """Any dim but the sliced one; that one too if the slice takes all of it."""
    source = site.input_shape("self")
    sliced = normal_dim(site.arguments["dim"], len(source))
    whole = site.shape == source and site.arguments["step"] == 1
    start, end = site.arguments["start"], site.arguments["end"]
    # An end written as the global size would cut nothing from a shard either, but a start would.
    whole = whole and start in (None, 0) and (isinstance(end, int | None) or site.data)
    for dim, size in enumerate(source):
        if dim != sliced or whole:
            for outer in site.shards(size):
                yield site.rule(f"shard {dim}", {"self": S(dim, outer)}, S(dim, outer))
    yield site.rule("partial", {"self": P}, P)


def select(site: Site) -> Iterator[Rule]:
    source = site.input_shape("self")
    selected = normal_dim(site.arguments["dim"], len(source))
    for dim, size in enumerate(source):
        if dim != selected:
            for outer in site.shards(size):
                yield site.rule(
                    f"shard {dim}", {"self": S(dim, outer)}, S(dim - (dim > selected), outer)
                )
    yield site.rule("partial", {"self": P}, P)


def cat(site: Site) -> Iterator[Rule]:
    shapes = [shape_of(value.meta["val"]) for _, _, value in site.slots]
    joined = normal_dim(site.arguments.get("dim", 0), len(site.shape))
    if any(len(shape) != len(site.shape) for shape in shapes):
        return  # the legacy empty 1-dim tensor
    for dim, size in enumerate(site.shape):
        if dim != joined:
            for outer in site.shards(size):
                place = S(dim, outer)
                yield site.rule(f"shard {dim}", {"tensors": [place] * len(shapes)}, place)
    if len({shape[joined] for shape in shapes}) == 1:
        for outer in site.shards(shapes[0][joined]):
            places = [S(joined, outer)] * len(shapes)
            yield site.rule("pieces", {"tensors": places}, S(joined, outer * len(shapes)))
    yield site.rule("partial", {"tensors": [P] * len(shapes)}, P)


def stack(site: Site) -> Iterator[Rule]:
    new = normal_dim(site.arguments.get("dim", 0), len(site.shape))
    count = len(site.slots)
    for dim, size in enumerate(site.shape):
        if dim != new:
            for outer in site.shards(size):
                own = S(dim - (dim > new), outer)
                yield site.rule(f"shard {dim}", {"tensors": [own] * count}, S(dim, outer))
    yield site.rule("partial", {"tensors": [P] * count}, P)


def split(site: Site) -> Iterator[Rule]:
    """split, split_with_sizes, chunk, unbind: pieces keep the shards of the other dims.

    Along the split dim, ``S(dim, pieces · q)`` gives every piece ``S(dim, q)``.
    """
    source = site.input_shape("self")
    at = normal_dim(site.arguments.get("dim", 0), len(source))
    pieces = [shape_of(value) for value in site.node.meta["val"]]
    unbound = site.name == "unbind"
    for dim, size in enumerate(source):
        if dim != at:
            out = dim - (unbound and dim > at)
            for outer in site.shards(size):
                yield site.rule(f"shard {dim}", {"self": S(dim, outer)}, S(out, outer))
    if not unbound and len(pieces) > 1 and len({shape[at] for shape in pieces}) == 1:
        for outer in site.shards(pieces[0][at]):
            whole = S(at, outer * len(pieces))
            yield site.rule("pieces", {"self": whole}, S(at, outer), _split_emit(site))
    yield site.rule("partial", {"self": P}, P)


def _split_emit(site: Site) -> Emit | None:
    if site.name == "chunk":
        return None
    name = "split_sizes" if site.name == "split_with_sizes" else _split_argument(site)

    def emit(e: Emitter) -> fx.Node:
        sizes: Any = e.argument(name)
        if isinstance(sizes, int):
            return e.call(**{name: sizes // e.size})
        return e.call(**{name: [size // e.size for size in sizes]})

    return emit


def _split_argument(site: Site) -> str:
    return "split_size" if "split_size" in site.arguments else "split_sizes"


def getitem(site: Site) -> Iterator[Rule]:
    """An element of a list: it lies as the element does (also P and V)."""
    for dim, size in enumerate(site.shape):
        for outer in site.shards(size):
            place = S(dim, outer)
            yield Rule(f"shard {dim}", (place,), (place,))
    yield Rule("partial", (P,), (P,))


def pad(site: Site) -> Iterator[Rule]:
    """Dims that are not padded; with zeros also partial sums."""
    widths = site.arguments["pad"]
    rank = len(site.shape)
    padded = {rank - 1 - i // 2 for i, width in enumerate(widths) if width != 0}
    yield from others(site, padded)
    if site.arguments.get("mode", "constant") == "constant" and not site.arguments.get("value"):
        yield site.rule("partial", {"self": P}, P)


def others(site: Site, taken: set[int], argument: str = "self") -> Iterator[Rule]:
    """Every dim but those taken is sharded alike in input and output of one shape's rank."""
    for dim, size in enumerate(site.input_shape(argument)):
        if dim not in taken:
            for outer in site.shards(size):
                yield site.rule(f"shard {dim}", {argument: S(dim, outer)}, S(dim, outer))


def one_hot(site: Site) -> Iterator[Rule]:
    if site.arguments["num_classes"] != -1:  # else it depends on the largest index
        yield from others(site, set())


def along_dims(site: Site) -> Iterator[Rule]:
    """roll, flip: linear, along the dims named."""
    dims = normal_dims(site.arguments["dims"], len(site.shape))
    yield from others(site, set(dims))
    yield site.rule("partial", {"self": P}, P)


def triangle(site: Site) -> Iterator[Rule]:
    rank = len(site.shape)
    yield from others(site, {rank - 2, rank - 1})
    yield site.rule("partial", {"self": P}, P)


def size(site: Site) -> Iterator[Rule]:
    """The size of a dim that is not sharded; on the data axis, the local number of samples."""
    shape = site.input_shape("self")
    asked = normal_dim(site.arguments["dim"], len(shape))
    for place in (V, P):
        yield site.rule("size", {"self": place}, R)
    for dim, extent in enumerate(shape):
        if dim != asked or site.data:
            for outer in site.shards(extent):
                yield site.rule("size", {"self": S(dim, outer)}, R)


PIECES: dict[str, RuleFunction] = {
    "slice": slice_,
    "select": select,
    **dict.fromkeys(("cat", "concat"), cat),
    "stack": stack,
    **dict.fromkeys(["split", "split_with_sizes", "chunk", "unbind"], split),
    "getitem": getitem,
    "one_hot": one_hot,
    **dict.fromkeys(("pad", "constant_pad_nd"), pad),
    **dict.fromkeys(("roll", "flip"), along_dims),
    **dict.fromkeys(("triu", "tril"), triangle),
    "sym_size": size,
}
