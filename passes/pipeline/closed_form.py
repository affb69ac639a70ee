"""The time and memory of a pipeline: the one formula that search, tests and prices share.

With P groups, m micro-batches and bubble share phi = a / b (:mod:`galvatron_compile.schedules`),

    T_g   = sum over the layers of group g of  m · micro + gamma · step  +  m · (switching + p2p)
    step  = [ phi · sum of T_g  +  (m - phi) · max of T_g ] / m,     gamma = m / (m + phi (P - 1))

so that a balanced pipeline takes (m + phi (P - 1)) micro-batches and one synchronisation: fill and
drain (arXiv 2104.04473, section 2.2) weigh every group, the steady state only the slowest.
Everything is whole: what is minimised is a · sum + (m b - a) · max, and a step is that over m b,
rounded up to a nanosecond.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from galvatron_compile.errors import PlanError
from galvatron_compile.passes.pipeline.problem import Family, Ints, PipelineProblem
from galvatron_compile.schedules import bubble_share, in_flight


class Evaluation(NamedTuple):
    """total_ns: the step; group_ns, group_bytes: T and memory of every group."""

    total_ns: int
    group_ns: tuple[int, ...]
    group_bytes: tuple[int, ...]


@dataclass(frozen=True)
class Objective:
    """``sum_weight · sum + max_weight · max``, in units of 1 / ``denominator`` nanoseconds."""

    sum_weight: int
    max_weight: int
    denominator: int

    @staticmethod
    def of(family: Family) -> Objective:
        share = bubble_share(family.schedule, family.virtual)
        whole = family.num_micro_batches * share.denominator
        return Objective(share.numerator, whole - share.numerator, whole)

    def value(self, total: int, slowest: int) -> int:
        return self.sum_weight * total + self.max_weight * slowest

    def total_ns(self, value: int) -> int:
        return -(-value // self.denominator)


def layer_ns(problem: PipelineProblem) -> Ints:
    """[classes, options]: what a layer adds to T of its group, switching and p2p aside."""
    family, costs = problem.family, problem.costs
    share = bubble_share(family.schedule, family.virtual)
    top = family.num_micro_batches * share.denominator
    bottom = top + share.numerator * (family.pp - 1)
    scaled = (2 * top * costs.step_ns + bottom) // (2 * bottom)  # rounded half up
    return np.asarray(family.num_micro_batches * costs.micro_ns + scaled)


def even_boundaries(num_layers: int, num_stages: int) -> tuple[int, ...]:
    """Edges of stages as equal as they can be; [num_stages + 1], from 0 to ``num_layers``."""
    return tuple(i * num_layers // num_stages for i in range(num_stages + 1))


def chunk_flights(family: Family, group: int) -> tuple[int, ...]:
    """Micro-batches that every chunk of ``group`` holds at its peak."""
    return in_flight(family.schedule, family.pp, family.num_micro_batches, family.virtual, group)


def evaluate(
    problem: PipelineProblem, boundaries: Sequence[int], options: Sequence[int]
) -> Evaluation:
    """Price given stages. boundaries: edges, [stages + 1]; options: [layers], into strategies.

    Stage i runs on group i mod pp. Whether it fits and whether ties agree is the caller's
    question. PlanError for boundaries that are no partition, or an option that is not allowed.
    """
    family, costs, layers = problem.family, problem.costs, problem.layers
    m, num_stages = family.num_micro_batches, family.num_stages
    edges = list(boundaries)
    rising = all(a < b for a, b in pairwise(edges))
    if len(edges) != num_stages + 1 or edges[0] != 0 or edges[-1] != len(layers) or not rising:
        raise PlanError(
            f"boundaries must rise from 0 to {len(layers)} over {num_stages} stages, got {edges}"
        )
    for layer, (kind, option) in enumerate(zip(layers, options, strict=True)):
        if not costs.allowed[kind, option]:
            raise PlanError(f"layer {layer} cannot run with {costs.strategies[option]}")
    time_ns = layer_ns(problem)
    group_ns, held = [0] * family.pp, [0] * family.pp
    transient = [0] * family.pp
    for stage in range(num_stages):
        group, first, last = stage % family.pp, edges[stage], edges[stage + 1]
        flight = chunk_flights(family, group)[stage // family.pp]
        for layer in range(first, last):
            at = layers[layer], options[layer]
            group_ns[group] += int(time_ns[at])
            held[group] += int(costs.state_bytes[at]) + flight * int(costs.saved_bytes[at])
            transient[group] = max(transient[group], int(costs.transient_bytes[at]))
            matrix = costs.switch_ns.get((layers[layer - 1], layers[layer]))
            if layer > first and matrix is not None:
                before, after = costs.layout[options[layer - 1]], costs.layout[options[layer]]
                group_ns[group] += m * int(matrix[before, after])
        if stage < num_stages - 1:
            group_ns[group] += m * int(costs.forward_send_ns[layers[last - 1], options[last - 1]])
        if stage > 0:
            group_ns[group] += m * int(costs.backward_send_ns[layers[first], options[first]])
    objective = Objective.of(family)
    value = objective.value(sum(group_ns), max(group_ns))
    memory = tuple(a + b for a, b in zip(held, transient, strict=True))
    return Evaluation(objective.total_ns(value), tuple(group_ns), memory)
