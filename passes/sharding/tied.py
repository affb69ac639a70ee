"""Classes that share a parameter, solved as one problem."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import product

from galvatron_compile.errors import ShapeError, UnsupportedError
from galvatron_compile.graph import LayeredGraph
from galvatron_compile.passes.sharding.assignment import shard_layer
from galvatron_compile.passes.sharding.sharded_layer import ShardedLayer
from galvatron_compile.placement import Placement, R, S, V

Place = tuple[int, int]  # class index, index among the class's parameters


def shard_layers(
    layered: LayeredGraph, classes: Sequence[int], tp: int, sequence_parallel: bool
) -> list[ShardedLayer]:
    """Solve classes together so that a shared parameter lies alike in all of them.

    The placements of the shared parameters are enumerated (whole, or split along one dim), every
    class is solved under each choice, and the least total wins; ties go to the first.
    Raises ShapeError or UnsupportedError where no choice is possible.
    """
    best: list[ShardedLayer] = []
    reason: Exception | None = None
    for fixed in _choices(_shared_places(layered, classes)):
        try:
            found = [
                _shard(layered, index, tp, sequence_parallel, fixed.get(index, {}))
                for index in classes
            ]
        except (ShapeError, UnsupportedError) as error:
            reason = reason or error
            continue
        if not best or _total(found) < _total(best):
            best = found
    if not best:
        assert reason is not None
        raise reason
    return best


def _total(found: Sequence[ShardedLayer]) -> float:
    return sum(sharded.objective for sharded in found)


def _shard(
    layered: LayeredGraph,
    index: int,
    tp: int,
    sequence_parallel: bool,
    fixed: Mapping[int, Placement],
) -> ShardedLayer:
    """A class without hidden states runs under sequence parallel as under plain tensor parallel."""
    layer_class = layered.classes[index]
    try:
        return shard_layer(layer_class, tp, sequence_parallel, fixed)
    except UnsupportedError:
        if not sequence_parallel:
            raise
        return shard_layer(layer_class, tp, False, fixed)


def _shared_places(
    layered: LayeredGraph, classes: Sequence[int]
) -> list[tuple[int, frozenset[Place]]]:
    """Rank of every parameter that stands in several places, and these places."""
    places: dict[str, set[Place]] = {}
    for layer in layered.layers:
        if layer.class_index in classes:
            for position, name in enumerate(layer.parameters):
                places.setdefault(name, set()).add((layer.class_index, position))
    shared = {
        (layered.graph.parameters[name].dim(), frozenset(where))
        for name, where in places.items()
        if len(where) > 1
    }
    return sorted(shared, key=lambda item: sorted(item[1]))


def _choices(
    shared: Sequence[tuple[int, frozenset[Place]]],
) -> Iterator[dict[int, dict[int, Placement]]]:
    options = [[R, V, *(S(dim) for dim in range(rank))] for rank, _ in shared]
    for chosen in product(*options):
        fixed: dict[int, dict[int, Placement]] = {}
        for (_, where), placement in zip(shared, chosen, strict=True):
            for class_index, position in where:
                fixed.setdefault(class_index, {})[position] = placement
        yield fixed
