"""``galvatron-compile emulate`` as a person calls it."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import Result
from emulated import needed, nothing_left, quotas_needed
from typer.testing import CliRunner

from galvatron_compile import emulation
from galvatron_compile.cli import app
from galvatron_compile.commands.emulate import parse_rate
from galvatron_compile.emulation import EmulationError

SCRIPT = """
import os, sys
print(*sys.argv[1:], "of", os.environ["WORLD_SIZE"], "on node", os.environ["GROUP_RANK"])
if "--fail" in sys.argv and os.environ["RANK"] == "1":
    raise ValueError("boom")
"""


@pytest.fixture
def script(tmp_path: Path) -> str:
    path = tmp_path / "script.py"
    path.write_text(SCRIPT)
    return str(path)


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["emulate", "--timeout", "120", *arguments])


@needed
@pytest.mark.parametrize("separator", [[], ["--"]])
def test_a_script_runs_on_every_rank_with_its_own_options(
    script: str, separator: list[str]
) -> None:
    options = ["--nodes", "2", "--ranks-per-node", "2", "--rate", "1gbit", "--pin", *separator]
    with nothing_left():
        result = run(*options, script, "--nodes", "9")
    assert result.exit_code == 0, result.output
    expected = [f"[{rank}] --nodes 9 of 4 on node {rank // 2}" for rank in range(4)]
    assert sorted(result.output.splitlines()) == expected


@quotas_needed
def test_ranks_have_a_part_of_a_core(tmp_path: Path) -> None:
    path = tmp_path / "script.py"
    path.write_text(
        "from galvatron_compile.control_groups import ControlGroup; "
        "print(ControlGroup.own().quotas()[0].cpus)"
    )
    with nothing_left():
        result = run("--nodes", "2", "--cpus-per-rank", "0.5", str(path))
    assert result.exit_code == 0, result.output
    assert sorted(result.output.splitlines()) == ["[0] 0.5", "[1] 0.5"]


@needed
def test_a_module_runs_after_the_separator() -> None:
    result = run("--nodes", "1", "--", "-m", "platform", "--terse")
    assert result.exit_code == 0
    assert result.output.startswith("[0] Linux")


@needed
def test_a_rank_that_fails_is_named(script: str) -> None:
    with nothing_left():
        result = run("--nodes", "2", script, "--fail")
    assert result.exit_code == 1
    assert "error: rank 1 of 2 (node 1) exited with code 1" in result.output
    assert "ValueError: boom" in result.output


def test_where_it_is_not_possible_the_reason_is_said(
    script: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(emulation, "why_not", lambda: "there is no kernel")
    result = run(script)
    assert result.exit_code == 2
    assert "error: cannot emulate a cluster here: there is no kernel" in result.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere.py"], "there is no script nowhere.py"),
        (["--rate", "fast", "{script}"], "expected a rate such as 200mbit"),
        (["--rate", "5kbit", "{script}"], "choose 100000 (100kbit) or more"),
        (["--nodes", "0", "{script}"], "choose a number from 1 to 250"),
    ],
)
def test_what_makes_no_sense_is_refused(arguments: list[str], message: str, script: str) -> None:
    result = run(*(argument.format(script=script) for argument in arguments))
    assert result.exit_code == 2
    assert message in result.output and "Traceback" not in result.output


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (None, None),
        ("200mbit", 2e8),
        ("1.5 Gbit", 1.5e9),
        ("800kbit", 8e5),
        ("123456bit", 123456.0),
    ],
)
def test_rates(text: str | None, expected: float | None) -> None:
    assert parse_rate(text) == expected


@pytest.mark.parametrize("text", ["", "200", "200mb", "-1mbit", "mbit", "1e3mbit"])
def test_other_rates_are_refused(text: str) -> None:
    with pytest.raises(EmulationError, match="expected a rate such as"):
        parse_rate(text)


def test_help_says_what_is_not_emulated() -> None:
    assert "not the latency" in " ".join(run("--help").output.split())
