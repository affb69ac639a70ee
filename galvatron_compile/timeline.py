"""When every action of a pipeline runs: the schedule's lists walked with the plan's times.

The closed form that the search minimises assumes a perfect schedule; this walks the very lists
that ranks follow, so a timeline also shows what uneven stages and waiting for neighbours cost.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from galvatron_compile.errors import PlanError
from galvatron_compile.plans import Plan, Stage
from galvatron_compile.prediction import Prediction
from galvatron_compile.schedules import Action, actions

KINDS = {
    "F": "forward",
    "B": "backward",
    "I": "backward to the inputs",
    "W": "backward to the weights",
    "S": "gradient synchronisation and optimizer",
}


class Span(NamedTuple):
    """One action of a group. ``S``, once at the end of a step, has micro-batch -1."""

    kind: str
    chunk: int
    micro_batch: int
    start_ms: float
    end_ms: float


@dataclass(frozen=True)
class StageTimes:
    """Times of one micro-batch in every stage, and once a step in every group.

    p2p_ms: from the end of an action to the moment its neighbour has the result.
    assumed: nothing was predicted; every layer counts 1 ms forward and 2 ms backward.
    """

    forward_ms: tuple[float, ...]
    backward_ms: tuple[float, ...]
    step_once_ms: tuple[float, ...]
    p2p_ms: float = 0.0
    assumed: bool = False

    @staticmethod
    def of(plan: Plan) -> StageTimes:
        """From the groups' times, or else the layers', or else the number of layers."""
        prediction = Prediction.of(plan)
        stages = plan.stages or (Stage(0, len(plan.layers)),)
        counts = [float(stage.last - stage.first) for stage in stages]
        by_layer = {
            key: [sum(layer[key] for layer in prediction.layers[s.first : s.last]) for s in stages]
            for key in ("forward_ms", "backward_ms")
            if prediction.layers and all(key in layer for layer in prediction.layers)
        }
        groups = prediction.groups
        step_once = tuple(g.step_once_ms for g in groups) or (0.0,) * plan.pp
        known: dict[str, list[float]] = dict(by_layer)
        for key in ("forward_ms", "backward_ms"):
            totals = [getattr(group, key) for group in groups]
            if totals and None not in totals:
                known[key] = _divided(totals, by_layer.get(key, counts))
        if len(known) < 2:
            forward, backward = tuple(counts), tuple(2 * count for count in counts)
            return StageTimes(forward, backward, (0.0,) * plan.pp, assumed=True)
        return StageTimes(
            tuple(known["forward_ms"]),
            tuple(known["backward_ms"]),
            step_once,
            _p2p_ms(plan, prediction),
        )


@dataclass(frozen=True)
class Timeline:
    """The actions of every pipeline group, in the order they run.

    assumed: see StageTimes; then only the proportions mean something.
    """

    rows: tuple[tuple[Span, ...], ...]
    assumed: bool = False

    @cached_property
    def total_ms(self) -> float:
        return max(row[-1].end_ms for row in self.rows)

    @cached_property
    def idle_share(self) -> float:
        """Of the time of all groups, how much none of their actions runs."""
        busy = sum(span.end_ms - span.start_ms for row in self.rows for span in row)
        whole = self.total_ms * len(self.rows)
        return 1 - busy / whole if whole else 0.0


def simulate(plan: Plan) -> Timeline:
    """Walk a plan's schedule with its predicted times. PlanError if the schedule does not fit it.

    An action starts when its group is free and its inputs have arrived: forward needs the forward
    of the stage before, backward (or its input part) that of the stage after and the stage's own
    forward. Each half of a split backward takes half of its time.
    """
    schedule = plan.schedule if plan.pp > 1 else "1f1b"  # has no meaning for one stage
    lists = [
        actions(schedule, plan.pp, plan.num_micro_batches, plan.virtual, group)
        for group in range(plan.pp)
    ]
    return walk(lists, StageTimes.of(plan))


def walk(lists: Sequence[Sequence[Action]], times: StageTimes) -> Timeline:
    """lists: the actions of every group; stage ``chunk * groups + group`` is its chunk's.

    PlanError if the groups wait for each other for ever.
    """
    walker = _Walker(lists, times)
    ready = list(range(len(lists)))
    while ready:
        ready += walker.run(ready.pop())
    rows = [_with_step_once(row, g, times) for g, row in enumerate(walker.rows)]
    unfinished = [g for g, row in enumerate(walker.rows) if len(row) < len(lists[g])]
    if unfinished:
        group = unfinished[0]
        stuck = lists[group][len(walker.rows[group])]
        raise PlanError(
            f"the schedule never ends: group {group} waits for ever to run {stuck.kind} of "
            f"micro-batch {stuck.micro_batch}; use another schedule"
        )
    return Timeline(tuple(rows), times.assumed)


class _Walker:
    """Runs each group until it must wait for a result, and wakes it when the result is there."""

    def __init__(self, lists: Sequence[Sequence[Action]], times: StageTimes) -> None:
        self.lists, self.times = lists, times
        self.rows: list[list[Span]] = [[] for _ in lists]
        self.forward: dict[tuple[int, int], float] = {}  # (stage, micro-batch) -> end
        self.backward: dict[tuple[int, int], float] = {}
        self.waiting = defaultdict[tuple[str, int, int], list[int]](list)
        half = tuple(time / 2 for time in times.backward_ms)
        self.took = {"F": times.forward_ms, "B": times.backward_ms, "I": half, "W": half}

    def run(self, group: int) -> Iterator[int]:
        """Run a group as far as it goes; gives the groups that may go on after that."""
        row, todo, pp = self.rows[group], self.lists[group], len(self.lists)
        now = row[-1].end_ms if row else 0.0
        woken: list[int] = []
        for action in todo[len(row) :]:
            stage, batch = action.chunk * pp + group, action.micro_batch
            arrival = self._arrival(action.kind, stage, batch, group)
            if arrival is None:
                break
            start = max(now, arrival)
            now = start + self.took[action.kind][stage]
            row.append(Span(action.kind, action.chunk, batch, start, now))
            if action.kind != "W":
                ends = self.forward if action.kind == "F" else self.backward
                ends[stage, batch] = now
                direction = "F" if action.kind == "F" else "B"
                woken += self.waiting.pop((direction, stage, batch), ())
        return iter(woken)

    def _arrival(self, kind: str, stage: int, batch: int, group: int) -> float | None:
        """When the inputs of an action are there; None if not yet known."""
        if kind == "W":
            return 0.0  # its own input part ran before, in the same list
        if kind == "F":
            neighbour, needed, ends = stage - 1, "F", self.forward
        else:
            neighbour, needed, ends = stage + 1, "B", self.backward
        if not 0 <= neighbour < len(self.times.forward_ms):
            return self.forward[stage, batch] if kind != "F" else 0.0
        end = ends.get((neighbour, batch))
        if end is None:
            self.waiting[needed, neighbour, batch].append(group)
            return None
        return end + self.times.p2p_ms


def _p2p_ms(plan: Plan, prediction: Prediction) -> float:
    """One transfer's share of the pipeline communication that the slowest group waits for.

    A stage sends forward unless it is the last and backward unless it is the first. Where the
    group is not named, it is taken to be one that does both.
    """
    slowest = prediction.slowest_group
    sends = 2 * plan.virtual
    sends -= 0 if slowest is None else (slowest == 0) + (slowest == plan.pp - 1)
    if plan.pp == 1:
        return 0.0
    return prediction.causes.get("pipeline_comm_ms", 0.0) / (sends * plan.num_micro_batches)


def _with_step_once(row: Sequence[Span], group: int, times: StageTimes) -> tuple[Span, ...]:
    once = times.step_once_ms[group]
    if once <= 0 or not row:
        return tuple(row)
    end = row[-1].end_ms
    return (*row, Span("S", 0, -1, end, end + once))


def _divided(totals: Sequence[float], weights: Sequence[float]) -> list[float]:
    """A group's time spread over its chunks in proportion; weights: per stage."""
    pp = len(totals)
    shares = []
    for stage, weight in enumerate(weights):
        group = stage % pp
        whole = sum(weights[group::pp])
        shares.append(totals[group] * (weight / whole if whole else pp / len(weights)))
    return shares
