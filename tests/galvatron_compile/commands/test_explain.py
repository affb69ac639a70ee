"""``galvatron-compile explain`` and ``compare`` as a person calls them."""

from __future__ import annotations

import io
from pathlib import Path

import example_plans
import pytest
import typer
from rich.console import Console
from typer.testing import CliRunner

from galvatron_compile.commands.compare import compare, show
from galvatron_compile.commands.explain import explain
from galvatron_compile.comparison import Comparison

RUNNER = CliRunner()


@pytest.fixture
def app() -> typer.Typer:
    app = typer.Typer(pretty_exceptions_enable=False)
    app.command()(explain)
    app.command()(compare)
    return app


@pytest.fixture
def plans(tmp_path: Path) -> tuple[Path, Path]:
    paths = tmp_path / "a.json", tmp_path / "b.json"
    example_plans.planned(30, 4, 16).save(paths[0])
    example_plans.planned(30, 4, 16, schedule="zero-bubble").save(paths[1])
    return paths


def test_page_is_written_beside_the_plan(app: typer.Typer, plans: tuple[Path, Path]) -> None:
    done = RUNNER.invoke(app, ["explain", str(plans[0])])
    assert done.exit_code == 0, done.output
    target = plans[0].with_suffix(".html")
    assert done.output.split() == ["written", "to", str(target)]
    assert "Llama-3-70B" in target.read_text(encoding="utf-8")


def test_page_is_written_where_asked(app: typer.Typer, plans: tuple[Path, Path]) -> None:
    target = plans[0].with_name("page.html")
    assert RUNNER.invoke(app, ["explain", str(plans[0]), "-o", str(target)]).exit_code == 0
    assert target.is_file()


def test_place_that_cannot_be_written_is_refused(
    app: typer.Typer, plans: tuple[Path, Path]
) -> None:
    target = plans[0].with_name("missing") / "page.html"
    done = RUNNER.invoke(app, ["explain", str(plans[0]), "-o", str(target)])
    assert done.exit_code == 2
    assert "choose another place with -o" in done.output


def test_plan_that_is_not_there_is_refused(app: typer.Typer, tmp_path: Path) -> None:
    for arguments in (["explain", str(tmp_path / "x")], ["compare", *[str(tmp_path / "x")] * 2]):
        done = RUNNER.invoke(app, arguments)
        assert done.exit_code == 2
        assert "there is no plan at" in done.output


def test_comparison_is_plain_text_in_a_pipe(app: typer.Typer, plans: tuple[Path, Path]) -> None:
    done = RUNNER.invoke(app, ["compare", *map(str, plans)])
    assert done.exit_code == 0, done.output
    expected = Comparison(
        example_plans.planned(30, 4, 16), example_plans.planned(30, 4, 16, schedule="zero-bubble")
    )
    assert done.output == f"{expected}\n"


def test_comparison_is_tables_on_a_terminal() -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=120, color_system=None)
    a, b = (example_plans.planned(30, 4, m) for m in (16, 32))
    show(Comparison(a, b), console)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "─" in text
    assert "• micro-batches 16 → 32" in text
    assert "pipeline bubble" in text
