"""What a cluster profile is made of, beside curves."""

from __future__ import annotations

import math
from dataclasses import dataclass

from galvatron_compile.errors import ProfileError


@dataclass(frozen=True)
class Fact:
    """One number and where it is from: "measured on …" or "default: …".

    value: in the unit that the field of the profile says.
    """

    value: float
    source: str


@dataclass(frozen=True)
class Device:
    """What one rank computes on. ``kind`` is "cuda" or "cpu"; memory is what one rank may use."""

    name: str
    kind: str
    memory_bytes: int


@dataclass(frozen=True)
class Overlap:
    """What running computation and communication at the same time costs, each factor at least 1.

    joint: o in  time = max(c, x) + (o - 1) * min(c, x)  for computation c and communication x that
        start together; 1 is perfect overlap, 2 is one after the other.
    compute: how many times longer computation takes while communication runs all along.
    communication: how many times longer communication takes while computation runs all along.

    Raises ProfileError if a factor is not finite or below 1.
    """

    joint: float
    compute: float
    communication: float
    source: str

    def __post_init__(self) -> None:
        for name in ("joint", "compute", "communication"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) >= 1):
                raise ProfileError(f"overlap.{name} is {getattr(self, name)}; must be at least 1")
