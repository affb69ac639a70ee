"""``galvatron-compile validate``: predictions held against a table of measured runs."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated

import typer

from galvatron_compile.commands import user_errors
from galvatron_compile.errors import PlanError
from galvatron_compile.validation import Prediction, Run, read_table, report


def validate(
    table: Annotated[
        Path, typer.Argument(help="CSV of measured runs, columns as in measured_runs.csv.")
    ],
    plot: Annotated[
        Path | None, typer.Option(help="Draw predicted against measured to this file (.png, …).")
    ] = None,
    cluster_override: Annotated[
        list[str] | None,
        typer.Option(
            help="GPU=PROFILE: the measured profile (a file) to use for a GPU of the table, "
            "instead of its preset; may be given several times."
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")] = False,
) -> None:
    """Predict every run of TABLE and say how far off that is, by source and over all."""
    with user_errors():
        runs = read_table(table)
        predict, calibrated_on = predictor(table, overrides(cluster_override or [], runs))
        found = report(runs, predict, calibrated_on)
        if plot is not None:
            from galvatron_compile.validation.plot import plot as draw_to

            draw_to(found.pairs, plot)
        typer.echo(json.dumps(found.to_dict(), indent=1) if as_json else str(found))
        if plot is not None and not as_json:
            typer.echo(f"\nwritten to {plot}")


def predictor(
    table: Path, clusters: Mapping[str, Path]
) -> tuple[Callable[[Run], Prediction], Callable[[Run], bool] | None]:
    """What predicts a run, and which runs its constants were calibrated on.

    table: the file of the runs; measurements of its hardware may lie beside it.
    clusters: profiles' files by the GPU's name in the table.
    """
    from galvatron_compile.validation.predict import Predictor
    from galvatron_compile.validation.software import calibrated_on

    found = Predictor(table)
    return lambda run: found.predict(run, clusters.get(run.gpu)), calibrated_on


def overrides(texts: list[str], runs: tuple[Run, ...]) -> dict[str, Path]:
    """``GPU=PROFILE`` taken apart. PlanError for a GPU that is not in the table."""
    gpus = sorted({run.gpu for run in runs})
    found: dict[str, Path] = {}
    for text in texts:
        gpu, separator, file = text.partition("=")
        if not separator or not file:
            raise PlanError(f"--cluster-override must read GPU=PROFILE, got {text!r}")
        if gpu not in gpus:
            raise PlanError(f"the table has no GPU {gpu!r} to override; it has {', '.join(gpus)}")
        if not Path(file).is_file():
            raise PlanError(f"there is no profile {file}; make one with galvatron-compile profile")
        found[gpu] = Path(file)
    return found
