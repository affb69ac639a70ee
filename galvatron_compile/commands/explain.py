"""``galvatron-compile explain``: a plan as one HTML page, with a recorded step if there is one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from galvatron_compile.commands import is_first_rank, user_errors
from galvatron_compile.errors import PlanError
from galvatron_compile.plans import Plan


def explain(
    plan: Annotated[Path, typer.Argument(help="A saved plan (JSON).", metavar="PLAN.json")],
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="The page [default: the plan's name with .html]."),
    ] = None,
    trace: Annotated[
        Path | None,
        typer.Option(
            help="A recorded step (ParallelModel.profile), to lay beside the prediction.",
            metavar="RECORDING.json",
        ),
    ] = None,
    trace_json: Annotated[
        Path | None, typer.Option(help="With --trace: both timelines for ui.perfetto.dev.")
    ] = None,
    trace_png: Annotated[
        Path | None, typer.Option(help="With --trace: both timelines as a picture.")
    ] = None,
) -> None:
    """Explain a plan in one self-contained HTML page: time, memory, strategies, timeline."""
    with user_errors():
        from galvatron_compile.explain import page

        found = Plan.load(plan)
        if trace is None and (trace_json or trace_png):
            raise PlanError("--trace-json and --trace-png draw a recording; name it with --trace")
        if not is_first_rank():
            return
        if trace is None:
            _write(out or plan.with_suffix(".html"), page(found))
            return
        from galvatron_compile.recordings import Recordings
        from galvatron_compile.trace import Trace

        both = Trace.of(found, Recordings.load(trace))
        _write(out or plan.with_suffix(".html"), page(found, both))
        if trace_json is not None:
            from galvatron_compile.trace_events import to_json

            _write(trace_json, to_json(both))
        if trace_png is not None:
            from galvatron_compile.explain.trace_png import draw

            draw(both, trace_png)
            typer.echo(f"written to {trace_png}")
        if both.missing:
            typer.echo(both.missing, err=True)


def _write(target: Path, text: str) -> None:
    try:
        target.write_text(text, encoding="utf-8")
    except OSError as error:
        raise PlanError(
            f"cannot write {target}: {error.strerror}; choose another place with -o"
        ) from error
    typer.echo(f"written to {target}")
