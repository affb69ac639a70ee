"""A problem made ready for the search: times of a whole step, fewer options, fewer layouts.

Two things shrink without losing an optimum. Layouts between which nothing ever costs anything and
that look alike to every other layout are one layout. And an option goes if another of the same
layout is at least as good in every number, for the class itself and every class tied to it (tied
layers must agree, so both must be able to change together).
"""

from __future__ import annotations

from functools import cached_property

import numpy as np

from galvatron_compile.passes.pipeline.closed_form import (
    Objective,
    chunk_flights,
    even_boundaries,
    layer_ns,
)
from galvatron_compile.passes.pipeline.problem import Bools, Ints, PipelineProblem


class Tables:
    """Arrays are [classes, options] of the problem; ``allowed`` leaves out dominated options.

    time_ns: a whole step; send_next_ns, send_back_ns: the same for the p2p of a stage's ends.
    layout: [options], merged; kinds: per layer, its class, or a number of its own if it is tied.
    """

    def __init__(self, problem: PipelineProblem) -> None:
        self.problem = problem
        self.family = problem.family
        self.objective = Objective.of(problem.family)
        costs, m = problem.costs, problem.family.num_micro_batches
        self.num_layers = len(problem.layers)
        self.classes = np.asarray(problem.layers, dtype=np.int64)
        self.time_ns = layer_ns(problem)
        self.state_bytes, self.saved_bytes = costs.state_bytes, costs.saved_bytes
        self.transient_bytes = costs.transient_bytes
        self.send_next_ns: Ints = m * costs.forward_send_ns
        self.send_back_ns: Ints = m * costs.backward_send_ns
        self.ties = merged(problem.tied)
        self.layout, representative = self._merge_layouts()
        self.num_layouts = len(representative)
        grid = np.ix_(representative, representative)
        self.switches = {pair: m * matrix[grid] for pair, matrix in costs.switch_ns.items()}
        self.free = np.zeros((self.num_layouts, self.num_layouts), dtype=np.int64)
        self.flights = [chunk_flights(problem.family, g) for g in range(problem.family.pp)]

    def switch(self, before: int, after: int) -> Ints:
        """[layouts, layouts] nanoseconds a step between neighbours of these classes."""
        return self.switches.get((before, after), self.free)

    @cached_property
    def kinds(self) -> tuple[int, ...]:
        kinds = list(self.problem.layers)
        own = self.problem.costs.num_classes
        for layer in sorted(layer for tie in self.ties for layer in tie):
            kinds[layer] = own
            own += 1
        return tuple(kinds)

    @cached_property
    def tie_of(self) -> dict[int, int]:
        """Layer -> which tie it belongs to."""
        return {layer: i for i, tie in enumerate(self.ties) for layer in tie}

    @cached_property
    def chunks(self) -> tuple[tuple[tuple[int, int], ...], ...] | None:
        """Interleaved: the layer ranges of every group, fixed by an even split; else None."""
        family = self.family
        if family.virtual == 1:
            return None
        edges = even_boundaries(self.num_layers, family.num_stages)
        return tuple(
            tuple((edges[i], edges[i + 1]) for i in range(g, family.num_stages, family.pp))
            for g in range(family.pp)
        )

    def _merge_layouts(self) -> tuple[Ints, list[int]]:
        costs = self.problem.costs
        matrices = list(costs.switch_ns.values())
        representative: list[int] = []
        new = np.zeros(costs.num_layouts, dtype=np.int64)
        for layout in range(costs.num_layouts):
            for index, other in enumerate(representative):
                if all(
                    not x[layout, other]
                    and not x[other, layout]
                    and (x[layout] == x[other]).all()
                    and (x[:, layout] == x[:, other]).all()
                    for x in matrices
                ):
                    new[layout] = index
                    break
            else:
                new[layout] = len(representative)
                representative.append(layout)
        return new[costs.layout], representative

    @cached_property
    def allowed(self) -> Bools:
        costs = self.problem.costs
        num_classes, num_options = costs.allowed.shape
        never_worse = np.ones((num_classes, num_options, num_options), dtype=np.bool_)
        for numbers in (
            *(self.time_ns, self.state_bytes, self.saved_bytes, self.transient_bytes),
            *(self.send_next_ns, self.send_back_ns),
        ):
            never_worse &= numbers[:, :, None] <= numbers[:, None, :]
        # [class, i, j]: i can stand in for j.
        never_worse |= ~costs.allowed[:, None, :]
        never_worse &= costs.allowed[:, :, None] | ~costs.allowed[:, None, :]
        classes = tuple(tuple({self.problem.layers[layer] for layer in tie}) for tie in self.ties)
        for together in merged(classes):
            never_worse[list(together)] = never_worse[list(together)].all(axis=0)
        never_worse &= self.layout[:, None] == self.layout[None, :]
        options = np.arange(num_options)
        equal = never_worse & never_worse.transpose(0, 2, 1)
        # Of equals the first stays.
        beats = never_worse & (~equal | (options[:, None] < options[None, :]))
        return np.asarray(costs.allowed & ~beats.any(axis=1))


def merged(groups: tuple[tuple[int, ...], ...]) -> tuple[tuple[int, ...], ...]:
    """Groups made disjoint: two that share a layer are one; a single layer is none."""
    result: list[set[int]] = []
    for group in groups:
        touching = [other for other in result if other & set(group)]
        result = [other for other in result if other not in touching]
        result.append(set(group).union(*touching))
    return tuple(tuple(sorted(group)) for group in result if len(group) > 1)
