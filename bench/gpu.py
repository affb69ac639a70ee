"""Every kernel on one GPU: right results, share of the roofline, time against PyTorch's own ways.

``make bench-gpu``, or: python bench/gpu.py [--out FOLDER]. Takes less than 9 minutes. Ceilings are
measured in the same call: a copy for kernels that memory bounds, cuBLAS for products. Times are
medians of CUDA events with the L2 cache flushed and all launches queued before. Results go to a
JSON file, bench/results by default, after each row. Exit status: 1 if a result was wrong or
something failed, 2 without a GPU; targets that were missed only show in the table.

``--dry-run`` checks every kernel at tiny sizes on the CPU under Triton's interpreter, goes through
the code that measures and measures nothing. What needs CUDA has not been run yet: no GPU was at
hand.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

STARTED = time.monotonic()
HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"
for folder in (HERE, HERE.parent):  # from a clone, installed or not
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))

from gpu_report import Report, show  # noqa: E402
from gpu_worker import Failed, TookTooLong, Worker  # noqa: E402

BUDGET_S = 500.0  # of the 540 that it may take
ROUNDS = 1000
ROUNDS_S = 110.0  # for all rounds of so many processes
PRODUCTS = ("gather", "scatter")
# (seconds that must be left to begin, most that it may take), by verb
LIMITS_S = {
    "machine": (0, 120), "ceilings": (0, 60), "preset": (30, 60), "case": (20, 60),
    "linked": (30, 60), "compiled": (45, 90),
}  # fmt: skip

Ask = Callable[[str, str, float], Any]
Play = Callable[[int, float], Any]  # processes, seconds → gpu_peers.Rounds


def run(
    names: Sequence[str],
    compiled: Sequence[str],
    ask: Ask,
    play: Play,
    report: Report,
    left_s: Callable[[], float],
    rounds: int = ROUNDS,
    processes: Sequence[int] = (2, 4),
) -> None:
    """Everything into ``report``, the most important first, and nothing for longer than is left.

    ask: answers (verb, name) as ``gpu_measure.Bench.answer`` does, within so many seconds, or
    raises Failed. play: rounds on so many processes within so many seconds. left_s: until the end.
    """

    def attempt(verb: str, name: str = "") -> Any:
        what = f"{verb} {name}".strip()
        needed, most = LIMITS_S[verb]
        left = left_s()
        if left <= needed:
            report.left_out[what] = "out of time"
            report.save()
            return None
        try:
            return ask(verb, name, min(left, most))
        except TookTooLong as error:
            # Where less time was left than it may take, nobody knows whether it hung.
            (report.left_out if left < most else report.failed)[what] = str(error)
        except Failed as error:
            report.failed[what] = str(error)
        report.save()
        return None

    def row(verb: str, name: str) -> None:
        if (found := attempt(verb, name)) is not None:
            wrong, measured = found
            report.wrong += wrong
            report.add_row(measured)

    report.machine |= attempt("machine") or {}
    report.ceilings |= attempt("ceilings") or {}
    for name in PRODUCTS:
        row("preset", name)
    for name in names:
        row("case", name)
    for size in processes:
        _rounds(size, rounds, play, report, left_s())
    for name in PRODUCTS:
        row("linked", name)
    for name in compiled:
        if name in report.rows and (timed := attempt("compiled", name)) is not None:
            report.add_compiled(name, timed.ms, timed.late)
    report.save()


def _rounds(size: int, rounds: int, play: Play, report: Report, left: float) -> None:
    """Of processes that share the GPU: all right, or what was wrong, or how many there was time
    for."""
    what = f"{rounds} rounds of {size} processes"
    if left <= 30:
        report.left_out[what] = "out of time"
        return report.save()
    try:
        done = play(size, min(ROUNDS_S, left - 10))  # to kill them takes time too
    except Exception as error:  # before the processes ran; theirs come back as wrong
        report.failed[what] = f"{type(error).__name__}: {error}"
        return report.save()
    report.rounds.append({**asdict(done), "wanted": rounds})
    if done.wrong:
        report.wrong.append(f"{size} processes, {done.passed} rounds right, then: {done.wrong}")
    elif done.passed < rounds:
        report.left_out[what] = f"out of time after {done.passed}, all right"
    report.save()


def dry_run(cases: Sequence[Any] | None = None) -> int:
    """Exit status: 0 if every kernel is right. cases: default: all of gpu_cases and gpu_flat."""
    import torch
    from gpu_cases import TINY
    from gpu_flat import CASES
    from gpu_measure import Bench
    from gpu_peers import check_in_processes
    from gpu_products import TINY as SHAPES
    from gpu_timer import called_once

    chosen = CASES if cases is None else cases
    seed, rounds = random.SystemRandom().randrange(2**31), 2
    print(f"seed {seed}")
    shapes = {"preset": SHAPES, "linked": SHAPES}
    device = torch.device("cpu")
    bench = Bench(chosen, TINY, shapes, device, called_once, seed, small=True)
    report = Report()

    def ask(verb: str, name: str, _: float) -> Any:
        try:
            return bench.answer(verb, name)
        except Exception as error:
            raise Failed(f"{type(error).__name__}: {error}") from error

    def play(size: int, _: float) -> Any:
        return check_in_processes(size, rounds, "cpu", seed, 300.0)

    # The compiler takes longer than all the rest, and makes no use of our kernels.
    run([case.name for case in chosen], [], ask, play, report, lambda: 600.0, rounds, (2,))
    for line in report.wrong:
        print(f"wrong: {line}")
    for what, why in (*report.failed.items(), *report.left_out.items()):
        print(f"not checked: {what}: {why}")
    found = len(report.wrong) + len(report.failed) + len(report.left_out)
    kernels = f"{len(chosen)} cases, 4 products, {rounds} rounds with peers in 2 processes"
    print(f"dry run of {kernels}: {found or 'nothing'} wrong; nothing was measured")
    return 1 if found else 0


def measure(out: Path) -> int:
    """On the GPU; exit status as in the docstring of the file."""
    from gpu_flat import CASES
    from gpu_full import full_answer
    from gpu_peers import check_in_processes
    from rich.console import Console

    def left_s() -> float:
        return STARTED + BUDGET_S - time.monotonic()

    def play(size: int, seconds: float) -> Any:
        seed = random.SystemRandom().randrange(2**31)
        return check_in_processes(size, ROUNDS, "cuda", seed, seconds)

    def ask(verb: str, name: str, seconds: float) -> Any:
        print(f"{time.monotonic() - STARTED:4.0f} s  {verb} {name}", flush=True)
        return worker.ask(verb, name, seconds)

    report = Report(folder=out)
    worker = Worker(full_answer)
    names = [case.name for case in CASES]
    compiled = [case.name for case in CASES if case.compiles and case.compares]
    try:
        run(names, compiled, ask, play, report, left_s)
    finally:
        worker.stop()
        report.seconds = time.monotonic() - STARTED
        report.save()
        show(report, Console(width=150))
        print(f"wrote {out / report.file_name()}")
    return report.status()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dry-run", action="store_true", help="check on the CPU, measure nothing")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the JSON file")
    options = parser.parse_args()
    if options.dry_run:
        if os.environ.get("TRITON_INTERPRET") != "1":  # read when triton is imported
            os.environ["TRITON_INTERPRET"] = "1"
            os.execv(sys.executable, [sys.executable, *sys.argv])
        return dry_run()
    import torch

    if not torch.cuda.is_available():
        print("bench/gpu.py needs a CUDA GPU and there is none here: nothing was measured; "
              "--dry-run checks the kernels on the CPU")  # fmt: skip
        return 2
    return measure(options.out)


if __name__ == "__main__":
    sys.exit(main())
