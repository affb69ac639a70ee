"""What a plan's ``predicted`` says, typed: absent or malformed numbers are None, never an error.

Plans are read from files that older versions or people wrote, so nothing here may be taken for
granted. Keys and units are those of ``Plan.predicted``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from galvatron_compile.plans import Plan

CAUSES = {
    "compute_ms": "computation",
    "tensor_comm_ms": "tensor-parallel communication",
    "context_comm_ms": "context-parallel communication",
    "expert_comm_ms": "expert-parallel communication",
    "data_comm_ms": "data-parallel communication",
    "pipeline_comm_ms": "pipeline communication",
    "resharding_ms": "resharding between layers",
    "optimizer_ms": "optimizer",
    "bubble_ms": "pipeline bubble",
    "other_ms": "not explained",
}
"""What a step's time is spent on; ``other_ms`` is what the causes leave of the step time."""

MEMORY_PARTS = {
    "parameter_bytes": "parameters",
    "gradient_bytes": "gradients",
    "optimizer_bytes": "optimizer states",
    "state_bytes": "parameters, gradients and optimizer states",
    "saved_bytes": "saved activations",
    "transient_bytes": "transient",
    "reserve_bytes": "framework reserve",
    "other_bytes": "not explained",
}
"""What a rank's memory holds; ``state_bytes`` where the three states are not told apart."""

LAYER_KEYS = (
    "forward_ms", "backward_ms", "step_ms", "resharding_ms",
    "state_bytes", "saved_bytes", "transient_bytes",
)  # fmt: skip
_NEGLIGIBLE = 0.002


@dataclass(frozen=True)
class GroupPrediction:
    """One pipeline group: times of one micro-batch over all its layers, memory of one rank.

    step_once_ms: gradient synchronisation and optimizer, once a step. in_flight: micro-batches
    whose activations are held, for every chunk. parts: bytes by the keys of MEMORY_PARTS.
    """

    forward_ms: float | None
    backward_ms: float | None
    step_once_ms: float
    in_flight: tuple[int, ...]
    parts: Mapping[str, float]
    memory_bytes: float | None

    @property
    def total_bytes(self) -> float:
        return self.memory_bytes if self.memory_bytes is not None else sum(self.parts.values())


@dataclass(frozen=True)
class Rival:
    """Another plan that was priced: how much slower it is, and why."""

    name: str
    notation: str
    step_ms: float | None
    behind_percent: float | None
    why: str


@dataclass(frozen=True)
class TradePoint:
    """The best step time when a rank may use ``memory_bytes``."""

    memory_bytes: float
    step_ms: float
    notation: str


@dataclass(frozen=True)
class Prediction:
    """All of ``Plan.predicted``. causes: ms by the keys of CAUSES, in that order, zeros left out.

    mfu_basis: the peak that MFU is a share of.
    slowest_group: the group whose times they are.
    layers and groups are empty unless there is one for every layer and pipeline group.
    """

    step_ms: float | None
    tokens_per_s: float | None
    mfu: float | None
    mfu_basis: str
    memory_bytes: float | None
    memory_limit_bytes: float | None
    causes: Mapping[str, float]
    slowest_group: int | None
    groups: tuple[GroupPrediction, ...]
    layers: tuple[Mapping[str, float], ...]
    tradeoff: tuple[TradePoint, ...]
    alternatives: tuple[Rival, ...]
    baselines: tuple[Rival, ...]
    rejected: tuple[tuple[str, str], ...]
    bound_by: str
    warnings: tuple[str, ...]
    hardware: str
    model_name: str
    seq: float | None
    sources: tuple[str, ...]

    @staticmethod
    def of(plan: Plan) -> Prediction:
        found = plan.predicted
        step_ms = _number(found, "step_ms")
        layers = _layers(plan)
        groups = _groups(plan, layers)
        memory = _number(found, "memory_bytes")
        totals = [group.memory_bytes for group in groups if group.memory_bytes is not None]
        return Prediction(
            step_ms=step_ms,
            tokens_per_s=_number(found, "tokens_per_s"),
            mfu=_number(found, "mfu"),
            mfu_basis=_text(found, "mfu_basis"),
            memory_bytes=memory if memory is not None else max(totals, default=None),
            memory_limit_bytes=_number(found, "memory_limit_bytes"),
            causes=_causes(found, step_ms),
            slowest_group=_slowest(found, plan),
            groups=groups,
            layers=layers,
            tradeoff=_tradeoff(found),
            alternatives=_rivals(found, "alternatives"),
            baselines=_rivals(found, "baselines"),
            rejected=tuple((_text(x, "family"), _text(x, "why")) for x in _maps(found, "rejected")),
            bound_by=_text(found, "bound_by"),
            warnings=_texts(found.get("warnings")),
            hardware=_text(found, "hardware"),
            model_name=_text(found, "model_name"),
            seq=_number(found, "seq"),
            sources=_texts(found.get("sources")),
        )


def stage_noun(plan: Plan) -> str:
    """What to call a pipeline group: with one stage each, groups and stages are the same."""
    return "group" if plan.virtual > 1 else "stage"


def schedule_name(plan: Plan) -> str:
    """The schedule as the field writes it."""
    names = {"gpipe": "GPipe", "1f1b": "1F1B", "interleaved": "interleaved 1F1B"}
    return names.get(plan.schedule, plan.schedule)


def _causes(found: Mapping[str, Any], step_ms: float | None) -> dict[str, float]:
    """From ``causes``, or from the top level, where plans of one stage have them."""
    nested = found.get("causes")
    holder = nested if isinstance(nested, Mapping) else found
    causes = {key: _number(holder, key) or 0.0 for key in CAUSES}
    if step_ms is not None and any(causes.values()):
        rest = step_ms - sum(causes.values())
        causes["other_ms"] += rest if rest > _NEGLIGIBLE * step_ms else 0.0
    return {key: value for key, value in causes.items() if value > 0}


def _slowest(found: Mapping[str, Any], plan: Plan) -> int | None:
    """The group whose times the causes are, if it is named and exists."""
    value = found.get("slowest_group")
    return value if type(value) is int and 0 <= value < plan.pp else None


def _layers(plan: Plan) -> tuple[Mapping[str, float], ...]:
    found = _maps(plan.predicted, "layers")
    if len(found) != len(plan.layers):
        return ()
    layers = []
    for entry in found:
        numbers = {key: _number(entry, key) for key in LAYER_KEYS}
        layers.append({key: value for key, value in numbers.items() if value is not None})
    return tuple(layers)


def _groups(plan: Plan, layers: Sequence[Mapping[str, float]]) -> tuple[GroupPrediction, ...]:
    found = _maps(plan.predicted, "groups")
    if len(found) == plan.pp:
        return tuple(_group(entry) for entry in found)
    if plan.pp > 1 or not layers:
        return ()
    # A plan of one stage has no groups: its layers tell the same, of one micro-batch in flight.
    whole = {
        key: sum(layer.get(key, 0.0) for layer in layers) for key in ("state_bytes", "saved_bytes")
    }
    transient = max(layer.get("transient_bytes", 0.0) for layer in layers)
    times = {
        key: sum(layer[key] for layer in layers)
        for key in ("forward_ms", "backward_ms")
        if all(key in layer for layer in layers)
    }
    memory = {"memory_bytes": _number(plan.predicted, "memory_bytes")}
    return (_group({**whole, **times, **memory, "transient_bytes": transient}),)


def _group(entry: Mapping[str, Any]) -> GroupPrediction:
    parts = {key: _number(entry, key) or 0.0 for key in MEMORY_PARTS}
    if any(parts[key] for key in ("parameter_bytes", "gradient_bytes", "optimizer_bytes")):
        parts["state_bytes"] = 0.0
    memory, total = _number(entry, "memory_bytes"), sum(parts.values())
    if memory is None and total:
        memory = total
    if memory is not None and total and memory - total > _NEGLIGIBLE * memory:
        parts["other_bytes"] += memory - total
    in_flight = entry.get("in_flight")
    if not isinstance(in_flight, Sequence) or isinstance(in_flight, str):
        in_flight = [in_flight]
    return GroupPrediction(
        forward_ms=_number(entry, "forward_ms"),
        backward_ms=_number(entry, "backward_ms"),
        step_once_ms=_number(entry, "step_once_ms") or 0.0,
        in_flight=tuple(x for x in in_flight if isinstance(x, int)),
        parts={key: value for key, value in parts.items() if value > 0},
        memory_bytes=memory,
    )


def _tradeoff(found: Mapping[str, Any]) -> tuple[TradePoint, ...]:
    points = []
    for entry in _maps(found, "tradeoff"):
        memory, step = _number(entry, "memory_bytes"), _number(entry, "step_ms")
        if memory is not None and step is not None:
            points.append(TradePoint(memory, step, _text(entry, "notation")))
    return tuple(sorted(points, key=lambda point: point.memory_bytes))


def _rivals(found: Mapping[str, Any], key: str) -> tuple[Rival, ...]:
    return tuple(
        Rival(
            name=_text(entry, "name"),
            notation=_text(entry, "notation"),
            step_ms=_number(entry, "step_ms"),
            behind_percent=_number(entry, "behind_percent"),
            why=_text(entry, "why"),
        )
        for entry in _maps(found, key)
    )


def _number(holder: Mapping[str, Any], key: str) -> float | None:
    value = holder.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return value


def _text(holder: Mapping[str, Any], key: str) -> str:
    value = holder.get(key)
    return value if isinstance(value, str) else ""


def _texts(value: object) -> tuple[str, ...]:
    """A text, a list of texts, or a mapping of names to texts, as texts."""
    if isinstance(value, str):
        return (value,) if value else ()
    if isinstance(value, Mapping):
        return tuple(f"{name}: {what}" for name, what in value.items())
    if isinstance(value, Sequence):
        return tuple(str(item) for item in value)
    return ()


def _maps(holder: Mapping[str, Any], key: str) -> list[Mapping[str, Any]]:
    value = holder.get(key)
    if not isinstance(value, Sequence) or isinstance(value, str):
        return []
    return [entry for entry in value if isinstance(entry, Mapping)]
