"""ClusterProfile as versioned JSON. Every refusal names the field, as ``matmul[0].points[2]``."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from typing import Any, TypeVar

from galvatron_compile.cluster import SCHEMA_VERSION, ClusterProfile
from galvatron_compile.curves import CollectiveCurve, RateCurve
from galvatron_compile.errors import ProfileError
from galvatron_compile.facts import Device, Fact, Overlap

T = TypeVar("T")


def dumps(profile: ClusterProfile) -> str:
    """One line per curve, so that two profiles can be compared with a text diff."""
    fields = {"schema": SCHEMA_VERSION, **dataclasses.asdict(profile)}
    lines = []
    for name, value in fields.items():
        if isinstance(value, (list, tuple)) and value:
            rows = ",\n".join("    " + json.dumps(row) for row in value)
            lines.append(f'  "{name}": [\n{rows}\n  ]')
        else:
            lines.append(f'  "{name}": {json.dumps(value)}')
    return "{\n" + ",\n".join(lines) + "\n}"


def loads(text: str) -> ClusterProfile:
    """The inverse of :func:`dumps`; ProfileError for anything else."""
    try:
        raw = json.loads(text)
    except json.JSONDecodeError as error:
        raise ProfileError(f"not JSON: {error}") from error
    record = _Record(raw, "")
    version = record.integer("schema")
    if version != SCHEMA_VERSION:
        raise ProfileError(
            f"schema is {version}, this version reads {SCHEMA_VERSION}; measure again with "
            "galvatron-compile profile"
        )
    profile = ClusterProfile(
        name=record.text("name"),
        device=record.item("device", _device),
        num_nodes=record.integer("num_nodes"),
        ranks_per_node=record.integer("ranks_per_node"),
        matmul=record.items("matmul", _rate),
        attention=record.items("attention", _rate),
        memory=record.item("memory", _fact),
        launch_overhead_ms=record.item("launch_overhead_ms", _fact),
        collectives=record.items("collectives", _collective),
        overlap=record.item("overlap", _overlap),
        reserve_bytes=record.item("reserve_bytes", _fact),
        node_overlap=record.optional("node_overlap", _overlap),
    )
    record.close()
    return profile


class _Record:
    """A JSON object being read, which knows its place in the file and what was read of it."""

    def __init__(self, raw: Any, path: str) -> None:
        if not isinstance(raw, dict):
            raise ProfileError(f"{path or 'the file'} must be an object, got {_shown(raw)}")
        self.raw, self.path = raw, path
        self.seen: set[str] = set()

    def at(self, name: str) -> str:
        return f"{self.path}.{name}" if self.path else name

    def get(self, name: str) -> Any:
        self.seen.add(name)
        if name not in self.raw:
            raise ProfileError(f"{self.at(name)} is missing")
        return self.raw[name]

    def text(self, name: str) -> str:
        value = self.get(name)
        if not isinstance(value, str) or not value:
            raise ProfileError(f"{self.at(name)} must be a text, got {_shown(value)}")
        return value

    def source(self) -> str:
        source = self.text("source")
        if not source.startswith(("measured", "default")):
            raise ProfileError(
                f"{self.at('source')} must start with 'measured' or 'default', got {source!r}"
            )
        return source

    def number(self, name: str) -> float:
        return _number(self.get(name), self.at(name))

    def integer(self, name: str) -> int:
        value = self.get(name)
        if not isinstance(value, int) or isinstance(value, bool):
            raise ProfileError(f"{self.at(name)} must be a whole number, got {_shown(value)}")
        return value

    def item(self, name: str, build: Callable[[_Record], T]) -> T:
        return _built(self.get(name), self.at(name), build)

    def optional(self, name: str, build: Callable[[_Record], T]) -> T | None:
        """None where it is null, or missing as in files of older versions."""
        self.seen.add(name)
        return None if self.raw.get(name) is None else self.item(name, build)

    def items(self, name: str, build: Callable[[_Record], T]) -> tuple[T, ...]:
        rows = _list(self.get(name), self.at(name))
        return tuple(_built(raw, f"{self.at(name)}[{i}]", build) for i, raw in enumerate(rows))

    def points(self) -> tuple[tuple[float, float], ...]:
        where = self.at("points")
        pairs = []
        for i, pair in enumerate(_list(self.get("points"), where)):
            if len(_list(pair, f"{where}[{i}]")) != 2:
                raise ProfileError(f"{where}[{i}] must be [size, value], got {_shown(pair)}")
            pairs.append(tuple(_number(value, f"{where}[{i}]") for value in pair))
        return tuple((a, b) for a, b in pairs)

    def close(self) -> None:
        unknown = sorted(self.raw.keys() - self.seen)
        if unknown:
            raise ProfileError(f"{self.at(unknown[0])} is not a field of schema {SCHEMA_VERSION}")


def _built(raw: Any, path: str, build: Callable[[_Record], T]) -> T:
    record = _Record(raw, path)
    try:
        value = build(record)
    except ProfileError as error:
        message = str(error)  # what the noun itself refuses does not know where it was read
        raise error if message.startswith(path) else ProfileError(f"{path}: {message}") from error
    record.close()
    return value


def _device(record: _Record) -> Device:
    return Device(record.text("name"), record.text("kind"), record.integer("memory_bytes"))


def _fact(record: _Record) -> Fact:
    return Fact(record.number("value"), record.source())


def _rate(record: _Record) -> RateCurve:
    return RateCurve(record.text("dtype"), record.points(), record.source())


def _collective(record: _Record) -> CollectiveCurve:
    kind, tier, num_ranks = record.text("kind"), record.text("tier"), record.integer("num_ranks")
    return CollectiveCurve(kind, tier, num_ranks, record.points(), record.source())


def _overlap(record: _Record) -> Overlap:
    joint, compute = record.number("joint"), record.number("compute")
    return Overlap(joint, compute, record.number("communication"), record.source())


def _number(value: Any, where: str) -> float:
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise ProfileError(f"{where} must be a number, got {_shown(value)}")
    return value


def _list(value: Any, where: str) -> list[Any]:
    if not isinstance(value, list):
        raise ProfileError(f"{where} must be a list, got {_shown(value)}")
    return value


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else text[:37] + "..."
