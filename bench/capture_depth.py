"""How the time to understand a model grows with its depth: every layer exported against once.

``python bench/capture_depth.py``: a transformers Llama of Llama-3-70B's shape (8192 wide, sequence
8192, bf16, on the meta device) with 2, 8, 32 and 80 layers. One thread; both ways take turns in one
process, so that a busy machine slows both alike. Seconds are CPU seconds of this process from the
model to its layers and classes (capture, batch and layers passes); a ratio below 1.00 means that
capturing once is faster. Both ways must give the same classes, or the program stops.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from galvatron_compile.graph import LayeredGraph
from galvatron_compile.passes.batch import batch
from galvatron_compile.passes.capture import capture
from galvatron_compile.passes.capture_once import capture_once
from galvatron_compile.passes.layers import find_layers
from galvatron_compile.printer import fingerprint

RESULTS = Path(__file__).resolve().parent / "results"


@dataclass(frozen=True)
class Row:
    """One depth, medians over repetitions. ratio: understanding once / every layer.

    ``capture`` is the first of the three passes, ``understand`` all three.
    """

    layers: int
    capture_full_s: float
    capture_once_s: float
    understand_full_s: float
    understand_once_s: float
    ratio: float
    same: bool


def build(layers: int, options: argparse.Namespace) -> tuple[nn.Module, dict[str, Any]]:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=8192,
        intermediate_size=28672,
        num_attention_heads=64,
        num_key_value_heads=8,
        vocab_size=128256,
        num_hidden_layers=layers,
        max_position_embeddings=options.length,
    )
    with torch.device("meta"):
        model: nn.Module = LlamaForCausalLM(config).to(torch.bfloat16)
    ids = torch.zeros(2, options.length, dtype=torch.int64, device="meta")
    return model, {"input_ids": ids, "labels": ids, "use_cache": False}


def timed(capturing: Callable[..., Any], layers: int, options: Any) -> tuple[Any, float, float]:
    """The layers, CPU seconds of the capture, and of all three passes."""
    model, example = build(layers, options)
    start = time.process_time()
    graph = capturing(model, example)
    captured = time.process_time()
    layered = find_layers(batch(graph))
    return layered, captured - start, time.process_time() - start


def contend(layers: int, options: argparse.Namespace) -> Row:
    seconds: dict[Any, list[tuple[float, float]]] = {capture: [], capture_once: []}
    for repetition in range(options.repetitions):
        found: dict[Any, LayeredGraph] = {}
        order = [capture, capture_once][:: 1 if repetition % 2 else -1]
        for capturing in order:
            found[capturing], *spent = timed(capturing, layers, options)
            seconds[capturing].append((spent[0], spent[1]))
        same = _classes(found[capture]) == _classes(found[capture_once])
        if not same:
            raise SystemExit(f"{layers} layers: the classes differ; capturing once is wrong")
    full, once = (
        [statistics.median(column) for column in zip(*seconds[way], strict=True)]
        for way in (capture, capture_once)
    )
    return Row(layers, full[0], once[0], full[1], once[1], once[1] / full[1], same)


def _classes(layered: LayeredGraph) -> tuple[Any, ...]:
    layers = [(layer.name, layer.class_index, layer.parameters) for layer in layered.layers]
    return fingerprint(layered), layers


def table(rows: list[Row]) -> Table:
    result = Table(title="Llama-3-70B shape, CPU seconds on one thread", title_justify="left")
    for heading in (
        "layers", "capture, every layer", "capture, once", "to layers, every layer",
        "to layers, once", "once / every",
    ):  # fmt: skip
        result.add_column(heading, justify="right")
    for row in rows:
        result.add_row(
            str(row.layers),
            f"{row.capture_full_s:.2f}",
            f"{row.capture_once_s:.2f}",
            f"{row.understand_full_s:.2f}",
            f"{row.understand_once_s:.2f}",
            f"{row.ratio:.2f}",
        )
    return result


def save(rows: list[Row], imports_s: float, options: argparse.Namespace) -> Path:
    command = ["git", "describe", "--always", "--dirty"]
    commit = subprocess.run(command, capture_output=True, text=True, cwd=RESULTS.parent)
    document = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit.stdout.strip() or "unknown",
        "machine": {"system": platform.platform(), "cpus": os.cpu_count()},
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "options": vars(options),
        "imports_s": imports_s,
        "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "rows": [asdict(row) for row in rows],
    }
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"capture_depth_{platform.node()}.json"
    path.write_text(json.dumps(document, indent=1) + "\n")
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, nargs="+", default=[2, 8, 32, 80])
    parser.add_argument("--length", type=int, default=8192)
    parser.add_argument("--repetitions", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    timed(capture, 2, options)  # imports, and what the exporter does the first time
    imports_s = time.process_time()
    rows = [contend(layers, options) for layers in options.layers]
    console = Console(width=110)
    console.print(table(rows))
    console.print(f"before that: {imports_s:.1f} s for imports and a first capture of 2 layers")
    console.print(f"wrote {save(rows, imports_s, options)}")


if __name__ == "__main__":
    main()
