"""A plan's step twice: as the simulator predicts it, and as it was recorded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

from galvatron_compile import simulator, timeline, work_json
from galvatron_compile.errors import PlanError
from galvatron_compile.passes.order import order
from galvatron_compile.plans import Plan
from galvatron_compile.prediction import stage_noun
from galvatron_compile.recorded import OPTIMIZER, Recording
from galvatron_compile.recorded_causes import Causes, causes
from galvatron_compile.recordings import Recordings
from galvatron_compile.simulated_memory import PARTS
from galvatron_compile.simulation import GroupSimulation, Simulation
from galvatron_compile.timeline import NAMES, Held, Span

RESERVE = "framework reserve"
assert RESERVE in PARTS


class Row(NamedTuple):
    """A quantity twice; None where one side does not know it."""

    name: str
    predicted: float | None
    measured: float | None

    @property
    def ratio(self) -> float | None:
        """Measured over predicted."""
        if not self.predicted or self.measured is None:
            return None
        return self.measured / self.predicted


@dataclass(frozen=True)
class Trace:
    """simulation: None if the plan predicts nothing. missing: what it does not predict, and what
    to do about it. has_actions: whether it predicts every action, or only whole stages.
    reserve_bytes: of a rank of every group, in the predicted memory and in no recording."""

    plan: Plan
    recordings: Recordings
    simulation: Simulation | None
    missing: str = ""
    has_actions: bool = False
    reserve_bytes: tuple[int, ...] = ()

    @staticmethod
    def of(plan: Plan, recordings: Recordings) -> Trace:
        """PlanError if the recording is not of this plan. Without an optimizer in the recording
        there is none in the prediction either."""
        recordings.check_plan(plan)
        try:
            return _simulated(plan, recordings)
        except PlanError as error:
            return Trace(plan, recordings, None, f"The plan cannot be simulated: {error}.")

    @property
    def num_groups(self) -> int:
        return self.plan.pp

    @cached_property
    def total_ms(self) -> float:
        """How long the axis must be for both."""
        predicted = self.simulation.step_ms if self.simulation is not None else 0.0
        return max(predicted, self.recordings.step_ms)

    def who(self, group: int) -> str:
        """A group, for people."""
        return f"{stage_noun(self.plan)} {group}" if self.plan.pp > 1 else "every rank"

    def measured(self, group: int) -> Recording:
        """The rank that stands for a group: the one that computed longest."""
        return self.recordings.of_group(group)

    def spans(self, group: int) -> tuple[tuple[Span, ...], tuple[Span, ...]]:
        """(predicted, measured) of a group."""
        predicted = self.simulation.groups[group].spans if self.simulation is not None else ()
        return predicted, self.recordings.spans(self.measured(group).rank)

    def memory(self, group: int) -> tuple[tuple[Held, ...], tuple[Held, ...]]:
        """(predicted, measured) of a rank of a group, without the framework's reserve; empty where
        it is not known."""
        predicted: tuple[Held, ...] = ()
        if self.simulation is not None and self.has_actions:
            reserve = self.reserve_bytes[group]
            steps = self.simulation.groups[group].memory.steps
            predicted = tuple(Held(step.time_ms, step.num_bytes - reserve) for step in steps)
        return predicted, self.measured(group).memory

    @cached_property
    def rows(self) -> tuple[Row, ...]:
        """The step, and where it goes: means over all ranks, which add up to it."""
        predicted = self.simulation.groups if self.simulation is not None else ()
        measured = [causes(self.recordings, r.rank) for r in self.recordings.ranks]
        step = self.simulation.step_ms if self.simulation is not None else None
        return (
            Row("the whole step", step, self.recordings.step_ms),
            *_mean_rows(predicted, measured, self.has_actions),
        )

    @cached_property
    def peaks(self) -> tuple[Row, ...]:
        """Peak bytes of a rank of every group, without the framework's reserve."""
        rows = []
        for group in range(self.num_groups):
            predicted, measured = self.memory(group)
            rows.append(Row(self.who(group), _peak(predicted), _peak(measured)))
        return tuple(rows)

    def causes(self, group: int) -> tuple[Row, ...]:
        """Where the time of one rank of a group goes, cause by cause; zeros left out."""
        found = causes(self.recordings, self.measured(group).rank)
        simulated = self.simulation.groups[group] if self.simulation is not None else None
        mine, theirs = dict(_by_cause(found)), dict(_by_cause(simulated))
        rows = []
        for name in _ORDER:
            predicted = theirs.get(name, 0.0) if simulated is not None else None
            if predicted or mine.get(name):
                rows.append(Row(name, predicted, mine.get(name, 0.0)))
        return tuple(rows)


def _simulated(plan: Plan, recordings: Recordings) -> Trace:
    known = work_json.of_plan(plan)
    if known is not None:
        outlines, works = known
        if not has_optimizer(recordings):
            works = tuple(replace(work, optimizer_ms=0.0) for work in works)
        found = simulator.simulate(outlines, [order(each) for each in outlines], works)
        reserves = tuple(work.reserve_bytes for work in works)
        return Trace(plan, recordings, found, has_actions=True, reserve_bytes=reserves)
    times = timeline.StageTimes.of(plan)
    if times.assumed:
        lacks = "The plan predicts nothing: it was written by hand, or its numbers were removed"
        return Trace(plan, recordings, None, f"{lacks}; {_REMEDY}.")
    outlines, works = timeline.by_stage(plan, times)
    found = simulator.simulate(outlines, [order(each) for each in outlines], works)
    lacks = (
        "The plan predicts the times of whole stages but not of every action, so there is no "
        "predicted communication and no memory over time"
    )
    return Trace(plan, recordings, found, f"{lacks}; {_REMEDY}.")


_REMEDY = "`galvatron-compile price` gives it what is missing"
COMPUTATION = "layers"
OTHER = "between and around the actions"
COMMUNICATION = (
    "gather", "reduce", "reduce_tensor", "reduce_tied", "send_activations", "send_gradients",
)  # fmt: skip
_ORDER = (COMPUTATION, *(NAMES[kind] for kind in COMMUNICATION), "optimizer", "bubble", OTHER)


def has_optimizer(recordings: Recordings) -> bool:
    return any(event.kind == OPTIMIZER for event in recordings.ranks[0].events)


def _layers_ms(found: GroupSimulation | Causes) -> float:
    """A layer's time holds its own collectives and what communication beside it costs it: a
    recording does not tell them apart."""
    if isinstance(found, Causes):
        return found.computed_ms
    return found.computed_ms + found.slowed_ms + sum(found.inner.values())


def _mean_rows(
    predicted: Sequence[GroupSimulation], measured: Sequence[Causes], has_actions: bool
) -> list[Row]:
    def mean(values: list[float]) -> float | None:
        return sum(values) / len(values) if values else None

    exposed = mean([sum(g.exposed.values()) for g in predicted])
    return [
        Row(
            COMPUTATION,
            mean([_layers_ms(g) for g in predicted]),
            mean([_layers_ms(c) for c in measured]),
        ),
        Row("exposed communication", exposed, mean([c.exposed_ms for c in measured])),
        Row(
            "optimizer" if has_actions else NAMES["step_once"],
            mean([g.optimizer_ms for g in predicted]),
            mean([c.optimizer_ms for c in measured]),
        ),
        Row(
            "bubble",
            mean([g.bubble_ms for g in predicted]),
            mean([c.bubble_ms for c in measured]),
        ),
        Row(OTHER, 0.0 if predicted else None, mean([c.other_ms for c in measured])),
    ]


def _by_cause(found: GroupSimulation | Causes | None) -> list[tuple[str, float]]:
    if found is None:
        return []
    other_ms = found.other_ms if isinstance(found, Causes) else 0.0
    return [
        (COMPUTATION, _layers_ms(found)),
        *((NAMES[kind], value) for kind, value in found.exposed.items()),
        ("optimizer", found.optimizer_ms),
        ("bubble", found.bubble_ms),
        (OTHER, other_ms),
    ]


def _peak(steps: Sequence[Held]) -> float | None:
    return max((step.num_bytes for step in steps), default=None)
