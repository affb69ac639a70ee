"""Operators that move, cut or repeat dims without computing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch import fx

from galvatron_compile.passes.sharding.rules_base import (
    Emit,
    Emitter,
    Rule,
    RuleFunction,
    Site,
    aligned,
    entry_size,
    normal_dim,
    normal_dims,
)
from galvatron_compile.passes.sharding.views import quotient, shape_of
from galvatron_compile.placement import P, R, S, V


def view(site: Site) -> Iterator[Rule]:
    """view, reshape, flatten, unflatten, unsqueeze, squeeze: see ``views.map_shard``."""
    source, target = site.input_shape("self"), site.shape
    for dim, size in enumerate(source):
        for outer in site.shards(size):
            mapped = site.view(source, target, dim, outer)
            if mapped is not None:
                j, q = mapped
                emit = _view_emit(site, j)
                yield site.rule(f"shard {dim}", {"self": S(dim, outer)}, S(j, q), emit)
    yield site.rule("partial", {"self": P}, P)


def _view_emit(site: Site, dim: int) -> Emit | None:
    argument = {"view": "size", "_unsafe_view": "size", "reshape": "shape", "unflatten": "sizes"}
    if site.name not in argument:
        return None  # sizes follow from the input
    name = argument[site.name]
    sizes = list(site.arguments[name])
    entry = dim
    if site.name == "unflatten":
        entry = dim - normal_dim(site.arguments["dim"], len(site.input_shape("self")))
        if not 0 <= entry < len(sizes):
            return None
    if sizes[entry] == -1:
        return None
    full = site.shape

    def emit(e: Emitter) -> fx.Node:
        local = list(e.argument(name))
        if isinstance(local[entry], fx.Node):  # symbolic: let torch infer it from the others
            local = [full[i] if size == -1 else size for i, size in enumerate(local)]
            local[entry] = -1
        else:
            local[entry] = local[entry] // e.size
        return e.call(**{name: local})

    return emit


def expand(site: Site) -> Iterator[Rule]:
    source, target = site.input_shape("self"), site.shape
    shift = len(target) - len(source)
    for dim, size in enumerate(target):
        for outer in site.shards(size):
            own = dim - shift
            kept = own >= 0 and source[own] == size
            where = {"self": S(own, outer) if kept else V}
            if isinstance(site.arguments["size"][dim], fx.Node) and not site.data:
                continue
            yield site.rule(f"shard {dim}", where, S(dim, outer), _expand_emit(site, dim))
    yield site.rule("partial", {"self": P}, P)


def _expand_emit(site: Site, dim: int) -> Emit | None:
    if site.arguments["size"][dim] == -1:
        return None

    def emit(e: Emitter) -> fx.Node:
        sizes = list(e.argument("size"))
        sizes[dim] = sizes[dim] // e.size
        return e.call(size=sizes)

    return emit


def expand_as(site: Site) -> Iterator[Rule]:
    source, target = site.input_shape("self"), site.shape
    shift = len(target) - len(source)
    for dim, size in enumerate(target):
        for outer in site.shards(size):
            own = dim - shift
            place = S(own, outer) if own >= 0 and source[own] == size else V
            yield site.rule(f"shard {dim}", {"self": place, "other": S(dim, outer)}, S(dim, outer))


def broadcast_tensors(site: Site) -> Iterator[Rule]:
    count = len(site.slots)
    for dim, size in enumerate(site.shape):
        for outer in site.shards(size):
            places = [
                aligned(shape_of(value.meta["val"]), site.shape, dim, outer)
                for _, _, value in site.slots
            ]
            yield site.rule(f"shard {dim}", {"tensors": places}, S(dim, outer))
    yield site.rule("partial", {"tensors": [P] * count}, P)


def repeat(site: Site) -> Iterator[Rule]:
    """Dims repeated once keep their shard; one that is repeated b times is a batch of copies."""
    source, target = site.input_shape("self"), site.shape
    repeats = site.arguments["repeats"]
    shift = len(target) - len(source)
    for dim, size in enumerate(target):
        own = dim - shift
        for outer in site.shards(size):
            if own >= 0 and source[own] == size and not isinstance(repeats[dim], fx.Node):
                yield site.rule(f"shard {dim}", {"self": S(own, outer)}, S(dim, outer))
            elif site.data and quotient(entry_size(repeats[dim]), site.n) is not None:
                yield site.rule(f"shard {dim}", {"self": V}, S(dim, outer))
    yield site.rule("partial", {"self": P}, P)


def permutation(site: Site) -> Sequence[int]:
    """Output dim i is input dim ``permutation(site)[i]``."""
    rank = len(site.shape)
    order = list(range(rank))
    if site.name == "permute":
        return [normal_dim(dim, rank) for dim in site.arguments["dims"]]
    if site.name in ("t", "numpy_T"):
        return order[::-1]
    if site.name == "movedim":
        return _movedim(normal_dims(site.arguments["source"], rank), site, rank)
    if site.name in ("mT", "adjoint"):
        first, second = rank - 2, rank - 1
    else:
        first, second = (normal_dim(site.arguments[key], rank) for key in ("dim0", "dim1"))
    order[first], order[second] = order[second], order[first]
    return order


def _movedim(moved: list[int], site: Site, rank: int) -> list[int]:
    places = normal_dims(site.arguments["destination"], rank)
    order: list[int] = [-1] * rank
    for source, destination in zip(moved, places, strict=True):
        order[destination] = source
    rest = iter(dim for dim in range(rank) if dim not in moved)
    return [next(rest) if dim < 0 else dim for dim in order]


def permute(site: Site) -> Iterator[Rule]:
    for dim, source in enumerate(permutation(site)):
        for outer in site.shards(site.shape[dim]):
            yield site.rule(f"shard {source}", {"self": S(source, outer)}, S(dim, outer))
    yield site.rule("partial", {"self": P}, P)


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


SHAPE: dict[str, RuleFunction] = {
    **dict.fromkeys(
        [
            "view",
            "_unsafe_view",
            "reshape",
            "flatten",
            "unflatten",
            "unsqueeze",
            "squeeze",
            "ravel",
        ],
        view,
    ),
    "expand": expand,
    "expand_as": expand_as,
    "broadcast_tensors": broadcast_tensors,
    "repeat": repeat,
    **dict.fromkeys(
        ["permute", "transpose", "t", "movedim", "numpy_T", "mT", "adjoint", "swapaxes"], permute
    ),
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
