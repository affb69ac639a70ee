"""Recordings as JSON: versioned, units in the keys, one line of numbers an action."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any, get_args

from galvatron_compile.actions import Kind
from galvatron_compile.errors import PlanError
from galvatron_compile.fields import Fields
from galvatron_compile.recorded import OPTIMIZER, Event, Recording
from galvatron_compile.recordings import Recordings

VERSION = 1
WHAT = "galvatron-compile recording"
KINDS = frozenset((*get_args(Kind), OPTIMIZER))
COLUMNS = [field.name for field in dataclasses.fields(Event)]
_TEXTS = ("plan", "model", "hardware", "torch", "recorded_at")


def to_json(recordings: Recordings) -> str:
    document = {
        "what": WHAT,
        "version": VERSION,
        **{name: getattr(recordings, name) for name in _TEXTS},
        "pp": recordings.pp,
        "global_batch_size": recordings.global_batch_size,
        "has_one_clock": recordings.has_one_clock,
        "warm_up": recordings.warm_up,
        "all_step_ms": list(recordings.all_step_ms),
        "columns": COLUMNS,
    }
    head = json.dumps(document, indent=1, allow_nan=False, ensure_ascii=False)
    ranks = ",\n".join(_rank(recording) for recording in recordings.ranks)
    return head.removesuffix("\n}") + f',\n "ranks": [\n{ranks}\n ]\n}}\n'


def _rank(recording: Recording) -> str:
    head = {
        "rank": recording.rank,
        "units": recording.units,
        "start_ms": recording.start_ms,
        "end_ms": recording.end_ms,
        "start_bytes": recording.start_bytes,
    }
    rows = ",\n   ".join(
        json.dumps(dataclasses.astuple(event), allow_nan=False) for event in recording.events
    )
    return f'  {json.dumps(head, allow_nan=False)[:-1]}, "events": [\n   {rows}]}}'


def load(path: str | Path) -> Recordings:
    """The inverse of :func:`to_json`. PlanError names the file, and the position or the field."""
    try:
        return from_json(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise PlanError(
            f"there is no recording at {path}; make one with ParallelModel.profile and save it"
        ) from error
    except (OSError, UnicodeDecodeError) as error:
        raise PlanError(f"cannot read the recording at {path}: {error}") from error
    except PlanError as error:
        raise PlanError(f"{path}: {error}") from error


def from_json(text: str) -> Recordings:
    try:
        document = json.loads(text)
    except json.JSONDecodeError as error:
        raise PlanError(
            f"recording is not valid JSON: {error.msg} at line {error.lineno} column "
            f"{error.colno}; save it again"
        ) from error
    top = Fields(document, "recording")
    if top.take("what", str, "") != WHAT:
        raise PlanError(f'this is not a recording: it lacks "what": "{WHAT}"')
    version = top.take("version", int)
    if version != VERSION:
        raise PlanError(
            f"recording has schema version {version}, this version reads {VERSION}; record the "
            "step again"
        )
    columns = top.take("columns", list)
    if columns != COLUMNS:
        raise PlanError(f"recording.columns must be {COLUMNS}, got {columns}")
    ranks = [Fields(entry, f"ranks[{i}]") for i, entry in enumerate(top.take("ranks", list))]
    recordings = Recordings(
        ranks=tuple(_read_rank(fields) for fields in ranks),
        **{name: top.take(name, str) for name in _TEXTS},
        pp=top.take("pp", int),
        global_batch_size=top.take("global_batch_size", int),
        has_one_clock=top.take("has_one_clock", bool),
        warm_up=top.take("warm_up", int),
        all_step_ms=tuple(_number(x, "all_step_ms") for x in top.take("all_step_ms", list)),
    )
    top.finish()
    return recordings


def _read_rank(fields: Fields) -> Recording:
    where = fields.where
    start_bytes = fields.value.get("start_bytes")
    if start_bytes is not None:
        start_bytes = fields.take("start_bytes", int)
    fields.known.append("start_bytes")
    units = fields.take("units", list)
    if not all(isinstance(name, str) for name in units):
        raise PlanError(f"{where}.units must be names of units")
    events = fields.take("events", list)
    for name in ("start_ms", "end_ms"):
        fields.known.append(name)
    recording = Recording(
        rank=fields.take("rank", int),
        units=tuple(units),
        events=tuple(_event(x, f"{where}.events[{i}]", units) for i, x in enumerate(events)),
        start_ms=_number(fields.value.get("start_ms"), f"{where}.start_ms"),
        end_ms=_number(fields.value.get("end_ms"), f"{where}.end_ms"),
        start_bytes=start_bytes,
    )
    fields.finish()
    return recording


def _event(row: Any, where: str, units: list[str]) -> Event:
    if not isinstance(row, list) or len(row) != len(COLUMNS):
        raise PlanError(f"{where} must be a list of {', '.join(COLUMNS)}")
    kind, index, batch, start_ms, end_ms, *sizes = row
    if kind not in KINDS:
        raise PlanError(f"{where}: {kind!r:.40} is no action")
    if any(type(number) is not int for number in (index, batch, *sizes)):
        raise PlanError(f"{where}: {', '.join(COLUMNS[1:3])} and bytes must be integers")
    times = (_number(start_ms, f"{where}: start_ms"), _number(end_ms, f"{where}: end_ms"))
    event = Event(kind, index, batch, *times, *sizes)
    if event.is_of_unit and not 0 <= index < len(units):
        raise PlanError(f"{where}: there is no unit {index}")
    return event


def _number(value: Any, where: str) -> float:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not math.isfinite(value):
        raise PlanError(f"{where} must be a finite number, got {value!r:.40}")
    return value
