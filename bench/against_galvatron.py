"""Our plan beside Galvatron's: same profile, same formulas, same memory limit; and CPU-seconds.

    python bench/against_galvatron.py [--repeat 5]

Profile and plan are those that Galvatron ships for Llama2-7B on 8 GPUs (sequence 2048, global batch
16, 36 GB), read from ``../shared/data``, or from ``$GALVATRON_SHARED/data``. CPU-seconds are user
and system time of the whole process, imports included, by ``getrusage`` of the child; Galvatron's
are as measured for this project on a machine with 2 cores (``../shared/FACTS.md``), not here.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from galvatron_compile.galvatron.report import plan_from_galvatron
from galvatron_compile.text import columns

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results"
GALVATRON_CPU_S = 207.0
MIB, GIB = 2**20, 2**30
GPUS, SEQ, GLOBAL_BATCH, MEMORY_GIB = 8, 2048, 16, 36


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeat", type=int, default=5, help="runs of the command to time")
    repeat = parser.parse_args().repeat
    shared = Path(os.environ.get("GALVATRON_SHARED", ROOT.parent / "shared"))
    folder = shared / "data" / "galvatron_llama2_7b_8gpu"
    if not folder.is_dir():
        print(f"skipped: no profile at {folder}; set GALVATRON_SHARED to the folder with data/")
        return
    runs = [timed(folder) for _ in range(repeat)]
    report = runs[0][1]
    seconds = [cpu_s for cpu_s, _ in runs]
    exact = plan_from_galvatron(folder, GPUS, SEQ, GLOBAL_BATCH, MEMORY_GIB * GIB, exact_bytes=True)
    rows = [
        row("ours", report),
        *(row(record["name"], record) for record in all_alternatives(folder)),
        row("ours, memory not rounded to MiB", exact),
    ]
    show(rows, seconds, report)
    path = RESULTS / f"against_galvatron_{platform.node()}.json"
    path.write_text(json.dumps(record_of(rows, seconds, report), indent=1) + "\n")
    print(f"\nwritten to {path.relative_to(ROOT)}")


def timed(folder: Path) -> tuple[float, dict[str, Any]]:
    """CPU-seconds of one run of the command, and what it printed."""
    options = {
        "--from-galvatron": folder,
        "--gpus": GPUS,
        "--seq": SEQ,
        "--global-batch": GLOBAL_BATCH,
        "--memory": f"{MEMORY_GIB}GiB",
    }
    words = [str(word) for pair in options.items() for word in pair]
    command = [sys.executable, "-m", "galvatron_compile.cli", "plan", *words, "--json"]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    printed = subprocess.run(command, check=True, capture_output=True, cwd=ROOT).stdout
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return cpu_s, json.loads(printed)


def all_alternatives(folder: Path) -> list[dict[str, Any]]:
    """Of every family, which the command shortens."""
    report = plan_from_galvatron(folder, GPUS, SEQ, GLOBAL_BATCH, MEMORY_GIB * GIB)
    return [record for record in report["alternatives"] if record["step_ms"] is not None]


def row(name: str, report: dict[str, Any]) -> dict[str, Any]:
    return {
        "plan": name,
        "step_ms": report["step_ms"],
        "peak_memory_bytes": max(report["peak_memory_bytes"]),
        "notation": report["notation"],
    }


def show(rows: list[dict[str, Any]], seconds: list[float], report: dict[str, Any]) -> None:
    theirs = next(r["step_ms"] for r in rows if r["plan"] == "Galvatron's plan")
    table = [
        [
            r["plan"],
            f"{r['step_ms']:.3f}",
            f"{100 * (r['step_ms'] / theirs - 1):+.3f}",
            f"{r['peak_memory_bytes'] / MIB:.0f}",
        ]
        for r in rows
    ]
    print(f"Llama2-7B, {GPUS} GPUs, sequence {SEQ}, global batch {GLOBAL_BATCH}, Galvatron's")
    print(f"formulas; limit {report['memory_limit_bytes'] / MIB:.0f} MiB of {MEMORY_GIB} GiB\n")
    print(columns(["plan", "step ms", "% of Galvatron's", "MiB"], table))
    for r in rows[:3]:
        print(f"  {r['plan']}: {r['notation']}")
    middle = statistics.median(seconds)
    print(f"\nCPU-seconds, whole process: ours {middle:.2f} (median of {len(seconds)},", end=" ")
    print(f"{min(seconds):.2f} to {max(seconds):.2f}), Galvatron's {GALVATRON_CPU_S:.0f}")
    print(f"(on another machine): {GALVATRON_CPU_S / middle:.0f} times less")


def record_of(
    rows: list[dict[str, Any]], seconds: list[float], report: dict[str, Any]
) -> dict[str, Any]:
    command = ["git", "describe", "--always", "--dirty"]
    commit = subprocess.run(command, capture_output=True, text=True, cwd=ROOT).stdout.strip()
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit or "unknown",
        "machine": {"system": platform.platform(), "cpus": os.cpu_count()},
        "versions": {"python": platform.python_version()},
        "cpu_s": seconds,
        "cpu_s_median": statistics.median(seconds),
        "galvatron_cpu_s": GALVATRON_CPU_S,
        "search_s": report["search_s"],
        "memory_limit_bytes": report["memory_limit_bytes"],
        "plans": rows,
    }


if __name__ == "__main__":
    main()
