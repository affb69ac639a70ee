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
    assert done.stdout.startswith("seed ")
    assert "peers in 2 processes: nothing wrong; nothing was measured" in done.stdout


BROKEN = """
import os
os.environ["TRITON_INTERPRET"] = "1"
import gpu, gpu_flat, gpu_peers, torch
from dataclasses import replace

by_name = {case.name: case for case in gpu_flat.CASES}

def last_expert_first(x, chosen):  # agrees with itself, and has the right number of rows
    source = torch.argsort(chosen.flatten(), stable=True, descending=True)
    return x[source // 2], source, torch.bincount(chosen.flatten(), minlength=8).flip(0)

def raises(*inputs):
    raise ArithmeticError("on purpose")

def last_row_lost(x, w):
    y = by_name["rms_norm"].kernel(x, w)
    y[-1, -1] *= 1.03
    return y

cases = [
    replace(by_name["rms_norm"], kernel=lambda x, w: 1.01 * by_name["rms_norm"].kernel(x, w)),
    replace(by_name["layer_norm"], kernel=raises),
    replace(by_name["rms_norm"], name="an element", kernel=last_row_lost),
    replace(by_name["permute"], kernel=last_expert_first),
    by_name["swiglu"],
]
gpu_peers.check_in_processes = lambda size, rounds, *rest: gpu_peers.Rounds(size, 0, 1, "a rank")
print("status", gpu.dry_run(cases))
"""


def test_the_dry_run_fails_if_a_kernel_is_wrong_or_raises() -> None:
    done = bench(code=BROKEN)
    assert "status 1" in done.stdout, done.stdout + done.stderr
    for line in (
        "wrong: rms_norm: result 0 is off by",
        "wrong: an element: result 0 is off by",
        "wrong: permute: result 0 is off by",
        "wrong: permute: result 1 is off by",
        "wrong: permute: result 2 is off by",
        "wrong: 2 processes, 1 rounds right, then: a rank",
        "not checked: case layer_norm: ArithmeticError: on purpose",
    ):
        assert line in done.stdout, done.stdout + done.stderr
    assert "swiglu" not in done.stdout


PLAYED = """
import os, sys
os.environ["TRITON_INTERPRET"] = "1"
import time, gpu_peers

def play(turn, peers, generator, device):
    peers.barrier()
    if turn == 2 and peers.rank == 1:
        if sys.argv[1] == "raises":
            raise RuntimeError("too much by half")
        open(sys.argv[2], "w").close()
        time.sleep(600)

class Clock:
    monotonic = staticmethod(lambda: 100.0 * os.path.exists(sys.argv[2]))

if __name__ == "__main__":
    gpu_peers.time = Clock
    done = gpu_peers.check_in_processes(2, 1000, "cpu", 5, 50.0, play)
    print("passed", 1 <= done.passed <= 2, "wrong", repr(done.wrong))
"""


@pytest.mark.parametrize(
    ("fault", "wrong"), [("raises", "'RuntimeError: too much by half'"), ("hangs", "''")]
)
def test_rounds_of_processes_end_with_what_was_reached(
    fault: str, wrong: str, tmp_path: Path
) -> None:
    script = tmp_path / "played.py"
    script.write_text(PLAYED)
    environment = {**os.environ, "PYTHONPATH": str(BENCH), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(script), fault, str(tmp_path / "hung")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"passed True wrong {wrong}\n", done.stdout
