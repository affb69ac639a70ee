"""``galvatron-compile profile``: measure this machine or the current torchrun job."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from galvatron_compile.cluster import ClusterProfile
from galvatron_compile.cluster_text import Section, headline, sections, sources, warning
from galvatron_compile.commands import is_first_rank, user_errors

DEFAULT_OUT = Path("cluster.json")


def profile(
    out: Annotated[
        Path | None,
        typer.Option(help="Where to write the profile; when measuring, cluster.json if not given."),
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Fewer and smaller sizes.")] = False,
    preset: Annotated[
        str | None,
        typer.Option(help="Show this preset (8xH100, 4x8xA100-80GB, …) instead of measuring."),
    ] = None,
) -> None:
    """Measure this machine (or, under torchrun, all ranks at once) as a cluster profile."""
    with user_errors():
        if preset is not None:
            found = ClusterProfile.preset(preset)
        else:
            found = _measured(quick)
            out = out or DEFAULT_OUT
        if not is_first_rank():
            return
        show(found, Console())
        if out is not None:
            found.save(out)
            typer.echo(f"written to {out}")


def show(found: ClusterProfile, console: Console) -> None:
    """The profile as tables, defaults announced in red."""
    if not console.is_terminal:
        console.width = max(console.width, 110)  # a log or a pipe has no width to respect
    if warning(found):
        console.print(f"[bold red]{warning(found)}[/]")
    console.print(headline(found), highlight=False, markup=False)
    for section in sections(found):
        console.print(_table(section))
    console.print(_table(sources(found), numbers=False))


def _measured(quick: bool) -> ClusterProfile:
    from galvatron_compile.profiling import measure  # imports torch: not for --preset or --help

    bar = Progress(
        TextColumn("{task.description:<32}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=Console(stderr=True),
        disable=not is_first_rank(),
    )
    with bar:
        task = bar.add_task("starting", total=None)

        def progress(done: int, total: int, what: str) -> None:
            bar.update(task, completed=done, total=total, description=what)

        return measure(progress, quick)


def _table(section: Section, numbers: bool = True) -> Table:
    table = Table(title=section.title, box=box.SIMPLE_HEAD, title_justify="left")
    for column in section.columns:
        table.add_column(column, justify="right" if numbers else "left", no_wrap=numbers)
    for row in section.rows:
        table.add_row(*row)
    return table
