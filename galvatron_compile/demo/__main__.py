"""Run the demo; see :mod:`galvatron_compile.demo`. Every rank runs this file."""

from __future__ import annotations

import argparse
import os
import sys
import time
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

import galvatron_compile as gc
from galvatron_compile import notation
from galvatron_compile.demo.data import Text
from galvatron_compile.demo.model import Deviation, build_model, num_parameters
from galvatron_compile.demo.report import Summary, Timed, draw
from galvatron_compile.demo.train import Task, Trainer, measure_step_ms
from galvatron_compile.parallel_model import ParallelModel
from galvatron_compile.profiling import measure
from galvatron_compile.search_report import SearchReport, step_ms


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="galvatron_compile.demo", description=__doc__)
    parser.add_argument("--seconds", type=float, default=60.0, help="of training")
    parser.add_argument("--batch-size", type=int, default=16, help="samples, over all ranks")
    parser.add_argument("--length", type=int, default=128, help="bytes of a sample")
    parser.add_argument("--plan", help='run this instead of searching, for example "tp2.dp2"')
    parser.add_argument("--alternatives", type=int, default=3, help="other plans to measure")
    parser.add_argument("--out", type=Path, default=Path("runs/demo"))
    return parser.parse_args()


def main() -> None:
    options = arguments()
    if "RANK" not in os.environ:
        sys.exit("start it with `make demo`, or python -m torch.distributed.run --nproc-per-node 4")
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    console = Console(quiet=dist.get_rank() != 0)
    if dist.get_rank():
        warnings.simplefilter("ignore")
    try:
        demo(options, console)
    finally:
        dist.destroy_process_group()


def demo(options: argparse.Namespace, console: Console) -> None:
    task = Task(Text.read(), options.batch_size, options.length)
    console.rule("1. The machine")
    cluster = measure(quick=True)
    console.print(str(cluster), highlight=False, soft_wrap=True)

    console.rule("2. The plan")
    model = build_model()
    console.print(f"Llama with {num_parameters(model):,} parameters, {dist.get_world_size()} ranks")
    parallel = compile_for(model, cluster, task, options.plan)
    del model
    console.print(str(parallel.search or ""), highlight=False, soft_wrap=True)
    console.print(str(parallel.plan), highlight=False, soft_wrap=True)

    console.rule("3. Training")
    trainer = Trainer(parallel, task)
    before = trainer.deviation(first=True)
    train(trainer, options.seconds, console)
    measured_memory_bytes = trainer.peak_bytes()
    after = trainer.deviation(first=False)

    console.rule("4. Prediction and proof")
    alternatives = compare(parallel, cluster, task, options.alternatives)
    if dist.get_rank() == 0:
        assert before is not None and after is not None
        summary = summarise(trainer, measured_memory_bytes, before.worst(after), alternatives)
        summary.save(options.out / "summary.json", parallel.plan)
        draw(summary, options.out / "demo.png")
        console.print(summary.table())
        console.print(
            f"Largest difference from one process, float32, relative: "
            f"loss {summary.max_rel_loss_error:.1e}, gradients {summary.max_rel_grad_error:.1e}"
        )
        console.print(f"Wrote {options.out / 'summary.json'} and {options.out / 'demo.png'}")


def compile_for(
    model: torch.nn.Module, cluster: gc.ClusterProfile, task: Task, plan: str | gc.Plan | None
) -> ParallelModel:
    """Compile for the task's global batch, on an example of two samples."""
    example = {name: value[:2] for name, value in task.batch(0).items()}
    return gc.compile(
        model, cluster, example_inputs=example, global_batch_size=task.batch_size, plan=plan
    )


def train(trainer: Trainer, seconds: float, console: Console) -> None:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("step {task.completed:.0f}/{task.total:.0f}  loss {task.fields[loss]:.3f}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task("training", total=1, loss=float("nan"))

        def show(done: int, total: int, loss: float) -> None:
            progress.update(bar, completed=done, total=max(1, total), loss=loss)

        start = time.perf_counter()
        trainer.train(seconds, show)
    elapsed_s = time.perf_counter() - start
    first, last = trainer.losses[0], sum(trainer.losses[-5:]) / 5
    console.print(
        f"loss {first:.3f} → {last:.3f} in {len(trainer.losses)} steps, {elapsed_s:.0f} s"
    )


def compare(
    parallel: ParallelModel, cluster: gc.ClusterProfile, task: Task, num_plans: int
) -> tuple[Timed, ...]:
    """Measure uniform plans that were not chosen, each for a few steps.

    One of every kind that the search priced, so that the prediction is tried away from its choice.
    """
    if parallel.search is None:
        return ()
    found: list[Timed] = []
    for plan in one_of_each_kind(parallel.search, parallel.plan)[:num_plans]:
        other = compile_for(build_model(), cluster, task, plan)
        found.append(Timed(name_of(plan), step_ms(other.plan), measure_step_ms(other, task)))
    return tuple(found)


def one_of_each_kind(search: SearchReport, chosen: gc.Plan) -> list[gc.Plan]:
    """The fastest that fits of every (pp, tp, sharded parameters or not), but for the chosen."""
    uniform = [c.plan for c in search.candidates if c.plan is not None and c.fits]
    kinds: dict[tuple[int, int, bool], gc.Plan] = {}
    for plan in [*search.pipelines[:1], *uniform]:
        strategy = plan.strategies[0]
        if plan.strategies != chosen.strategies or plan.pp != chosen.pp:
            kinds.setdefault((plan.pp, strategy.tp, strategy.zero == 3), plan)
    return list(kinds.values())


def name_of(plan: gc.Plan) -> str:
    """The plan in the compact notation, cut short if it is long."""
    text = notation.format(plan)
    return text if len(text) <= 34 else f"{text[:31]}…"


def summarise(
    trainer: Trainer, memory_bytes: int, worst: Deviation, alternatives: tuple[Timed, ...]
) -> Summary:
    predicted = trainer.parallel.plan.predicted
    return Summary(
        losses=trainer.losses,
        predicted_step_ms=step_ms(trainer.parallel.plan),
        measured_step_ms=trainer.step_ms,
        predicted_memory_bytes=int(predicted["memory_bytes"]),
        measured_memory_bytes=memory_bytes,
        max_rel_loss_error=worst.loss,
        max_rel_grad_error=worst.gradient,
        alternatives=alternatives,
        name=name_of(trainer.parallel.plan),
    )


if __name__ == "__main__":
    main()
