"""What a run of bench/gpu.py found, saved after each row."""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Row:
    """One kernel.

    share: of the ceiling, whose name is in ``ceiling``: "copy", "cuBLAS" (the time of the very same
    product), "transfer + cuBLAS". per_s: bytes or flops a second. target: for the share. over: time
    of others over the kernel's, above 1 means that the kernel is faster. over_target: for
    over["eager"]. late: times that may be partly the host's, by whose they are.
    """

    name: str
    ms: float
    ceiling: str = ""
    share: float | None = None
    per_s: float | None = None
    target: float | None = None
    over: dict[str, float] = field(default_factory=dict)
    over_target: float | None = None
    eager_is: str = ""
    late: tuple[str, ...] = ()
    note: str = ""
    seed: int = 0

    def reached(self) -> bool | None:
        """Whether all its targets are; None: it has none, or nothing to hold against them."""
        found = []
        if self.target is not None and self.share is not None:
            found.append(self.share >= self.target)
        if self.over_target is not None and "eager" in self.over:
            found.append(self.over["eager"] >= self.over_target)
        return all(found) if found else None


@dataclass
class Report:
    """Grows while a bench runs.

    folder: of the file; None: nothing is saved. wrong: results. failed: what raised, or never came
    back. left_out: what was not done and why, by nobody's fault. rounds: of processes.
    """

    folder: Path | None = None
    machine: dict[str, Any] = field(default_factory=dict)
    ceilings: dict[str, float] = field(default_factory=dict)
    rows: dict[str, Row] = field(default_factory=dict)
    rounds: list[dict[str, Any]] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0

    def __post_init__(self) -> None:
        self.commit = _commit()

    def add_row(self, row: Row) -> None:
        """With its share of the copy ceiling, if that is what bounds it and it is known."""
        ceiling = self.ceilings.get("copy_bytes_per_s")
        if row.ceiling == "copy" and row.per_s is not None and ceiling:
            row = replace(row, share=row.per_s / ceiling)
        self.rows[row.name] = row
        self.save()

    def add_compiled(self, name: str, ms: float, late: bool) -> None:
        """What torch.compile takes, beside a row that is there."""
        row = self.rows[name]
        late_too = (*row.late, "compiled") if late else row.late
        self.rows[name] = replace(row, over={**row.over, "compiled": ms / row.ms}, late=late_too)
        self.save()

    def status(self) -> int:
        """Exit status: 1 if a result was wrong or anything failed. Targets do not count."""
        return 1 if self.wrong or self.failed else 0

    def document(self) -> dict[str, Any]:
        return {
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "commit": self.commit,
            "python": platform.python_version(),
            **self.machine,
            "seconds": round(self.seconds, 1),
            "ceilings": self.ceilings,
            "wrong": self.wrong,
            "failed": self.failed,
            "left_out": self.left_out,
            "rounds": self.rounds,
            "rows": [{**asdict(row), "reached": row.reached()} for row in self.rows.values()],
        }

    def save(self) -> None:
        """Whole or not at all: the file is replaced."""
        if self.folder is None:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        beside = self.folder / ".gpu.json.new"
        beside.write_text(json.dumps(self.document(), indent=1) + "\n")
        os.replace(beside, self.folder / self.file_name())

    def file_name(self) -> str:
        """Named after the GPU."""
        name = str(self.machine.get("gpu", "unknown"))
        return f"gpu_{re.sub('[^A-Za-z0-9]+', '_', name)}.json"


def _commit() -> str:
    command = ["git", "describe", "--always", "--dirty"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, cwd=HERE)
    except OSError:  # no git here
        return "unknown"
    return done.stdout.strip() or "unknown"


def show(report: Report, console: Any) -> None:
    """The table, and a line for all that is not in it."""
    console.print(table(list(report.rows.values()), title(report)))
    for row in report.rows.values():
        if row.eager_is:
            console.print(f"{row.name}: eager is {row.eager_is}", markup=False)
        for name, times in row.over.items():
            if name not in COLUMNS:
                console.print(f"{row.name}: {times:.2f} over {name}", markup=False)
        if row.late:
            console.print(f"{row.name}: launches count in {', '.join(row.late)}", markup=False)
        if row.note:
            console.print(f"{row.name}: {row.note}", markup=False)
    for done in report.rounds:
        text = f"{done['size']} processes: {done['passed']} of {done['wanted']} rounds right"
        console.print(f"{text}, seed {done['seed']}", markup=False)
    for what, why in report.left_out.items():
        console.print(f"left out: {what}: {why}", markup=False)
    for what, why in report.failed.items():
        console.print(f"failed: {what}: {why}", markup=False, style="red")
    for line in report.wrong:
        console.print(f"wrong: {line}", markup=False, style="red")


def title(report: Report) -> str:
    parts = [str(report.machine.get("gpu", "no GPU"))]
    if copied := report.ceilings.get("copy_bytes_per_s"):
        parts.append(f"copy at {copied / 1e12:.2f} TB/s")
    if multiplied := report.ceilings.get("matmul_flops_per_s"):
        parts.append(f"cuBLAS at {multiplied / 1e12:.0f} TFLOP/s")
    return ", ".join(parts)


COLUMNS = ("eager", "compiled", "Liger")


def table(rows: Sequence[Row], heading: str) -> Any:
    """A column for Liger only where it was installed."""
    from rich.table import Table

    columns = [c for c in COLUMNS if c != "Liger" or any("Liger" in row.over for row in rows)]
    result = Table(title=heading, title_justify="left")
    for name in ("kernel", "ms", "share", "of", "target", *(f"over {c}" for c in columns), "met"):
        left = name in ("kernel", "of", "met")
        result.add_column(name, justify="left" if left else "right")
    for row in rows:
        share = "" if row.share is None else f"{row.share:.1%}"
        targets = [] if row.target is None else [f"{row.target:.0%}"]
        if row.over_target is not None:
            targets.append(f"{row.over_target:.1f}x eager")
        over = [f"{row.over[c]:.2f}" if c in row.over else "" for c in columns]
        met = {None: "", True: "yes", False: "no"}[row.reached()]
        result.add_row(
            row.name, f"{row.ms:.3f}", share, row.ceiling, ", ".join(targets), *over, met
        )
    return result
