"""Operators that reshape, permute or repeat dims without computing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

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
from galvatron_compile.placement import P, S, V


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
}
