"""Look-ups and attention."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import fx

from galvatron_compile import operators
from galvatron_compile.graph import noted
from galvatron_compile.passes.sharding.rules_base import (
    Emitter,
    Rule,
    RuleFunction,
    Site,
    normal_dim,
)
from galvatron_compile.passes.sharding.views import Size, shape_of
from galvatron_compile.placement import P, Placement, R, S, V


def embedding(site: Site) -> Iterator[Rule]:
    """Over the ids; over the width; over the vocabulary (a masked look-up, partial sums)."""
    weight, ids = site.input_shape("weight"), site.input_shape("indices")
    if not site.arguments["scale_grad_by_freq"]:  # it counts ids over the whole batch
        for dim, size in enumerate(ids):
            for outer in site.shards(size):
                yield site.rule(f"ids {dim}", {"indices": S(dim, outer)}, S(dim, outer))
    for outer in site.shards(weight[1]):
        out = S(len(site.shape) - 1, outer)
        yield site.rule("width", {"weight": S(1, outer), "indices": R}, out)
    yield site.rule("partial", {"weight": P, "indices": R}, P)
    if 1 in site.shards(weight[0]) and not site.data and not site.arguments["scale_grad_by_freq"]:
        where = {"weight": S(0), "indices": R}
        yield site.rule("vocabulary", where, P, _embedding_shard)


def _embedding_shard(e: Emitter) -> fx.Node:
    arguments = (e.argument("weight"), e.argument("indices"), e.argument("padding_idx"), e.axis)
    return e.graph.call_function(operators.embedding_shard, arguments)


def index_select(site: Site) -> Iterator[Rule]:
    source, ids = site.input_shape("self"), site.input_shape("index")
    at = normal_dim(site.arguments["dim"], len(source))
    for dim, size in enumerate(source):
        if dim != at:
            for outer in site.shards(size):
                yield site.rule(f"shard {dim}", {"self": S(dim, outer), "index": R}, S(dim, outer))
    for outer in site.shards(ids[0]) if ids else []:
        yield site.rule("ids", {"self": V, "index": S(0, outer)}, S(at, outer))
    yield site.rule("partial", {"self": P, "index": R}, P)


def gather(site: Site) -> Iterator[Rule]:
    """Dims where source and index agree; along the gathered dim only the index."""
    source, ids = site.input_shape("self"), site.input_shape("index")
    at = normal_dim(site.arguments["dim"], len(source))
    for dim, size in enumerate(ids):
        for outer in site.shards(size):
            if dim == at:
                yield site.rule("ids", {"self": V, "index": S(dim, outer)}, S(dim, outer))
            elif source[dim] == size:
                place = S(dim, outer)
                yield site.rule(f"shard {dim}", {"self": place, "index": place}, place)
    yield site.rule("partial", {"self": P, "index": R}, P)


def index(site: Site) -> Iterator[Rule]:
    """``x[i, :, j]``: dims not indexed; dims of the (broadcast) indices with x whole.

    A batch index ``arange(batch)`` at the batch dim of x, and only there, picks each sample's own
    row: x and index are both sharded then.
    """
    source = site.input_shape("self")
    given = [
        (dim, entry)
        for dim, entry in enumerate(site.arguments["indices"])
        if isinstance(entry, fx.Node)
    ]
    if any(str(entry.meta["val"].dtype) in ("torch.bool", "torch.uint8") for _, entry in given):
        return  # a mask: the output's size depends on the data
    shapes = [shape_of(entry.meta["val"]) for _, entry in given]
    width = max((len(shape) for shape in shapes), default=0)
    where = _index_position([dim for dim, _ in given])
    batched = [number for number, (_, entry) in enumerate(given) if noted(entry, "batch_index")]
    if batched:
        yield from _batch_indexed(site, given, shapes, batched, where, width)
        return
    rest = [dim for dim in range(len(source)) if dim not in [d for d, _ in given]]
    for number, dim in enumerate(rest):
        out = number if number < where else number + width
        for outer in site.shards(source[dim]):
            placed = [R] * len(given)
            yield site.rule(
                f"shard {dim}",
                {"self": S(dim, outer), "indices": _full(site, placed)},
                S(out, outer),
            )
    for k in range(width):
        for outer in site.shards(site.shape[where + k]):
            placed = [_broadcast(shape, width, k, site.shape[where + k], outer) for shape in shapes]
            yield site.rule(
                f"ids {k}", {"self": V, "indices": _full(site, placed)}, S(where + k, outer)
            )
    yield site.rule("partial", {"self": P, "indices": _full(site, [R] * len(given))}, P)


def _batch_indexed(
    site: Site,
    given: list[tuple[int, fx.Node]],
    shapes: list[tuple[Size, ...]],
    batched: list[int],
    where: int,
    width: int,
) -> Iterator[Rule]:
    if len(batched) != 1 or not site.data:
        return
    dim = given[batched[0]][0]
    own = shapes[batched[0]]
    sharded = [k for k, size in enumerate(own) if site.shards(size)]
    if len(sharded) != 1 or not site.shards(site.input_shape("self")[dim]):
        return
    k = sharded[0] + width - len(own)
    extent = own[sharded[0]]
    placed = [_broadcast(shape, width, k, extent, 1) for shape in shapes]
    yield site.rule("own samples", {"self": S(dim), "indices": _full(site, placed)}, S(where + k))


def _index_position(dims: list[int]) -> int:
    """Where the indices' dims come out: in place if they are neighbours, in front if not."""
    adjacent = bool(dims) and dims == list(range(dims[0], dims[0] + len(dims)))
    return dims[0] if adjacent else 0


def _broadcast(shape: Sequence[Size], width: int, k: int, extent: Size, outer: Size) -> Placement:
    own = k - (width - len(shape))
    return S(own, outer) if own >= 0 and shape[own] == extent else R


def _full(site: Site, placed: Sequence[Placement]) -> list[Placement]:
    """Placements by position in the list argument, which may hold None between."""
    rest = iter(placed)
    return [next(rest) if isinstance(entry, fx.Node) else R for entry in site.arguments["indices"]]


def attention(site: Site) -> Iterator[Rule]:
    """scaled_dot_product_attention over samples and heads.

    Grouped queries (``enable_gqa``) share a key head among neighbouring query heads, so equal
    blocks of both stay together. The mask is sharded only on dims that it really has.
    """
    names = ("query", "key", "value")
    shapes = {name: site.input_shape(name) for name in names}
    rank = len(site.shape)
    grouped = bool(site.arguments.get("enable_gqa"))
    if any(len(shape) != rank for shape in shapes.values()):
        return
    for dim in range(rank - 2):
        for outer in site.shards(site.shape[dim]):
            where: dict[str, Placement] = {}
            legal = True
            for name in names:
                size = shapes[name][dim]
                same = size == site.shape[dim] or (grouped and dim == rank - 3)
                if same:
                    legal &= outer in site.shards(size)
                    where[name] = S(dim, outer)
                elif size == 1:
                    where[name] = V
                else:
                    legal = False
            if site.has("attn_mask"):
                mask = site.input_shape("attn_mask")
                own = dim - (rank - len(mask))
                real = own >= 0 and mask[own] == site.shape[dim]
                where["attn_mask"] = S(own, outer) if real else V
            if legal:
                yield site.rule(f"shard {dim}", where, S(dim, outer))
    if not site.arguments.get("dropout_p"):
        yield site.rule("partial", {"value": P}, P)


INDEX: dict[str, RuleFunction] = {
    "embedding": embedding,
    "index_select": index_select,
    "gather": gather,
    "index": index,
    "scaled_dot_product_attention": attention,
}
