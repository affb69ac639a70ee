"""``galvatron-compile plan``: the fastest plan for a model on a cluster, without GPU or weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from galvatron_compile.commands import user_errors
from galvatron_compile.errors import PlanError

MODEL_HELP = (
    "llama3-70b and other built-in names, a Hugging Face config.json or its folder, or "
    "package.module:callable that returns (module, example inputs)."
)
CLUSTER_HELP = "A preset such as 128x8xH100 (nodes x GPUs x GPU), or a profile's file."
MEMORY_HELP = (
    "Limit of a rank, for example 76GiB, the framework's reserve included "
    "(default: the device's memory). With --from-galvatron: the device's memory, of which its "
    "formulas keep a fifth back where it is more than 20 GiB."
)


def plan(
    model: Annotated[str | None, typer.Argument(help=MODEL_HELP)] = None,
    cluster: Annotated[str | None, typer.Option(help=CLUSTER_HELP)] = None,
    global_batch: Annotated[
        int | None, typer.Option(min=1, help="Samples of one optimizer step over all ranks.")
    ] = None,
    seq: Annotated[int | None, typer.Option(min=1, help="Tokens of a sample.")] = None,
    memory: Annotated[str | None, typer.Option(help=MEMORY_HELP)] = None,
    constraints: Annotated[
        str,
        typer.Option(
            "--where", help='What must hold, e.g. "pp=4; tp<=8; zero!=3; together=0-3".'
        ),
    ] = "",
    notation: Annotated[
        str | None, typer.Option(help="Price this plan (compact notation) instead of searching.")
    ] = None,
    precision: Annotated[str, typer.Option(help="bf16 (fp32 masters) or fp32.")] = "bf16",
    top: Annotated[int, typer.Option(min=1, max=50, help="Plans to show, the best included.")] = 5,
    keep: Annotated[
        list[str] | None,
        typer.Option(help="A pruning rule to switch off, e.g. one-user-of-heads; repeatable."),
    ] = None,
    certify: Annotated[
        bool, typer.Option("--certify", help="Check the answer against an independent MILP.")
    ] = False,
    curve: Annotated[
        bool, typer.Option("--curve", help="Also search at other memory limits, for explain.")
    ] = False,
    out: Annotated[Path | None, typer.Option(help="Write the plan as JSON, for explain.")] = None,
    from_galvatron: Annotated[
        Path | None, typer.Option(help="A folder of Galvatron's profiles, and its formulas.")
    ] = None,
    gpus: Annotated[int | None, typer.Option(min=1, help="With --from-galvatron.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Find the fastest plan for MODEL on a cluster, and say why it is the fastest."""
    with user_errors():
        memory_bytes = None if memory is None else _bytes(memory)
        if from_galvatron is not None:
            given = {
                "MODEL": model, "--cluster": cluster, "--where": constraints, "--keep": keep,
                "--notation": notation, "--certify": certify, "--curve": curve,
            }  # fmt: skip
            _refuse("--from-galvatron", given, "Galvatron's formulas have their own space")
            _plan_on_galvatron(
                from_galvatron, gpus, seq, global_batch, memory_bytes, top, out, as_json
            )
            return
        needed = {"MODEL": model, "--cluster": cluster, "--global-batch": global_batch}
        missing = [name for name, value in needed.items() if value is None]
        if missing:
            raise PlanError(
                f"plan needs {' and '.join(missing)}, for example: galvatron-compile plan "
                "llama3-70b --cluster 128x8xH100 --global-batch 2048 --seq 8192"
            )
        from galvatron_compile import planning
        from galvatron_compile.planned import describe

        settings: dict[str, Any] = {
            "global_batch_size": global_batch,
            "seq": seq,
            "memory_bytes": memory_bytes,
            "precision": precision,
            "say": _say,
        }
        if notation is not None:
            given = {
                "--where": constraints, "--keep": keep, "--certify": certify, "--curve": curve
            }  # fmt: skip
            _refuse("--notation", given, "a given plan is priced, not searched")
            priced = planning.price(notation, str(model), load_cluster(str(cluster)), **settings)
            _write(priced.to_json(), out)
            typer.echo(priced.to_json() if as_json else describe(priced))
            return
        found = planning.plan(
            str(model), load_cluster(str(cluster)), constraints=constraints, top=top,
            keep=tuple(keep or ()), curve=curve, certify=certify, **settings,
        )  # fmt: skip
        _write(found.plan.to_json(), out)
        typer.echo(json.dumps(found.to_dict(), indent=1) if as_json else str(found))
        if out is not None:
            typer.echo(f"plan written to {out}; galvatron-compile explain {out} draws it", err=True)


def _refuse(option: str, given: dict[str, Any], why: str) -> None:
    """PlanError for options that ``option`` would leave without effect."""
    idle = [name for name, value in given.items() if value]
    if idle:
        raise PlanError(f"{', '.join(idle)} mean nothing with {option}: {why}; leave them out")


def _plan_on_galvatron(
    directory: Path,
    gpus: int | None,
    seq: int | None,
    global_batch: int | None,
    memory_bytes: int | None,
    top: int,
    out: Path | None,
    as_json: bool,
) -> None:
    from galvatron_compile.galvatron import text
    from galvatron_compile.galvatron.report import plan_from_galvatron

    shown = None if as_json else top  # programs get all alternatives, people the nearest

    if gpus is None or seq is None or global_batch is None:
        raise PlanError("--from-galvatron needs --gpus, --seq and --global-batch too")
    record = plan_from_galvatron(directory, gpus, seq, global_batch, memory_bytes, top=shown)
    _write(json.dumps(record["plan"], indent=1) + "\n", out)
    typer.echo(json.dumps(record, indent=1) if as_json else text.describe_plan(record))


def load_cluster(text: str) -> Any:
    """A profile from its file, else a preset."""
    from galvatron_compile.cluster import ClusterProfile

    path = Path(text)
    if path.suffix == ".json" or path.is_file():
        return ClusterProfile.load(path)
    return ClusterProfile.preset(text)


def _bytes(text: str) -> int:
    from galvatron_compile.commands.price import parse_bytes

    return parse_bytes(text)


def _say(text: str) -> None:
    typer.echo(f"… {text}", err=True)


def _write(text: str, out: Path | None) -> None:
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(text, encoding="utf-8")
