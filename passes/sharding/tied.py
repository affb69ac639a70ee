"""Classes that share a parameter, solved as one problem."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from galvatron_compile.errors import UnsupportedError
from galvatron_compile.graph import LayerClass, LayeredGraph
from galvatron_compile.passes.sharding.assignment import Tie, shard_problems
from galvatron_compile.passes.sharding.problem import Problem, build_problem
from galvatron_compile.passes.sharding.sharded_layer import ShardedLayer


def shard_layers(
    layered: LayeredGraph, classes: Sequence[int], tp: int, sequence_parallel: bool
) -> list[ShardedLayer]:
    """Solve classes together so that a shared parameter lies alike in all of them.

    Raises ShapeError or UnsupportedError where that is not possible.
    """
    ties = _ties(layered, classes)
    problems = [
        _problem(
            layered.classes[index],
            tp,
            sequence_parallel,
            {position for tie in ties for which, position in tie if which == at},
        )
        for at, index in enumerate(classes)
    ]
    return shard_problems(problems, ties)


def _problem(
    layer_class: LayerClass, tp: int, sequence_parallel: bool, tied: Collection[int]
) -> Problem:
    """A class without hidden states runs under sequence parallel as under plain tensor parallel."""
    try:
        return build_problem(layer_class, tp, sequence_parallel, {}, tied)
    except UnsupportedError:
        if not sequence_parallel:
            raise
        return build_problem(layer_class, tp, False, {}, tied)


def _ties(layered: LayeredGraph, classes: Sequence[int]) -> list[Tie]:
    """Where every parameter stands that stands in several places; each set of places once."""
    places: dict[str, set[tuple[int, int]]] = {}
    for layer in layered.layers:
        if layer.class_index in classes:
            at = classes.index(layer.class_index)
            for position, name in enumerate(layer.parameters):
                places.setdefault(name, set()).add((at, position))
    shared = {frozenset(where) for where in places.values() if len(where) > 1}
    return sorted(shared, key=sorted)
