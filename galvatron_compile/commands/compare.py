"""``galvatron-compile compare``: what differs between two plans, and why it matters."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from galvatron_compile.commands import is_first_rank, user_errors
from galvatron_compile.comparison import Comparison
from galvatron_compile.plans import Plan


def compare(
    a: Annotated[Path, typer.Argument(help="A saved plan (JSON).", metavar="A.json")],
    b: Annotated[Path, typer.Argument(help="The plan to set against it.", metavar="B.json")],
) -> None:
    """Say what differs between two plans of one model, and why it matters."""
    with user_errors():
        comparison = Comparison(Plan.load(a), Plan.load(b))
        if is_first_rank():
            show(comparison, Console())


def show(comparison: Comparison, console: Console) -> None:
    """As tables on a terminal, as plain text elsewhere."""
    if not console.is_terminal:
        typer.echo(str(comparison))
        return
    for line in comparison.heads:
        console.print(line, highlight=False, markup=False)
    for note in comparison.notes:
        console.print(note, style="yellow", highlight=False, markup=False)
    console.print()
    console.print(comparison.verdict, style="bold", highlight=False, markup=False)
    for reason in comparison.reasons:
        console.print(f"  • {reason}", highlight=False, markup=False)
    for section in comparison.sections:
        table = Table(
            title=section.title, box=box.SIMPLE_HEAD, title_justify="left", title_style="bold"
        )
        left = comparison.num_text_columns(section)
        for index, head in enumerate(section.columns):
            table.add_column(head, justify="left" if index < left else "right")
        for row in section.rows:
            table.add_row(*row)
        console.print(table)
