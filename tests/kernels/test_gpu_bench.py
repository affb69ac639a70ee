"""bench/gpu.py without a GPU: it says so, and its dry run finds what is wrong."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

BENCH = Path(__file__).resolve().parents[2] / "bench"


def bench(*arguments: str, code: str | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *(["-c", code] if code else [str(BENCH / "gpu.py")]), *arguments]
    environment = {**os.environ, "PYTHONPATH": str(BENCH), "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, env=environment)


@pytest.mark.skipif(torch.cuda.is_available(), reason="it would measure")
def test_without_a_gpu_it_says_that_it_needs_one() -> None:
    done = bench()
    assert (done.returncode, done.stdout.count("\n")) == (2, 1)
    assert "needs a CUDA GPU and there is none here: nothing was measured" in done.stdout


def test_the_dry_run_checks_every_kernel() -> None:
    done = bench("--dry-run")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 processes: nothing wrong; nothing was measured" in done.stdout


BROKEN = """
import os
os.environ["TRITON_INTERPRET"] = "1"
import torch, gpu, gpu_cases
from dataclasses import replace
first = replace(gpu_cases.CASES[0], kernel=lambda x, w: 1.05 * gpu_cases.CASES[0].kernel(x, w))
print(gpu.check([first, gpu_cases.CASES[5]], gpu_cases.TINY, torch.device("cpu")))
"""


def test_a_kernel_that_is_wrong_is_found() -> None:
    done = bench(code=BROKEN)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("['rms_norm: result 0 is off by ") and "swiglu" not in done.stdout
