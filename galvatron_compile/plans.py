"""The plan: the only thing that search and runtime share."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from galvatron_compile.errors import PlanError
from galvatron_compile.fields import Fields
from galvatron_compile.strategy import Strategy
from galvatron_compile.text import columns, mib, ms

PLAN_VERSION = 2

SCHEDULES = ("gpipe", "1f1b", "interleaved", "zero-bubble")
"""Orders in which a pipeline runs its micro-batches; see galvatron_compile.schedules."""


@dataclass(frozen=True)
class Stage:
    """A piece of the pipeline: layers ``first`` up to but not including ``last``."""

    first: int
    last: int


@dataclass(frozen=True)
class Plan:
    """Which strategy every layer runs with, in how many micro-batches.

    model: fingerprint of the layered graph the plan was made for ("" fits any with as many layers).
    layers: name of every layer, in order; strategies: its strategy.
    stages: ranges of layers in order; none means one stage with all layers. Stage i runs on the
        i-th group of ``world_size / pp`` ranks, and with virtual stages on group ``i mod pp``.
    schedule: one of :data:`SCHEDULES`, of no meaning for one stage.
    virtual: how many stages each group of ranks runs ("interleaved" only).
    predicted: what the search expected, JSON-able, with units in the keys (``step_ms``,
        ``memory_bytes``, and under ``layers`` one mapping per layer).
    classes: name of every layer's class, if known; for people, nothing depends on it.

    Raises PlanError, which says what to change, if the parts do not fit together.
    """

    model: str
    world_size: int
    global_batch_size: int
    num_micro_batches: int
    layers: tuple[str, ...]
    strategies: tuple[Strategy, ...]
    stages: tuple[Stage, ...] = ()
    schedule: str = "1f1b"
    virtual: int = 1
    predicted: Mapping[str, Any] = field(default_factory=dict, compare=False)
    classes: tuple[str, ...] = field(default=(), compare=False)

    def __post_init__(self) -> None:
        for name in ("world_size", "global_batch_size", "num_micro_batches", "virtual"):
            if getattr(self, name) < 1:
                raise PlanError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not self.layers:
            raise PlanError("a plan needs at least one layer")
        if len(self.strategies) != len(self.layers):
            raise PlanError(
                f"a plan needs one strategy per layer, got {len(self.strategies)} strategies for "
                f"{len(self.layers)} layers"
            )
        if self.classes and len(self.classes) != len(self.layers):
            raise PlanError(
                f"classes must be empty or name one class per layer, got {len(self.classes)} for "
                f"{len(self.layers)} layers"
            )
        self._check_stages()
        self._check_schedule()
        self._check_ranks()
        self._check_batch()

    def _check_stages(self) -> None:
        if not self.stages:
            return
        edges = [0, *(stage.last for stage in self.stages)]
        starts = [stage.first for stage in self.stages]
        if starts != edges[:-1] or edges[-1] != len(self.layers):
            ranges = ", ".join(f"{stage.first}-{stage.last}" for stage in self.stages)
            raise PlanError(
                f"stages must cover layers 0-{len(self.layers)} in order without gaps, got {ranges}"
            )
        for index, (first, last) in enumerate(pairwise(edges)):
            if last <= first:
                raise PlanError(f"stage {index} has no layers; use fewer stages")

    def _check_schedule(self) -> None:
        if self.schedule not in SCHEDULES:
            known = ", ".join(SCHEDULES)
            raise PlanError(f"schedule {self.schedule!r} is not known; use one of {known}")
        if self.num_stages % self.virtual:
            raise PlanError(
                f"{self.num_stages} stages do not divide into {self.virtual} virtual stages a rank"
            )
        if self.virtual > 1 and self.schedule != "interleaved":
            raise PlanError(
                f"virtual stages need the interleaved schedule, got {self.schedule}; change one"
            )

    def _check_ranks(self) -> None:
        for name, strategy in zip(self.layers, self.strategies, strict=True):
            if strategy.num_ranks * self.pp != self.world_size:
                stages = f" in each of {self.pp} stages" if self.pp > 1 else ""
                raise PlanError(
                    f"layer {name!r} with {strategy} uses {strategy.num_ranks} ranks{stages}, but "
                    f"the plan is for {self.world_size}; make tp times dp equal "
                    f"{self.world_size / self.pp:g}"
                )

    def _check_batch(self) -> None:
        for name, strategy in zip(self.layers, self.strategies, strict=True):
            pieces = strategy.dp * self.num_micro_batches
            if self.global_batch_size % pieces:
                nearest = max(1, round(self.global_batch_size / pieces)) * pieces
                raise PlanError(
                    f"a global batch of {self.global_batch_size} does not split into "
                    f"{self.num_micro_batches} micro-batches over dp {strategy.dp} of layer "
                    f"{name!r}; use a multiple of {pieces}, for example {nearest}, or change dp "
                    "or the number of micro-batches"
                )

    @property
    def num_stages(self) -> int:
        return max(1, len(self.stages))

    @property
    def pp(self) -> int:
        """Pipeline-parallel degree: groups of ranks, each with ``virtual`` stages."""
        return self.num_stages // self.virtual

    def group_layers(self, group: int) -> tuple[int, ...]:
        """Indices of the layers that the ranks of a pipeline group run, in order."""
        stages = self.stages or (Stage(0, len(self.layers)),)
        return tuple(i for s in stages[group :: self.pp] for i in range(s.first, s.last))

    @property
    def data_size(self) -> int:
        """In how many parts the batch is loaded: the greatest divisor common to all dp."""
        return math.gcd(*(strategy.dp for strategy in self.strategies))

    def check_model(
        self, fingerprint: str, num_layers: int, world_size: int, global_batch_size: int
    ) -> None:
        """Raise PlanError unless the plan is for this model, world size and batch."""
        if self.model and fingerprint and self.model != fingerprint:
            raise PlanError(
                f"plan is for another model (fingerprint {self.model}, this one is {fingerprint}); "
                "search a new plan for this model"
            )
        found = (num_layers, world_size, global_batch_size)
        planned = (len(self.layers), self.world_size, self.global_batch_size)
        remedies = (
            "another model: it has {0} layers, this one has {1}; search a new plan for this model",
            "another world size: {0} ranks, but there are {1}; launch {0} processes or search a "
            "new plan",
            "another global batch size: {0}, but it is {1}; pass global_batch_size={0} or search "
            "a new plan",
        )
        for ours, theirs, remedy in zip(planned, found, remedies, strict=True):
            if ours != theirs:
                raise PlanError(f"plan is for {remedy.format(ours, theirs)}")

    def to_json(self) -> str:
        """JSON with a schema version; a list entry per layer, so that people can edit it."""
        layers = []
        for index, (name, strategy) in enumerate(zip(self.layers, self.strategies, strict=True)):
            layer = {"name": name, **dataclasses.asdict(strategy)}
            if self.classes:
                layer["class"] = self.classes[index]
            layers.append(layer)
        document = {
            "version": PLAN_VERSION,
            "model": self.model,
            "world_size": self.world_size,
            "global_batch_size": self.global_batch_size,
            "num_micro_batches": self.num_micro_batches,
            "schedule": self.schedule,
            "virtual": self.virtual,
            "stages": [dataclasses.asdict(stage) for stage in self.stages],
            "layers": layers,
            "predicted": self.predicted,
        }
        return json.dumps(document, indent=1, allow_nan=False) + "\n"

    @staticmethod
    def from_json(text: str) -> Plan:
        """The inverse of :meth:`to_json`. PlanError names the position or the field at fault."""
        try:
            document = json.loads(text)
        except json.JSONDecodeError as error:
            raise PlanError(
                f"plan is not valid JSON: {error.msg} at line {error.lineno} column {error.colno}; "
                "save the plan again"
            ) from error
        top = Fields(document, "plan")
        version = top.take("version", int)
        if version != PLAN_VERSION:
            raise PlanError(
                f"plan has schema version {version}, this version reads {PLAN_VERSION}; search a "
                "new plan or use the version of galvatron_compile that wrote it"
            )
        layers = [Fields(x, f"layers[{i}]") for i, x in enumerate(top.take("layers", list))]
        stages = [Fields(x, f"stages[{i}]") for i, x in enumerate(top.take("stages", list, []))]
        names = tuple(layer.take("name", str) for layer in layers)
        classes = tuple(layer.take("class", str, "") for layer in layers)
        plan = Plan(
            model=top.take("model", str),
            world_size=top.take("world_size", int),
            global_batch_size=top.take("global_batch_size", int),
            num_micro_batches=top.take("num_micro_batches", int),
            layers=names,
            strategies=tuple(_strategy(layer) for layer in layers),
            stages=tuple(Stage(x.take("first", int), x.take("last", int)) for x in stages),
            schedule=top.take("schedule", str, "1f1b"),
            virtual=top.take("virtual", int, 1),
            predicted=top.take("predicted", dict, {}),
            classes=classes if any(classes) else (),
        )
        for fields in (top, *layers, *stages):
            fields.finish()
        return plan

    def save(self, path: str | Path) -> None:
        Path(path).write_text(self.to_json(), encoding="utf-8")

    @staticmethod
    def load(path: str | Path) -> Plan:
        """Read a saved plan. PlanError names the file."""
        try:
            return Plan.from_json(Path(path).read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise PlanError(f"there is no plan at {path}; save one with Plan.save") from error
        except UnicodeDecodeError as error:
            raise PlanError(f"{path}: plan is not UTF-8 text (byte {error.start})") from error
        except PlanError as error:
            raise PlanError(f"{path}: {error}") from error

    def __str__(self) -> str:
        count = self.num_micro_batches
        batches = "1 micro-batch" if count == 1 else f"{count} micro-batches"
        virtual = f", {self.virtual} a rank" if self.virtual > 1 else ""
        stages = f", {self.num_stages} stages ({self.schedule}{virtual})"
        stages = stages if self.num_stages > 1 else ""
        ranks = "1 rank" if self.world_size == 1 else f"{self.world_size} ranks"
        lines = [f"plan for {ranks}: global batch {self.global_batch_size} in {batches}{stages}"]
        if "step_ms" in self.predicted and "memory_bytes" in self.predicted:
            step = self.predicted.get("simulated_ms", self.predicted["step_ms"])
            memory = self.predicted["memory_bytes"]
            lines.append(f"predicted: {ms(step)} ms a step, {mib(memory)} MiB a rank")
        return "\n".join([*lines, "", _layer_table(self)])


def _layer_table(plan: Plan) -> str:
    """One row per run of layers with equal strategy; times and bytes are summed over the run."""
    predicted = plan.predicted.get("layers", ())
    predicted = predicted if len(predicted) == len(plan.layers) else ()
    header = ["layers", "name", "strategy"]
    if predicted:
        header += ["step ms", "resharding ms", "states MiB", "saved MiB", "transient MiB"]
    rows = []
    for first, last in _runs(plan):
        span = str(first) if last == first + 1 else f"{first}-{last - 1}"
        name = plan.layers[first]
        name += "" if last == first + 1 else f" … {plan.layers[last - 1]}"
        row = [span, name, str(plan.strategies[first])]
        if predicted:
            run = predicted[first:last]
            row += [ms(_total(run, "step_ms")), ms(_total(run, "resharding_ms"))]
            row += [mib(_total(run, "state_bytes")), mib(_total(run, "saved_bytes"))]
            row += [mib(max(layer.get("transient_bytes", 0) for layer in run))]
        rows.append(row)
    return columns(header, rows, left=3)


def _total(run: Sequence[Mapping[str, Any]], key: str) -> Any:
    return sum(layer.get(key, 0) for layer in run)


def _runs(plan: Plan) -> list[tuple[int, int]]:
    """Ranges of layers with one strategy, cut where the class (if known) or the stage changes."""
    starts = {stage.first for stage in plan.stages}
    kinds = plan.classes or ("",) * len(plan.layers)
    key = list(zip(plan.strategies, kinds, strict=True))
    cuts = [i for i in range(1, len(key)) if key[i] != key[i - 1] or i in starts]
    return list(pairwise([0, *cuts, len(key)]))


def _strategy(layer: Fields) -> Strategy:
    values: dict[str, Any] = {}
    for item in dataclasses.fields(Strategy):
        values[item.name] = layer.take(item.name, type(item.default), item.default)
    try:
        return Strategy(**values)
    except PlanError as error:
        raise PlanError(f"{layer.where}: {error}") from error
