"""``galvatron-compile profile``: what its help says."""

from __future__ import annotations

import typer
from typer.testing import CliRunner

from galvatron_compile.commands.profile import profile


def test_help_says_where_the_profile_goes() -> None:
    """Rich takes square brackets in a help text for markup, and drops them."""
    app = typer.Typer()
    app.command()(profile)
    result = CliRunner().invoke(app, ["--help"], env={"COLUMNS": "200"})
    assert result.exit_code == 0
    (line,) = [line for line in result.output.splitlines() if "--out" in line]
    assert "cluster.json" in line
