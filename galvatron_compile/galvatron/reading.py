"""Files of a profile folder: found by pattern, read field by field, errors that name both."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from galvatron_compile.errors import ProfileError


@dataclass(frozen=True)
class Source:
    """A JSON file. words: what its pattern's groups matched in the name."""

    name: str
    words: tuple[str, ...]
    value: dict[str, Any]

    def get(self, *path: str) -> Any:
        found: Any = self.value
        for depth, key in enumerate(path):
            if not isinstance(found, dict) or key not in found:
                raise ProfileError(f"{self.name} lacks the field {'.'.join(path[: depth + 1])!r}")
            found = found[key]
        return found

    def table(self, *path: str) -> dict[str, Any]:
        found = self.get(*path)
        if not isinstance(found, dict):
            raise ProfileError(f"{self.name}: {'.'.join(path)} must be an object, got {found!r}")
        return found

    def number(self, *path: str) -> float:
        """A positive number."""
        found = self.get(*path)
        if isinstance(found, bool) or not isinstance(found, (int, float)):
            raise ProfileError(f"{self.name}: {'.'.join(path)} must be a number, got {found!r}")
        if not (math.isfinite(found) and found > 0):
            raise ProfileError(f"{self.name}: {'.'.join(path)} is {found}; it must be positive")
        return float(found)


def find(folder: Path, pattern: str, num_gpus: int | None = None) -> Source:
    """The one file of ``folder`` whose name matches; with ``num_gpus``, of that many GPUs.

    Raises ProfileError if there is none, if there are several, or if it holds no JSON object.
    """
    matches = [
        (path, match)
        for path in sorted(folder.iterdir())
        if (match := re.fullmatch(pattern, path.name))
    ]
    shown = re.sub(r"\\\.", ".", re.sub(r"\([^)]*\)", "…", pattern))
    if not matches:
        raise ProfileError(f"{folder} has no file {shown}; copy it from Galvatron's profiles")
    if num_gpus is not None:
        fitting = [m for m in matches if math.prod(map(int, m[1].groups())) == num_gpus]
        if not fitting:
            names = ", ".join(path.name for path, _ in matches)
            raise ProfileError(
                f"{folder} has no {shown} of {num_gpus} GPUs (it has {names}); plan for as many "
                "GPUs as were measured"
            )
        matches = fitting
    if len(matches) > 1:
        names = ", ".join(path.name for path, _ in matches)
        raise ProfileError(f"{folder} has several files {shown}: {names}; keep one of them")
    path, match = matches[0]
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ProfileError(f"cannot read {path}: {error}") from error
    if not isinstance(value, dict):
        raise ProfileError(f"{path.name} must hold a JSON object")
    return Source(path.name, tuple(match.groups()), value)


def line_through(points: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Slope and offset of the least-squares line through (size, time)."""
    mean_x = math.fsum(x for x, _ in points) / len(points)
    mean_y = math.fsum(y for _, y in points) / len(points)
    spread = math.fsum((x - mean_x) ** 2 for x, _ in points)
    slope = math.fsum((x - mean_x) * (y - mean_y) for x, y in points) / spread
    return slope, mean_y - slope * mean_x
