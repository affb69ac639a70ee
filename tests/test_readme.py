"""The README is true: its example runs as printed, and what it names is there."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
NAMED_FILES = sorted(
    name
    for name in {*re.findall(r"`([\w./-]+)`", README), *re.findall(r"\]\((\w[^)]*)\)", README)}
    if re.search(r"\.(py|md|png)$|^LICENSE$", name) and not name.startswith(("runs/", "train.py"))
)


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def run(script: Path, *launcher: str) -> str:
    done = subprocess.run(
        [sys.executable, *launcher, script],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=script.parent,
        env=dict(os.environ, OMP_NUM_THREADS="1"),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_there_is_an_example() -> None:
    assert len(blocks("python")) == 1


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_example_runs_as_printed(tmp_path: Path, num_ranks: int) -> None:
    script = tmp_path / "train.py"
    script.write_text(blocks("python")[0])
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(num_ranks)]
    launcher += ["--log-dir", str(tmp_path)]  # else torch leaves an empty folder behind
    out = run(script, *(launcher if num_ranks > 1 else []))
    losses = re.findall(r"(\d+\.\d+(?:e-\d+)?)$", out.strip(), flags=re.MULTILINE)
    assert float(losses[-1]) < 2.0  # a classifier of 10 classes that knows nothing has 2.3


@pytest.mark.parametrize("name", NAMED_FILES)
def test_named_file_exists(name: str) -> None:
    assert (ROOT / name).is_file()


@pytest.mark.parametrize("target", sorted(set(re.findall(r"\bmake ([a-z][a-z-]*)", README))))
def test_named_make_target_exists(target: str) -> None:
    makefile = (ROOT / "Makefile").read_text()
    assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE)
