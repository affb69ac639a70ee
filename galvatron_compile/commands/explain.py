"""``galvatron-compile explain``: a plan as one HTML page."""

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
) -> None:
    """Explain a plan in one self-contained HTML page: time, memory, strategies, timeline."""
    with user_errors():
        from galvatron_compile.explain import page

        found = Plan.load(plan)
        target = out or plan.with_suffix(".html")
        if not is_first_rank():
            return
        html = page(found)
        try:
            target.write_text(html, encoding="utf-8")
        except OSError as error:
            raise PlanError(
                f"cannot write {target}: {error.strerror}; choose another place with -o"
            ) from error
        typer.echo(f"written to {target}")
