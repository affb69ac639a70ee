"""Step time of our program over the same strategy written by hand, side by side in one launch.

``make bench``, or: python -m torch.distributed.run --nproc-per-node 2 bench/step_time.py
Both sides live in the same processes and take turns (hand, ours, ours, hand, …), so drift of the
machine hits both. A step is forward, backward and synchronisation; AdamW is timed too and its ratio
given apart, since DTensor's overhead there is not what we compare with. The time of a step is that
of the slowest rank; ratios are between medians, beside the middle half of the pairs' ratios. Then
one more step of each side is run with every tensor counted (galvatron_compile.memory_meter): the
most that a rank's tensors take, parameters, gradients and optimizer state included. What is not a
tensor of Python is not seen on either side: gloo's copies, and the buckets of DDP.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from gc import collect, get_objects
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent))
from by_hand import BY_HAND, adamw

import galvatron_compile as gc
from galvatron_compile.memory_meter import metering
from galvatron_compile.profiling import measure

RESULTS = Path(__file__).resolve().parent / "results"


@dataclass(frozen=True)
class Row:
    """One strategy. ratio: ours / by hand, below 1.00 means that ours is faster.

    ratio_with_optimizer: the same for the step and AdamW together. memory_ratio: of the peaks of
    one step. loss_difference: the largest relative difference of the two losses, which tells that
    both sides train the same.
    """

    plan: str
    by_hand: str
    by_hand_ms: float
    ours_ms: float
    ratio: float
    ratio_low: float
    ratio_high: float
    ratio_with_optimizer: float
    by_hand_peak_bytes: int
    ours_peak_bytes: int
    memory_ratio: float
    loss_difference: float


def build(options: argparse.Namespace) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1024,
        hidden_size=options.width,
        intermediate_size=options.width * 8 // 3,
        num_hidden_layers=options.layers,
        num_attention_heads=8,
        num_key_value_heads=4,
        use_cache=False,
    )
    model: nn.Module = LlamaForCausalLM(config)
    return model


def living() -> list[torch.Tensor]:
    """Every tensor of this process that has memory of its own; a DTensor is not, its shard is."""
    collect()
    found = [x for x in get_objects() if type(x) in (torch.Tensor, nn.Parameter)]
    return [x for x in found if x.layout is torch.strided and x.device.type == "cpu"]


class Side:
    """One contender: something with ``local_batch``, ``step`` and ``parameters``, and AdamW.

    held: the tensors that it has between steps. Those that were there before it was made and took
    its first step are not its own.
    """

    def __init__(self, make: Callable[[], Any], batch: dict[str, torch.Tensor]) -> None:
        before = living()  # kept, so that no other storage takes the place of one of them
        others = {id(x.untyped_storage()) for x in before}
        self.program = make()
        self.optimizer = adamw(self.program.parameters())
        self.step_ms: list[float] = []
        self.total_ms: list[float] = []
        self.loss = float("nan")
        self.step(batch)
        self.held = [x for x in living() if id(x.untyped_storage()) not in others]

    def step(self, batch: dict[str, torch.Tensor]) -> None:
        local = self.program.local_batch(batch)
        dist.barrier()
        start = time.perf_counter()
        loss = self.program.step(local)
        stepped = time.perf_counter()
        self.optimizer.step()
        self.optimizer.zero_grad()
        elapsed_ms = torch.tensor([stepped - start, time.perf_counter() - start]) * 1e3
        self.loss = float(loss)
        dist.all_reduce(elapsed_ms, dist.ReduceOp.MAX)
        self.step_ms.append(float(elapsed_ms[0]))
        self.total_ms.append(float(elapsed_ms[1]))


    def peak_bytes(self, batch: dict[str, torch.Tensor]) -> int:
        """Of a step and AdamW, on the rank that needs most."""
        local = self.program.local_batch(batch)
        with metering(torch.device("cpu"), [*self.held, *local.values()]) as meter:
            self.program.step(local)
            self.optimizer.step()
            peak = meter.take_peak_bytes()
        self.optimizer.zero_grad()
        most = torch.tensor(peak)
        dist.all_reduce(most, dist.ReduceOp.MAX)
        return int(most)


def compiled(
    plan: str,
    cluster: gc.ClusterProfile,
    batch: dict[str, torch.Tensor],
    options: argparse.Namespace,
) -> gc.ParallelModel:
    return gc.compile(
        build(options),
        cluster,
        example_inputs={key: value[:2] for key, value in batch.items()},
        global_batch_size=options.batch_size,
        plan=plan,
    )


def contend(plan: str, cluster: gc.ClusterProfile, options: argparse.Namespace) -> Row:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, 1024, (options.batch_size, options.length), generator=generator)
    batch = {"input_ids": ids, "labels": ids.clone()}
    name, parallelise = BY_HAND[plan]
    hand = Side(lambda: parallelise(build(options)), batch)
    ours = Side(lambda: compiled(plan, cluster, batch, options), batch)
    difference = 0.0
    for repetition in range(options.warm_up + options.repetitions):
        order = (hand, ours) if repetition % 2 == 0 else (ours, hand)
        for side in order:
            side.step(batch)
        difference = max(difference, abs(hand.loss - ours.loss) / abs(hand.loss))
    peaks = hand.peak_bytes(batch), ours.peak_bytes(batch)
    return summarise(plan, name, hand, ours, options.warm_up, peaks, difference)


def summarise(
    plan: str,
    name: str,
    hand: Side,
    ours: Side,
    warm_up: int,
    peaks: tuple[int, int],
    difference: float,
) -> Row:
    warm_up += 1  # the step that made a side
    hand_ms, ours_ms = hand.step_ms[warm_up:], ours.step_ms[warm_up:]
    medians = statistics.median(hand_ms), statistics.median(ours_ms)
    ratios = [b / a for a, b in zip(hand_ms, ours_ms, strict=True)]
    low, _, high = statistics.quantiles(ratios, n=4)
    totals = [statistics.median(side.total_ms[warm_up:]) for side in (hand, ours)]
    ratio, total = medians[1] / medians[0], totals[1] / totals[0]
    memory = peaks[1] / peaks[0]
    return Row(plan, name, *medians, ratio, low, high, total, *peaks, memory, difference)


def table(rows: list[Row]) -> Table:
    result = Table(title="Step time, 2 gloo ranks, one thread each", title_justify="left")
    headings = ["plan", "by hand", "by hand, ms", "ours, ms", "ours / by hand", "middle half"]
    for heading in [*headings, "with AdamW", "peak memory"]:
        result.add_column(heading, justify="left" if "ms" not in heading else "right")
    for row in rows:
        result.add_row(
            row.plan,
            row.by_hand,
            f"{row.by_hand_ms:.1f}",
            f"{row.ours_ms:.1f}",
            f"{row.ratio:.2f}",
            f"{row.ratio_low:.2f} to {row.ratio_high:.2f}",
            f"{row.ratio_with_optimizer:.2f}",
            f"{row.memory_ratio:.2f}",
        )
    return result


def save(rows: list[Row], options: argparse.Namespace) -> Path:
    command = ["git", "describe", "--always", "--dirty"]
    commit = subprocess.run(command, capture_output=True, text=True, cwd=RESULTS.parent)
    document = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit.stdout.strip() or "unknown",
        "machine": {"system": platform.platform(), "cpus": os.cpu_count()},
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "options": vars(options),
        "rows": [asdict(row) for row in rows],
    }
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"step_time_{platform.node()}.json"
    path.write_text(json.dumps(document, indent=1) + "\n")
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--plans", nargs="+", default=list(BY_HAND), choices=list(BY_HAND))
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--warm-up", type=int, default=4)
    parser.add_argument("--repetitions", type=int, default=20)
    options = parser.parse_args()
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    if dist.get_world_size() != 2:
        sys.exit(f"bench/step_time.py compares on 2 ranks, not {dist.get_world_size()}: make bench")
    cluster = measure(quick=True)
    rows = [contend(plan, cluster, options) for plan in options.plans]
    if dist.get_rank() == 0:
        console = Console(width=120)
        console.print(table(rows))
        console.print(f"wrote {save(rows, options)}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
