"""When everything in a step runs: spans of time on the streams of every pipeline group.

The nouns do not say where the times come from: the simulator makes them from costs, the runtime
from clocks, and both draw on the same axes. :func:`simulate` makes one from a plan alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal, NamedTuple

from galvatron_compile import work_json
from galvatron_compile.actions import COMPUTE, LayerOutline, Outline
from galvatron_compile.plans import Plan, Stage
from galvatron_compile.prediction import Prediction
from galvatron_compile.work import LayerWork, Phase, SendWork, Work

Stream = Literal["compute", "communication", "messages"]
STREAMS: tuple[Stream, ...] = ("compute", "communication", "messages")

NAMES = {
    "forward": "forward",
    "recompute": "forward again",
    "backward": "backward",
    "backward_input": "backward to the inputs",
    "backward_weight": "backward to the weights",
    "optimizer": "optimizer",
    "step_once": "gradient synchronisation and optimizer",
    "gather": "gathering parameters",
    "reduce": "summing gradients",
    "reduce_tensor": "summing gradients over tensor-parallel ranks",
    "reduce_tied": "summing gradients over stages",
    "send_activations": "sending activations",
    "send_gradients": "sending gradients",
}
"""What spans of a kind are, for people. A kind is that of the action which started it; the last
part of a step is in no list, ``step_once`` where sums of gradients are not told apart from it."""


@dataclass(frozen=True, slots=True)
class Span:
    """kind: see NAMES. index: of the layer (compute), the unit (gather, reduce) or the sending
    stage (messages); -1 for the optimizer. micro_batch: -1 for what happens once a step.
    stream: of the group; a message runs on its sender's."""

    kind: str
    index: int
    micro_batch: int
    stream: Stream
    start_ms: float
    end_ms: float


class Held(NamedTuple):
    """From ``time_ms`` on, a rank holds ``num_bytes``."""

    time_ms: float
    num_bytes: int


@dataclass(frozen=True)
class Timeline:
    """The spans of every pipeline group in order of their start. Those of the compute stream and of
    the communication stream do not overlap.

    memory: what a rank of every group holds, as steps; empty if it is not known.
    assumed: nothing was predicted; only the proportions mean something.
    """

    rows: tuple[tuple[Span, ...], ...]
    memory: tuple[tuple[Held, ...], ...] = ()
    assumed: bool = False

    def row(self, group: int, stream: Stream) -> list[Span]:
        return [span for span in self.rows[group] if span.stream == stream]

    @cached_property
    def total_ms(self) -> float:
        return max((span.end_ms for row in self.rows for span in row), default=0.0)

    @cached_property
    def idle_share(self) -> float:
        """Of the time of all groups, how much none of them computes."""
        busy = sum(
            span.end_ms - span.start_ms
            for row in self.rows
            for span in row
            if span.stream == "compute"
        )
        whole = self.total_ms * len(self.rows)
        return 1 - busy / whole if whole else 0.0


def blocks(row: Sequence[Span], chunk_of: Sequence[int]) -> list[tuple[Span, int]]:
    """Compute spans joined where a group goes on with the same stage, direction and micro-batch
    at once, with the chunk they belong to. chunk_of: of every layer."""
    found: list[tuple[Span, int]] = []
    for span in row:
        if span.stream != "compute":
            continue
        kind = "backward" if span.kind == "recompute" else span.kind
        chunk = chunk_of[span.index] if span.kind in COMPUTE else 0
        if found:
            last, before = found[-1]
            same = _direction(last.kind) == _direction(kind) and chunk == before
            gap = span.start_ms - last.end_ms
            if same and last.micro_batch == span.micro_batch and gap <= 1e-9 * span.end_ms:
                kept = kind if kind != "backward" else last.kind
                found[-1] = replace(last, kind=kept, end_ms=span.end_ms), chunk
                continue
        found.append((replace(span, kind=kind), chunk))
    return found


def _direction(kind: str) -> str:
    return "backward" if kind == "backward_input" else kind


def simulate(plan: Plan) -> Timeline:
    """Walk the lists of a plan's groups with its predicted times.

    Action by action where the plan has its work (see :mod:`galvatron_compile.work_json`), else
    stage by stage. PlanError if the schedule does not fit the plan.
    """
    from galvatron_compile import simulator
    from galvatron_compile.passes.order import order

    known = work_json.of_plan(plan)
    if known is not None:
        outlines, works = known
        return simulator.simulate(outlines, [order(each) for each in outlines], works).timeline
    times = StageTimes.of(plan)
    outlines, works = by_stage(plan, times)
    found = simulator.simulate(outlines, [order(each) for each in outlines], works).timeline
    rows = tuple(
        tuple(replace(s, kind="step_once") if s.kind == "optimizer" else s for s in row)
        for row in found.rows
    )
    return replace(found, rows=rows, memory=(), assumed=times.assumed)


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


def by_stage(plan: Plan, times: StageTimes) -> work_json.Groups:
    """Every stage as one layer, named by its first, that needs nothing gathered or summed."""
    stages = plan.stages or (Stage(0, len(plan.layers)),)
    last = len(stages) - 1
    outlines, works = [], []
    for group in range(plan.pp):
        mine = range(group, len(stages), plan.pp)
        layers = {stages[s].first: LayerOutline(f"stage {s}") for s in mine}
        chunks = tuple((stages[s].first,) for s in mine)
        count = plan.num_micro_batches
        outlines.append(Outline(chunks, layers, (), count, plan.schedule, plan.pp, group))
        work = {
            stages[s].first: LayerWork(Phase(times.forward_ms[s]), Phase(times.backward_ms[s]))
            for s in mine
        }
        sends = tuple(
            SendWork(times.p2p_ms * (s < last), times.p2p_ms * (s > 0)) for s in mine
        )
        once_ms = times.step_once_ms[group]
        works.append(Work(work, (), sends, once_ms))
    return tuple(outlines), tuple(works)


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


def _divided(totals: Sequence[float], weights: Sequence[float]) -> list[float]:
    """A group's time spread over its chunks in proportion; weights: per stage."""
    pp = len(totals)
    shares = []
    for stage, weight in enumerate(weights):
        group = stage % pp
        whole = sum(weights[group::pp])
        shares.append(totals[group] * (weight / whole if whole else pp / len(weights)))
    return shares
