"""Tables of measured runs: CSV, one run a line, every mistake named with its place."""

from __future__ import annotations

import csv
import difflib
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn

from galvatron_compile.errors import PlanError
from galvatron_compile.validation.run import Run

GIB = 1024**3


def _whole(text: str) -> int:
    value = int(text)
    if value < 0:
        raise ValueError(text)
    return value


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise ValueError(text)
    return value


def _positive(text: str) -> float:
    value = float(text)
    if not (math.isfinite(value) and value > 0):
        raise ValueError(text)
    return value


def _yes_or_no(text: str) -> bool:
    return {"yes": True, "no": False, "true": True, "false": False, "1": True, "0": False}[
        text.lower()
    ]


Reader = tuple[Callable[[str], Any], str]
_TEXT: Reader = (str, "text")
_COUNT: Reader = (_count, "a whole number from 1 on")
_POSITIVE: Reader = (_positive, "a number above 0")

COLUMNS: Mapping[str, Reader] = {
    "source": _TEXT,
    "model": _TEXT,
    "gpu": _TEXT,
    **dict.fromkeys(
        ["num_gpus", "gpus_per_node", "hidden", "layers", "heads", "kv_heads", "ffn", "vocab",
         "seq", "global_batch", "micro_batch", "tp", "pp", "dp", "cp"],
        _COUNT,
    ),
    "zero": (_whole, "a ZeRO stage from 0 to 3"),
    "recompute": _TEXT,
    "dtype": _TEXT,
    "step_ms": _POSITIVE,
    "peak_memory_gib": _POSITIVE,
    "notes": _TEXT,
}  # fmt: skip
"""Every table has these columns."""

OPTIONAL_COLUMNS: Mapping[str, Reader] = {
    "sequence_parallel": (_yes_or_no, "yes or no"),
    "schedule": _TEXT,
    "virtual": _COUNT,
}
"""A table may have these; without them, or where they are blank, what was usual is meant."""

MAY_BE_BLANK = {"micro_batch", "peak_memory_gib", "notes", *OPTIONAL_COLUMNS}


def read_table(path: Path) -> tuple[Run, ...]:
    """The runs of a CSV file. PlanError names the row and the column at fault, and the remedy."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise PlanError(f"cannot read {path}: {error}; give a CSV file in UTF-8") from error
    reader = csv.DictReader(text.splitlines(), strict=True)
    _check_header(path, list(reader.fieldnames or []))
    runs = []
    try:
        for values in reader:
            runs.append(_run(path, reader.line_num, values))
    except csv.Error as error:
        raise PlanError(f"{path}, row {reader.line_num}: {error}; quote such a value") from error
    if not runs:
        raise PlanError(f"{path} has a header but no runs; add one line per measured run")
    return tuple(runs)


def _check_header(path: Path, names: list[str]) -> None:
    known = {**COLUMNS, **OPTIONAL_COLUMNS}
    if not names:
        raise PlanError(f"{path} is empty; its first line names the columns {', '.join(COLUMNS)}")
    twice = [name for name in dict.fromkeys(names) if names.count(name) > 1]
    if twice:
        raise PlanError(f"{path} has the column {twice[0]} twice; remove one")
    missing = [name for name in COLUMNS if name not in names]
    unknown = [name for name in names if name not in known]
    if missing:
        hints = [difflib.get_close_matches(name, unknown, 1, cutoff=0.7) for name in missing]
        renamed = "".join(
            f"; rename {near[0]!r} to {name!r}"
            for name, near in zip(missing, hints, strict=True)
            if near
        )
        raise PlanError(
            f"{path} lacks the column{'s' if len(missing) > 1 else ''} {', '.join(missing)}"
            f"{renamed}; a blank value means not reported, but every column must be there"
        )
    if unknown:
        near = difflib.get_close_matches(unknown[0], known, 1)
        hint = f"; did you mean {near[0]!r}?" if near else f"; known: {', '.join(known)}"
        raise PlanError(f"{path} has an unknown column {unknown[0]!r}{hint}")


def _run(path: Path, row: int, values: Mapping[str | None, Any]) -> Run:
    if None in values or None in values.values():
        expected = len(values) - (None in values)
        raise PlanError(
            f"{path}, row {row}: the number of values is not the header's {expected}; put commas "
            "for blank values, quote a value that has a comma"
        )
    fields: dict[str, Any] = {}
    for name, text in values.items():
        assert name is not None
        value = text.strip()
        reader, meaning = (COLUMNS.get(name) or OPTIONAL_COLUMNS[name])
        if value:
            try:
                fields[name] = reader(value)
            except (ValueError, KeyError):
                _refuse(path, row, name, f"must be {meaning}, got {value!r}")
        elif name not in MAY_BE_BLANK:
            _refuse(path, row, name, f"must be {meaning}, it is blank")
    gib = fields.pop("peak_memory_gib", None)
    fields["memory_bytes"] = None if gib is None else gib * GIB
    fields.setdefault("micro_batch", None)
    try:
        return Run(row=row, **fields)
    except PlanError as error:
        raise PlanError(f"{path}, {error}") from error


def _refuse(path: Path, row: int, name: str, message: str) -> NoReturn:
    raise PlanError(f"{path}, row {row}: {name} {message}")
