"""A rank is killed in mid-step or in mid-save: the others stop, and a restart loses nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from galvatron_compile.checkpoint_files import SAVING, steps

PROGRAM = Path(__file__).with_name("checkpoint_job.py")
TIMEOUT_S = 120.0  # of the process group: a closed connection must be noticed long before
NEVER_S = 400.0


class Outcome:
    """How a rank ended, what it printed, and its errors."""

    def __init__(self, code: int, printed: str, errors: str) -> None:
        self.code, self.errors = code, errors
        lines = [json.loads(line) for line in printed.splitlines()]
        self.losses = {line["step"]: line["loss"] for line in lines if "loss" in line}
        self.failure = lines[-1] if lines and "error" in lines[-1] else None


def run(tmp_path: Path, world: int, *extra: str, victim: int = -1, die: str = "") -> list[Outcome]:
    """The training program on ``world`` processes, which are all gone when this returns."""
    store = tmp_path / "store"
    store.unlink(missing_ok=True)
    environment = dict(os.environ, OMP_NUM_THREADS="1")
    if sys.platform == "linux":
        environment["GLOO_SOCKET_IFNAME"] = "lo"
    processes = []
    for rank in range(world):
        command = [sys.executable, "-P", str(PROGRAM), "--folder", str(tmp_path / "saved")]
        command += ["--store", str(store), "--rank", str(rank), "--world", str(world)]
        command += ["--timeout-s", str(TIMEOUT_S), *extra]
        command += ["--die", die] if rank == victim else []
        processes.append(
            subprocess.Popen(
                command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
            )
        )
    try:
        texts = [process.communicate(timeout=NEVER_S) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    return [Outcome(p.returncode, *text) for p, text in zip(processes, texts, strict=True)]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: Any) -> dict[int, float]:
    """Losses of the program that never stops."""
    (outcome,) = run(tmp_path_factory.mktemp("undisturbed"), 1)
    assert outcome.code == 0, outcome.errors
    return outcome.losses


@pytest.mark.parametrize(
    ("victim", "die", "extra", "last", "world"),
    [
        (1, "step", (), 4, 2),
        (1, "save", (), 4, 1),
        (0, "save", (), 4, 2),
        (1, "save", ("--background",), 4, 2),
    ],
    ids=["in a step", "in a save", "rank 0 in a save", "in a save beside training"],
)
def test_a_killed_rank_stops_the_job_and_a_restart_loses_nothing(
    tmp_path: Path, undisturbed: Any, victim: int, die: str, extra: Any, last: int, world: int
) -> None:
    outcomes = run(tmp_path, 2, *extra, victim=victim, die=die)
    assert outcomes[victim].code == -9
    survivor = outcomes[1 - victim]
    assert survivor.code == 1, survivor.errors
    assert survivor.failure is not None and survivor.failure["after_s"] < TIMEOUT_S
    if die == "save" and not extra:
        assert survivor.failure["error"] == "PeerError"
        assert "another rank of the job has ended" in survivor.errors
    else:  # in a step, the error is gloo's
        assert "peer" in survivor.errors.lower()
    folder = tmp_path / "saved"
    assert list(steps(folder)) == [2, 4]
    left = [path.name for path in folder.iterdir() if path.name.startswith(".")]
    assert left == ([f"{SAVING}step-000006"] if victim == 0 else [])  # rank 0 clears up

    for outcome in run(tmp_path, world, *extra):  # perhaps on fewer ranks
        assert outcome.code == 0, outcome.errors
        assert list(outcome.losses) == list(range(last + 1, 9))
        for step, loss in outcome.losses.items():
            assert loss == pytest.approx(undisturbed[step], rel=1e-9)
    assert sorted(path.name for path in folder.iterdir()) == ["step-000006", "step-000008"]
