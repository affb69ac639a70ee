"""Predicted against measured: plans that run for real on emulated clusters, and the plan chosen.

``python bench/emulated_cluster.py``; root (network namespaces). On 2 nodes of 1 rank and of 2 ranks
(:mod:`galvatron_compile.emulation`), at two link speeds each, it profiles the cluster, lets
``gc.compile`` search, and trains under every plan of bench/emulated/plans.py. A step is
``parallel.step``, AdamW and ``zero_grad``; its time is that of the slowest rank, the median over
repetitions in which all plans take turns of some steps. Take numbers on a quiet machine only.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from emulated.plans import BATCH_SIZE, BLOCKS, LENGTH, TOPOLOGIES, VOCABULARY, Topology
from emulated.summary import describe, row, summarise, table
from rich.console import Console

from galvatron_compile.emulation import EmulatedCluster, emulated_cluster, why_not

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"
RUN_S = 1200.0
# glibc gives freed memory back to the kernel, and every step pays for it anew, page by page; more
# in a step, which frees much at once, than where layers are timed. Device allocators keep it.
KEEP_MEMORY = {"MALLOC_TRIM_THRESHOLD_": str(1 << 36), "MALLOC_MMAP_THRESHOLD_": str(1 << 36)}


def measure(
    key: str, topology: Topology, folder: Path, options: argparse.Namespace
) -> list[dict[str, Any]]:
    """One start of the ranks: all plans at every link speed. PeerError if a rank fails."""
    out = folder / "links.json"
    rates = [f"{rate:g}" for rate in topology.rates_bits_per_s]
    settings = EmulatedCluster(
        2,
        topology.ranks_per_node,
        topology.rates_bits_per_s[0],
        cpus_per_rank=part_of_a_core(topology.ranks_per_node),
    )
    arguments = [str(HERE / "emulated" / "worker.py"), "--topology", key, "--rates", *rates]
    given = ("out", out), ("warm-up", options.warm_up), ("repetitions", options.repetitions)
    arguments += [text for name, value in given for text in (f"--{name}", str(value))]
    with emulated_cluster(settings) as cluster:
        cluster.run(
            arguments,
            timeout_s=RUN_S,
            environment={**KEEP_MEMORY, "GALVATRON_CACHE": str(folder)},
            on_line=show if options.verbose else None,
        )
    found: list[dict[str, Any]] = json.loads(out.read_text())
    return found


def part_of_a_core(ranks_per_node: int) -> float | None:
    """Every rank's own, where a node has fewer cores than ranks: a stage that waits must not speed
    up another, as no GPU does. None: a whole one each."""
    cores_of_node = len(os.sched_getaffinity(0)) // 2
    return cores_of_node / ranks_per_node if 0 < cores_of_node < ranks_per_node else None


def show(rank: int, stream: str, line: str) -> None:
    if stream == "stdout":
        print(f"  {line}", flush=True)


def judge(console: Console, topology: Topology, found: dict[str, Any]) -> dict[str, Any]:
    """Print what was found at one link speed, and give it as it is saved."""
    rows = [row(result, found) for result in found["results"]]
    losses = {result["name"]: result["losses"] for result in found["results"]}
    summary = summarise(rows, topology.pure, losses)
    rate = found["rate_bits_per_s"]
    console.print(table(f"{topology.name}, links of {rate / 1e9:g} Gbit/s", rows))
    console.print(describe(summary), highlight=False)
    console.print()
    return {"summary": asdict(summary), "rows": [asdict(found) for found in rows], **found}


def save(key: str, runs: list[dict[str, Any]], options: argparse.Namespace) -> Path:
    command = ["git", "describe", "--always", "--dirty"]
    commit = subprocess.run(command, capture_output=True, text=True, cwd=HERE)
    document = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit.stdout.strip() or "unknown",
        "machine": {"system": platform.platform(), "cpus": os.cpu_count()},
        "load": os.getloadavg(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "options": vars(options),
        "topology": asdict(TOPOLOGIES[key]),
        "cpus_per_rank": part_of_a_core(TOPOLOGIES[key].ranks_per_node),
        "model": {
            "kind": "Llama", "blocks": BLOCKS, "vocabulary": VOCABULARY, "length": LENGTH,
            "batch_size": BATCH_SIZE, "dtype": "float32",
        },
        "links": runs,
    }  # fmt: skip
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"emulated_{key}_{platform.node()}.json"
    path.write_text(json.dumps(document, indent=1) + "\n")
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--topologies", nargs="+", default=list(TOPOLOGIES), choices=TOPOLOGIES)
    parser.add_argument("--warm-up", type=int, default=1, help="turns that do not count")
    parser.add_argument("--repetitions", type=int, default=4, help="turns that do")
    parser.add_argument("--verbose", action="store_true", help="print what rank 0 prints")
    options = parser.parse_args()
    reason = why_not()
    if reason is not None:
        sys.exit(f"bench/emulated_cluster.py cannot emulate a cluster here: {reason}")
    console, start = Console(width=120), time.monotonic()
    for key in options.topologies:
        topology = TOPOLOGIES[key]
        with tempfile.TemporaryDirectory() as folder:
            links = measure(key, topology, Path(folder), options)
        runs = [judge(console, topology, found) for found in links]
        console.print(f"wrote {save(key, runs, options)}")
    console.print(f"took {time.monotonic() - start:.0f} s")


if __name__ == "__main__":
    main()
