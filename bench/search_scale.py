"""How the time of the exact search grows: with layers, GPUs and strategies.

``OMP_NUM_THREADS=1 python bench/search_scale.py``; every number is CPU-seconds of the process, for
all pipeline degrees, numbers of micro-batches and schedules together, from made cost tables to
proven optimum. The costs are synthetic but shaped like a dense Llama with blocks of 70B's size on
H100 nodes: compute by FLOPs, collectives by bytes, states by ZeRO stage, activations by recompute,
plus a few per cent of noise so that no two options tie by construction. Table on stdout, JSON under
bench/results.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from galvatron_compile.passes.pipeline.problem import Family, PipelineProblem, StageCosts
from galvatron_compile.passes.pipeline.searcher import search
from galvatron_compile.schedules import why_not
from galvatron_compile.strategy import Recompute, Strategy

RESULTS = Path(__file__).resolve().parent / "results"
CAPACITY = 76 << 30
SEQUENCE, HIDDEN, HEADS_BYTES = 8192, 8192, 2
PARAMETERS = {"embedding": 1.05e9, "block": 0.856e9, "head": 1.05e9}
FLOPS_PER_S, NODE_BYTES_PER_S, FABRIC_BYTES_PER_S = 4.0e14, 3.0e11, 4.0e10


@dataclass(frozen=True)
class Row:
    """families: all legal (pp, micro-batches, schedule); solved: those that were not excluded by
    their bound; step_ms: the optimum."""

    layers: int
    gpus: int
    strategies: int
    families: int
    solved: int
    best: str
    step_ms: float
    search_cpu_s: float


def menu(ranks: int, size: str) -> list[Strategy]:
    """About 24, 60 or 200 strategies of ``ranks`` ranks; fewer where there are few ranks."""
    recomputes: tuple[Recompute, ...] = ("none", "selective", "full")
    tps = (1, 2, 4, 8) if size != "60" else (1, 2, 4, 8, 16)
    sequence = {"24": ((1, 1),), "60": ((1, 1),), "200": ((1, 1), (2, 1), (4, 1), (8, 1), (1, 2))}
    chosen: list[Strategy] = []
    for tp, (ulysses, cp) in product(tps, sequence[size]):
        if ranks % (tp * ulysses * cp):
            continue
        dp = ranks // (tp * ulysses * cp)
        zeros: tuple[int, ...] = (0, 1, 2, 3) if size != "24" else (1, 3)
        zeros = zeros if dp * ulysses * cp > 1 else (0,)
        chosen += [
            Strategy(tp, dp, tp > 1, zero, recompute, ulysses, cp)
            for zero, recompute in product(zeros, recomputes)
        ]
    return chosen


def stage_costs(ranks: int, batch: int, m: int, size: str) -> StageCosts:
    """Costs of ``ranks`` ranks that run ``m`` micro-batches of a batch."""
    options = menu(ranks, size)
    rng = np.random.default_rng([ranks, m, len(options)])
    shapes = sorted({(s.tp, s.ulysses, s.cp) for s in options})
    layout = np.array([shapes.index((s.tp, s.ulysses, s.cp)) for s in options], dtype=np.int64)
    numbers = np.zeros((7, 3, len(options)))
    allowed = np.ones((3, len(options)), dtype=np.bool_)
    for k, name in enumerate(PARAMETERS):
        for s, option in enumerate(options):
            allowed[k, s] = batch % (m * option.dp) == 0
            numbers[:, k, s] = _costs(name, option, batch / m / option.dp)
    numbers[:2] *= rng.uniform(0.98, 1.02, numbers[:2].shape)
    whole = np.ceil(np.where(allowed, numbers, 0)).astype(np.int64)
    moved = [batch / m * SEQUENCE * HIDDEN * 2 / ranks * max(a[0], 1) for a in shapes]
    switch = np.add.outer(moved, moved) / NODE_BYTES_PER_S * 1e9
    np.fill_diagonal(switch, 0)
    switches = {pair: np.ceil(switch).astype(np.int64) for pair in [(0, 1), (1, 1), (1, 2), (0, 2)]}
    return StageCosts(tuple(options), allowed, *whole, layout=layout, switch_ns=switches)


def _costs(name: str, option: Strategy, samples: float) -> list[float]:
    """micro and step ns, states, saved and transient bytes, forward and backward send ns."""
    sequence_ranks = option.ulysses * option.cp
    tokens = samples * SEQUENCE / sequence_ranks
    parameters = PARAMETERS[name]
    flops = (0 if name == "embedding" else 6 * parameters) * tokens / option.tp
    again = {"none": 1.0, "selective": 1.04, "full": 4 / 3}[option.recompute]
    activation = tokens * HIDDEN * 2
    fabric = NODE_BYTES_PER_S if option.tp * sequence_ranks < 8 else FABRIC_BYTES_PER_S
    tensor = 0.0 if option.tp == 1 else 4 * activation * (option.tp - 1) / option.tp
    tensor *= 1.5 if option.recompute == "full" else 1.0
    exchange = 8 * activation if sequence_ranks > 1 else 0.0
    in_node = NODE_BYTES_PER_S if option.tp <= 8 else FABRIC_BYTES_PER_S
    weights, data = 2 * parameters / option.tp, option.data_ranks
    gathers = 3 * weights if option.zero == 3 else 0.0
    micro = flops * again / FLOPS_PER_S + (tensor + exchange) / in_node + 0.3 * gathers / fabric
    step = 0.4 * 2 * weights * (data > 1) / FABRIC_BYTES_PER_S + 8 * weights / 3e12
    whole = {0: 18, 1: 6 + 12 / data, 2: 2 + 16 / data, 3: 18 / data}[option.zero]
    kept = {"none": 17.0, "selective": 9.0, "full": 1.0}[option.recompute]
    saved = activation * (kept if name == "block" else 2.0)
    saved /= 1 if option.recompute == "full" and not option.sequence_parallel else option.tp
    logits = tokens * 128256 * 6 / option.tp if name == "head" else 0.0
    transient = logits + 6 * activation / option.tp + (2 * weights if option.zero == 3 else 0)
    send = activation / option.tp / FABRIC_BYTES_PER_S
    sizes = [whole * parameters / option.tp, saved, transient]
    return [micro * 1e9, step * 1e9, *sizes, send * 1e9, send * 1e9]


def problems(layers: int, gpus: int, size: str) -> list[PipelineProblem]:
    """All families: pp and micro-batches in powers of two, every schedule, 2 and 4 chunks."""
    batch = max(256, 2 * gpus)
    classes = (0, *[1] * (layers - 2), 2)
    result = []
    powers = [1 << i for i in range(15)]
    for pp, m in product([p for p in powers if p <= min(64, gpus, layers)], powers):
        costs = None
        for schedule, virtual in [
            *(("1f1b", 1), ("gpipe", 1), ("zero-bubble", 1), ("interleaved", 2)),
            ("interleaved", 4),
        ]:
            if why_not(schedule, pp, m, virtual) or pp * virtual > layers or m > batch:
                continue
            if pp == 1 and schedule != "1f1b":
                continue
            costs = costs or stage_costs(gpus // pp, batch, m, size)
            if not costs.allowed.any():
                continue
            family = Family(pp, m, schedule, virtual)
            result.append(PipelineProblem(family, classes, costs, (), CAPACITY))
    return result


def measure(layers: int, gpus: int, size: str, top: int) -> Row | None:
    given = problems(layers, gpus, size)
    start = time.process_time()
    outcome = search(given, top)
    seconds = time.process_time() - start
    num = max(problem.costs.num_options for problem in given)
    best = outcome.best
    return Row(
        *(layers, gpus, num, len(given), len(outcome.solved)),
        *("none fits" if best is None else str(best.problem.family),),
        *(0.0 if best is None else best.total_ns / 1e6, seconds),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--layers", type=int, nargs="+", default=[10, 32, 80, 126, 320, 1000])
    parser.add_argument("--gpus", type=int, nargs="+", default=[8, 64, 1024, 16384])
    parser.add_argument("--sizes", nargs="+", default=["24", "60", "200"])
    parser.add_argument("--top", type=int, default=5)
    options = parser.parse_args()
    rows = []
    console = Console(width=110)
    for gpus, layers, size in product(options.gpus, options.layers, options.sizes):
        row = measure(layers, gpus, size, options.top)
        rows.append(row)
        console.print(row, highlight=False)
    table = Table("layers", "GPUs", "strategies", "families", "solved", "best", "step ms", "CPU s")
    for row in rows:
        table.add_row(
            *map(str, (row.layers, row.gpus, row.strategies, row.families, row.solved, row.best)),
            *(f"{row.step_ms:.1f}", f"{row.search_cpu_s:.2f}"),
        )
    console.print(table)
    path = RESULTS / f"search_scale_{platform.node()}.json"
    path.write_text(json.dumps({"top": options.top, "rows": [asdict(r) for r in rows]}, indent=1))
    console.print(f"wrote {path}")


if __name__ == "__main__":
    main()
