"""``galvatron-compile explain`` and ``compare`` as a person calls them."""

from __future__ import annotations

import io
import json
from pathlib import Path

import example_plans
import pytest
import recorded_by_hand
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


@pytest.fixture
def recorded(tmp_path: Path) -> tuple[Path, Path]:
    plan, recording = tmp_path / "plan.json", tmp_path / "recording.json"
    recorded_by_hand.predicted().save(plan)
    recorded_by_hand.pipeline().save(recording)
    return plan, recording


def test_a_recording_is_laid_beside_the_prediction(
    app: typer.Typer, recorded: tuple[Path, Path], tmp_path: Path
) -> None:
    plan, recording = recorded
    page, events, picture = (tmp_path / name for name in ("p.html", "p.json", "p.png"))
    wanted = ["--trace", recording, "--out", page, "--trace-json", events, "--trace-png", picture]
    done = RUNNER.invoke(app, ["explain", str(plan), *map(str, wanted)])
    assert done.exit_code == 0, done.output
    assert done.output.splitlines() == [f"written to {path}" for path in (page, events, picture)]
    assert "predicted 13.5 ms, measured 22.0 ms" in page.read_text(encoding="utf-8")
    assert json.loads(events.read_text(encoding="utf-8"))["traceEvents"]
    assert picture.stat().st_size > 0


def test_what_a_plan_does_not_predict_is_said(
    app: typer.Typer, recorded: tuple[Path, Path]
) -> None:
    plan, recording = recorded
    recorded_by_hand.plan().save(plan)
    done = RUNNER.invoke(app, ["explain", str(plan), "--trace", str(recording)])
    assert done.exit_code == 0, done.output
    assert "The plan predicts nothing" in done.output


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "recording is not valid JSON"),
        ("[1]", "recording must be an object"),
        ("{}", "this is not a recording"),
        (None, "there is no recording at"),
    ],
)
def test_bad_recordings_are_refused(
    app: typer.Typer, recorded: tuple[Path, Path], text: str | None, message: str
) -> None:
    plan, recording = recorded
    recording.unlink() if text is None else recording.write_text(text, encoding="utf-8")
    done = RUNNER.invoke(app, ["explain", str(plan), "--trace", str(recording)])
    assert done.exit_code == 2
    assert message in done.output
    assert "recording.json" in done.output
    assert not plan.with_suffix(".html").exists()


def test_a_recording_of_another_plan_is_refused(
    app: typer.Typer, recorded: tuple[Path, Path], plans: tuple[Path, Path]
) -> None:
    done = RUNNER.invoke(app, ["explain", str(plans[0]), "--trace", str(recorded[1])])
    assert done.exit_code == 2
    assert "the recording is of another plan: dp1; stages=1,1; schedule=gpipe" in done.output


def test_traces_without_a_recording_are_refused(
    app: typer.Typer, recorded: tuple[Path, Path], tmp_path: Path
) -> None:
    done = RUNNER.invoke(app, ["explain", str(recorded[0]), "--trace-json", str(tmp_path / "x")])
    assert done.exit_code == 2
    assert "name it with --trace" in done.output
