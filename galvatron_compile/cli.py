"""The command line. Each command lives in a module of ``galvatron_compile.commands``."""

from __future__ import annotations

import typer

from galvatron_compile.commands.compare import compare
from galvatron_compile.commands.emulate import emulate
from galvatron_compile.commands.explain import explain
from galvatron_compile.commands.plan import plan
from galvatron_compile.commands.price import price
from galvatron_compile.commands.profile import profile
from galvatron_compile.commands.validate import validate

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
for command in (plan, price, explain, compare, profile, validate):
    app.command()(command)
app.command(context_settings={"allow_interspersed_args": False})(emulate)  # options of the script


@app.callback()
def main() -> None:
    """Automatic parallel training for PyTorch models."""


if __name__ == "__main__":
    app()
