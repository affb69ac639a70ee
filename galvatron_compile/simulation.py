"""What a simulated step is: spans, where a group's time goes, and what its ranks hold."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from galvatron_compile.quantities import duration, percent, size
from galvatron_compile.simulated_memory import MemoryCurve
from galvatron_compile.text import columns, ms
from galvatron_compile.timeline import NAMES, Span, Timeline

INNER = {
    "tensor_ms": "tensor-parallel communication",
    "context_ms": "context-parallel communication",
    "expert_ms": "expert-parallel communication",
    "resharding_ms": "resharding between layers",
}


@dataclass(frozen=True)
class GroupSimulation:
    """One rank of a pipeline group. Times are of the whole step and add up to it.

    computed_ms: computation as if alone; slowed_ms: by how much communication beside it lengthens
        the layers. inner: the layers' own collectives, by the keys of INNER. exposed: waiting for
        collectives and for messages that are on their way, by the kind of their action.
    bubble_ms: waiting for another group to have something to send, or to end.
    """

    spans: tuple[Span, ...]
    computed_ms: float
    slowed_ms: float
    optimizer_ms: float
    inner: Mapping[str, float]
    exposed: Mapping[str, float]
    bubble_ms: float
    memory: MemoryCurve

    @property
    def exposed_ms(self) -> float:
        return sum(self.inner.values()) + sum(self.exposed.values())

    def causes(self) -> dict[str, float]:
        """Name -> ms, which add up to the step."""
        return {
            "computation": self.computed_ms,
            "slowed by communication": self.slowed_ms,
            **{INNER[key]: value for key, value in self.inner.items()},
            **{NAMES[kind]: value for kind, value in self.exposed.items()},
            "optimizer": self.optimizer_ms,
            "waiting for other stages": self.bubble_ms,
        }


@dataclass(frozen=True)
class Simulation:
    """One step of every pipeline group."""

    groups: tuple[GroupSimulation, ...]
    step_ms: float

    @cached_property
    def timeline(self) -> Timeline:
        return Timeline(
            tuple(group.spans for group in self.groups),
            tuple(group.memory.steps for group in self.groups),
        )

    @property
    def bubble_share(self) -> float:
        """Of all groups' time, what they wait for each other."""
        whole = self.step_ms * len(self.groups)
        return sum(group.bubble_ms for group in self.groups) / whole if whole else 0.0

    @property
    def peak_bytes(self) -> int:
        return max(group.memory.peak_bytes for group in self.groups)

    def summary(self) -> dict[str, Any]:
        """JSON-able, units in the keys; ``groups`` has one mapping per group."""
        return {
            "step_ms": self.step_ms,
            "bubble_share": self.bubble_share,
            "groups": [
                {
                    "compute_ms": group.computed_ms,
                    "slowed_ms": group.slowed_ms,
                    "optimizer_ms": group.optimizer_ms,
                    "bubble_ms": group.bubble_ms,
                    "inner_ms": {key: value for key, value in group.inner.items() if value},
                    "exposed_ms": {key: value for key, value in group.exposed.items() if value},
                    "peak_bytes": group.memory.peak_bytes,
                    "peak_at_ms": group.memory.peak_at_ms,
                    "peak_parts_bytes": group.memory.parts,
                }
                for group in self.groups
            ],
        }

    def __str__(self) -> str:
        rows = [
            [
                str(number),
                *map(ms, (group.computed_ms, group.slowed_ms, group.exposed_ms)),
                *map(ms, (group.optimizer_ms, group.bubble_ms)),
                size(group.memory.peak_bytes),
                duration(group.memory.peak_at_ms),
                max(group.memory.parts, key=lambda name: group.memory.parts[name], default="-"),
            ]
            for number, group in enumerate(self.groups)
        ]
        header = ["group", "compute ms", "slowed ms", "exposed ms", "optimizer ms", "bubble ms"]
        header += ["peak", "at", "most of it"]
        exposed: dict[str, float] = {}
        for group in self.groups:
            for name, value in group.causes().items():
                exposed[name] = max(exposed.get(name, 0.0), value)
        skipped = ("computation", "optimizer", "waiting for other stages")
        lines = [
            f"  {name}: at most {duration(value)} of a group"
            for name, value in exposed.items()
            if value > 0 and name not in skipped
        ]
        return "\n".join(
            [
                f"simulated step: {duration(self.step_ms)}, bubble {percent(self.bubble_share)}",
                columns(header, rows),
                *(["communication that lengthens the step", *lines] if lines else []),
            ]
        )
