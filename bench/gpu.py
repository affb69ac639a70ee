"""Every kernel on one GPU: right results, share of the roofline, time against PyTorch's own ways.

``make bench-gpu``, or: python bench/gpu.py. Takes less than 9 minutes. Ceilings are measured in the
same call: a copy for kernels that memory bounds, cuBLAS for products. Times are medians of CUDA
events with the L2 cache flushed in front of each run. Results go to bench/results as JSON.

``--dry-run`` checks every kernel at tiny sizes on the CPU under Triton's interpreter and measures
nothing. What runs on CUDA only has not been run yet: no GPU was at hand.
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
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"
BUDGET_S = 500.0


@dataclass(frozen=True)
class Row:
    """One kernel. share: of the ceiling. over_*: their time over the kernel's, above 1 means that
    the kernel is faster; None where it was not tried."""

    name: str
    ms: float
    share: float
    target: float | None
    over_eager: float | None
    over_compiled: float | None
    over_liger: float | None = None


def check(cases: Sequence[Any], sizes: Any, device: Any) -> list[str]:
    """What is wrong: kernels on 16-bit and float32 inputs against PyTorch in float64."""
    import torch

    wrong = []
    for case in cases:
        inputs = case.make(sizes, device)
        exact = case.eager(*(_wide(x) for x in inputs))
        got = case.kernel(*inputs)
        for place, (one, other) in enumerate(zip(_flat(got), _flat(exact), strict=True)):
            eps = torch.finfo(one.dtype).eps
            scale = max(1.0, float(other.abs().max()))
            error = float((one.double() - other.double()).abs().max())
            if not error <= 4 * eps * scale:
                wrong.append(f"{case.name}: result {place} is off by {error:g} of {scale:g}")
    return wrong


def _wide(value: Any) -> Any:
    """A copy in float64, of lists too."""
    import torch

    if isinstance(value, list) and value and isinstance(value[0], torch.Tensor):
        return [_wide(x) for x in value]
    if isinstance(value, torch.Tensor):
        return value.double() if value.is_floating_point() else value.clone()
    return value


def _flat(value: Any) -> list[Any]:
    return [value] if not isinstance(value, (tuple, list)) else [x for x in value if x is not None]


def median_ms(call: Callable[[], Any], seconds: float = 0.5) -> float:
    """Of runs with a cold L2 cache, after some to warm up."""
    import torch

    flush = torch.empty(2**28, dtype=torch.uint8, device="cuda")
    for _ in range(3):
        call()
    torch.cuda.synchronize()
    times: list[float] = []
    until = time.perf_counter() + seconds
    while len(times) < 10 or (time.perf_counter() < until and len(times) < 200):
        flush.zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)


def copy_ceiling() -> float:
    """Bytes a second, read and written."""
    import torch

    source = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() / median_ms(lambda: target.copy_(source)) * 1e3


def measured(case: Any, sizes: Any, bytes_per_s: float, compiles: bool) -> Row:
    import torch

    inputs = case.make(sizes, torch.device("cuda"))
    ms = median_ms(lambda: case.kernel(*inputs))
    eager_ms = median_ms(lambda: case.eager(*inputs))
    compiled_ms = None
    if compiles:
        compiled = torch.compile(case.eager, dynamic=False)
        compiled_ms = median_ms(lambda: compiled(*inputs)) / ms
    share = case.moved_bytes(inputs) / bytes_per_s * 1e3 / ms
    liger = liger_ms(case.name, inputs)
    return Row(
        case.name, ms, share, case.target, eager_ms / ms, compiled_ms, liger and liger / ms
    )


def liger_ms(name: str, inputs: Any) -> float | None:
    """Liger's kernel for the same, if it is installed and has one."""
    try:
        from liger_kernel.ops.rms_norm import LigerRMSNormFunction
        from liger_kernel.ops.swiglu import LigerSiLUMulFunction
    except ImportError:
        return None
    calls: dict[str, Callable[[], Any]] = {
        "rms_norm": lambda: LigerRMSNormFunction.apply(*inputs, 1e-5),
        "swiglu": lambda: LigerSiLUMulFunction.apply(*inputs),
    }
    return median_ms(calls[name]) if name in calls else None


def products(rows: list[Row]) -> None:
    """Both overlapped products, flags preset, against cuBLAS."""
    import torch
    from gpu_peers import preset_products

    for name, kernel, blas, _ in preset_products(torch.device("cuda")):
        ms, blas_ms = median_ms(kernel), median_ms(blas)
        rows.append(Row(f"{name}, flags preset", ms, blas_ms / ms, 0.92, blas_ms / ms, None))


def table(rows: Sequence[Row], title: str) -> Any:
    from rich.table import Table

    result = Table(title=title, title_justify="left")
    for heading in ("kernel", "ms", "of the ceiling", "target", "over eager", "over compile"):
        result.add_column(heading, justify="left" if heading == "kernel" else "right")
    for row in rows:
        target = "" if row.target is None else f"{row.target:.0%}"
        others = [row.over_eager, row.over_compiled]
        shown = ["" if x is None else f"{x:.2f}" for x in others]
        result.add_row(row.name, f"{row.ms:.3f}", f"{row.share:.0%}", target, *shown)
    return result


def save(rows: Sequence[Row], wrong: Sequence[str], ceilings: dict[str, float]) -> Path:
    import torch
    import triton

    command = ["git", "describe", "--always", "--dirty"]
    commit = subprocess.run(command, capture_output=True, text=True, cwd=HERE)
    driver = subprocess.run(
        ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"],
        capture_output=True, text=True,
    )  # fmt: skip
    document = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit.stdout.strip() or "unknown",
        "gpu": torch.cuda.get_device_name(),
        "driver": driver.stdout.strip(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "triton": triton.__version__,
        },
        "ceilings": ceilings,
        "wrong": list(wrong),
        "rows": [asdict(row) for row in rows],
    }
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"gpu_{torch.cuda.get_device_name().replace(' ', '_')}.json"
    path.write_text(json.dumps(document, indent=1) + "\n")
    return path


def dry_run() -> int:
    """Exit status: 0 if every kernel is right."""
    import torch
    from gpu_cases import CASES, TINY
    from gpu_peers import check_in_processes

    torch.manual_seed(time.time_ns() % 2**31)
    wrong = check(CASES, TINY, torch.device("cpu"))
    if failed := check_in_processes(2, 3, "cpu"):
        wrong.append(f"2 processes: {failed}")
    for line in wrong:
        print(f"wrong: {line}")
    kernels = f"{len(CASES)} kernels, and those with peers in 2 processes"
    print(f"dry run of {kernels}: {len(wrong) or 'nothing'} wrong; nothing was measured")
    return 1 if wrong else 0


def run(out_of_time: Callable[[], bool]) -> int:
    import torch
    from gpu_cases import CASES, FULL
    from gpu_peers import check_in_processes
    from rich.console import Console

    console, device = Console(width=120), torch.device("cuda")
    wrong = check(CASES, FULL, device)
    for size in (2, 4):
        if failed := check_in_processes(size, 1000, "cuda"):
            wrong.append(f"{size} processes: {failed}")
    bytes_per_s = copy_ceiling()
    rows: list[Row] = []
    products(rows)
    for case in CASES:
        if out_of_time():
            console.print(f"out of time before {case.name}: the rest was not measured")
            break
        rows.append(measured(case, FULL, bytes_per_s, not case.in_place and not out_of_time()))
    title = f"{torch.cuda.get_device_name()}, copy at {bytes_per_s / 1e12:.2f} TB/s"
    console.print(table(rows, title))
    for line in wrong:
        console.print(f"[red]wrong:[/red] {line}")
    console.print(f"wrote {save(rows, wrong, {'copy_bytes_per_s': bytes_per_s})}")
    return 1 if wrong else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dry-run", action="store_true", help="check on the CPU, measure nothing")
    options = parser.parse_args()
    sys.path.insert(0, str(HERE))
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
    deadline = time.monotonic() + BUDGET_S
    return run(lambda: time.monotonic() > deadline)


if __name__ == "__main__":
    sys.exit(main())
