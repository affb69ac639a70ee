"""The commands of ``galvatron-compile``, one module each; ``galvatron_compile.cli`` lists them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import typer

from galvatron_compile.errors import GalvatronError


def is_first_rank() -> bool:
    """Whether this process does the talking: rank 0 of a torchrun job, or a lone process."""
    return os.environ.get("RANK", "0") == "0"


@contextmanager
def user_errors() -> Iterator[None]:
    """Show what a user can mend as one message without a traceback, and exit with status 2."""
    try:
        yield
    except GalvatronError as error:
        if is_first_rank():
            typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from error
