"""``galvatron-compile price`` on profiles of Galvatron's."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from random import Random
from typing import Any

import pytest
import typer
from click.testing import Result
from typer.testing import CliRunner

from galvatron_compile import notation
from galvatron_compile.commands.price import parse_bytes, price
from galvatron_compile.errors import PlanError
from galvatron_compile.galvatron import plans

app = typer.Typer()
app.command()(price)
NOTATION = "all: dp4.zero3; 2-3: tp2.sp.dp2.zero3.recompute"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    helper = Path(__file__).parents[1] / "galvatron" / "conftest.py"
    spec = importlib.util.spec_from_file_location("galvatron_profiles", helper)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    written: Path = module.write(tmp_path / "profile", module.made_files(4, Random(0)))
    return written


def run(folder: Path, plan: str | Path, *options: str) -> Result:
    fixed = ["--gpus", "4", "--seq", "128", "--global-batch", "8", "--layers", "4"]
    fixed += ["--hidden", "64", "--memory", "64GiB"]
    return CliRunner().invoke(app, [str(plan), "--from-galvatron", str(folder), *fixed, *options])


def priced(folder: Path, plan: str | Path, *options: str) -> dict[str, Any]:
    result = run(folder, plan, "--json", *options)
    assert result.exit_code == 0, result.output
    found: dict[str, Any] = json.loads(result.output)
    return found


def test_every_format_of_a_plan_has_one_price(folder: Path, tmp_path: Path) -> None:
    plan = notation.parse(NOTATION, plans.layer_names(4), 4, 8)
    plan.save(tmp_path / "ours.json")
    plans.save(plan, tmp_path / "theirs.json")
    (tmp_path / "plan.txt").write_text(NOTATION + "\n")
    expected = priced(folder, NOTATION)
    for name in ("ours.json", "theirs.json", "plan.txt"):
        assert priced(folder, tmp_path / name) == expected
    assert expected["notation"] == NOTATION
    assert sum(expected["parts_ms"].values()) == pytest.approx(expected["step_ms"])
    assert expected["fits"] and len(expected["peak_memory_bytes"]) == 1


def test_the_text_shows_causes_and_memory_against_the_limit(folder: Path) -> None:
    result = run(folder, NOTATION)
    assert result.exit_code == 0
    for part in ("layers: recomputation", "ms a step", "stage 0", "yes", "limit: 52429.0 MiB of"):
        assert part in result.output
    small = run(folder, NOTATION, "--memory", "2GiB")
    assert small.exit_code == 0 and " NO" in small.output


def test_a_plan_is_written_as_galvatrons(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "galvatron_config.json"
    priced(folder, NOTATION, "--write-galvatron", str(out))
    assert notation.format(plans.load(out, 4)) == NOTATION


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        ("nowhere.json", "there is no plan at nowhere.json"),
        ("dp4.zer3", "did you mean 'zero3'"),
        ("dp4.zero1", "no term for ZeRO-1"),
        ("dp4; pp=3", "do not divide 4 ranks"),
    ],
)
def test_a_wrong_plan_is_refused_in_one_message(folder: Path, plan: str, message: str) -> None:
    result = run(folder, plan)
    assert result.exit_code == 2
    assert message in result.output and "Traceback" not in result.output


def test_what_is_missing_is_named(folder: Path) -> None:
    result = CliRunner().invoke(app, ["dp4", "--from-galvatron", str(folder), "--gpus", "4"])
    assert result.exit_code == 2
    assert "--from-galvatron needs --seq, --global-batch too" in result.output


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("36GiB", 36 * 2**30),
        ("1.5 GiB", 3 * 2**29),
        ("512mib", 2**29),
        ("80GB", 80 * 10**9),
        ("12345", 12345),
    ],
)
def test_amounts_of_memory(text: str, expected: int) -> None:
    assert parse_bytes(text) == expected


@pytest.mark.parametrize("text", ["", "GiB", "36 apples", "36iB", "-1GiB"])
def test_other_amounts_are_refused(text: str) -> None:
    with pytest.raises(PlanError, match="such as 36GiB"):
        parse_bytes(text)
