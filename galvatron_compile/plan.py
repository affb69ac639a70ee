"""The plan: the only thing that search and runtime share."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from galvatron_compile.errors import PlanError
from galvatron_compile.strategy import Strategy

PLAN_VERSION = 1


@dataclass(frozen=True)
class Stage:
    """A pipeline stage: layers ``first`` up to but not including ``last``."""

    first: int
    last: int


@dataclass(frozen=True)
class Plan:
    """Which strategy every layer runs with, in how many micro-batches.

    model: fingerprint of the layered graph the plan was made for ("" fits any with as many layers).
    layers: name of every layer, in order; strategies: its strategy.
    predicted: what the search expected, with units in the keys (``step_ms``, ``memory_bytes``).
    """

    model: str
    world_size: int
    global_batch_size: int
    num_micro_batches: int
    layers: tuple[str, ...]
    strategies: tuple[Strategy, ...]
    stages: tuple[Stage, ...] = ()
    schedule: str = "sequential"
    predicted: Mapping[str, float] = field(default_factory=dict, compare=False)
