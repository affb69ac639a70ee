"""``galvatron-compile price``: what a given plan costs, without searching."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from galvatron_compile.commands import user_errors
from galvatron_compile.errors import PlanError, UnsupportedError
from galvatron_compile.galvatron.pricing import MEMORY_HELP

if TYPE_CHECKING:
    from galvatron_compile.galvatron.formulas import Workload
    from galvatron_compile.plans import Plan

_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def price(
    plan: Annotated[
        str,
        typer.Argument(
            help="A plan: a file of ours or of Galvatron's, or the compact notation in quotes."
        ),
    ],
    model: Annotated[
        str | None, typer.Option(help="The model that the plan is for, as plan takes it.")
    ] = None,
    cluster: Annotated[
        str | None, typer.Option(help="A preset such as 8xH100, or a profile's file.")
    ] = None,
    from_galvatron: Annotated[
        Path | None,
        typer.Option(help="Folder with Galvatron's profiles; its formulas give the price."),
    ] = None,
    gpus: Annotated[int | None, typer.Option(min=1, help="Number of GPUs.")] = None,
    seq: Annotated[int | None, typer.Option(min=1, help="Sequence length.")] = None,
    global_batch: Annotated[
        int | None, typer.Option(min=1, help="Samples of one optimizer step.")
    ] = None,
    memory: Annotated[str | None, typer.Option(help=MEMORY_HELP)] = None,
    precision: Annotated[str, typer.Option(help="bf16 (fp32 masters) or fp32.")] = "bf16",
    layers: Annotated[
        int | None, typer.Option(min=1, help="Layers of a model whose name is not known.")
    ] = None,
    hidden: Annotated[
        int | None, typer.Option(min=1, help="Hidden size of a model whose name is not known.")
    ] = None,
    exact_bytes: Annotated[
        bool, typer.Option("--exact-bytes", help="Do not round sizes to MiB as Galvatron does.")
    ] = False,
    write_galvatron: Annotated[
        Path | None, typer.Option(help="Also write the plan as a plan file of Galvatron's.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Price a plan: step time by cause, and memory of every stage against the limit."""
    with user_errors():
        from galvatron_compile.planned import describe

        memory_bytes = None if memory is None else parse_bytes(memory)
        if from_galvatron is None:
            priced = price_on_cluster(
                plan, model, cluster, seq, global_batch, memory_bytes, precision
            )
            if write_galvatron is not None:
                from galvatron_compile.galvatron import plans as galvatron_plans

                galvatron_plans.save(priced, write_galvatron)
            typer.echo(priced.to_json() if as_json else describe(priced))
            return
        needed = {"--gpus": gpus, "--seq": seq, "--global-batch": global_batch}
        missing = [name for name, value in needed.items() if value is None]
        if gpus is None or seq is None or global_batch is None:
            raise UnsupportedError(f"--from-galvatron needs {', '.join(missing)} too")
        from galvatron_compile.galvatron import plans, text
        from galvatron_compile.galvatron import report as reports
        from galvatron_compile.galvatron.pricing import price as price_by_formulas

        work = reports.workload(from_galvatron, gpus, seq, global_batch, layers, hidden)
        limit = reports.memory_limit(work.profile, memory_bytes, exact_bytes)
        given = read_plan(plan, work)
        record = reports.price_record(work, given, price_by_formulas(work, given), limit)
        if write_galvatron is not None:
            plans.save(given, write_galvatron)
        typer.echo(json.dumps(record, indent=1) if as_json else text.describe_price(record))


def price_on_cluster(
    plan: str,
    model: str | None,
    cluster: str | None,
    seq: int | None,
    global_batch: int | None,
    memory_bytes: int | None,
    precision: str,
) -> Plan:
    """A plan of either format, or the compact notation, by our own cost model."""
    needed = {"--model": model, "--cluster": cluster, "--global-batch": global_batch}
    missing = [name for name, value in needed.items() if value is None]
    if model is None or cluster is None or global_batch is None:
        raise PlanError(
            f"price needs {' and '.join(missing)} (or --from-galvatron DIR), for example: "
            "galvatron-compile price plan.json --model llama3-8b --cluster 8xH100 "
            "--global-batch 64"
        )
    from galvatron_compile import planning
    from galvatron_compile.commands.plan import load_cluster

    profile = load_cluster(cluster)
    return planning.price(
        given_plan(plan, profile.world_size),
        model,
        profile,
        global_batch_size=global_batch,
        seq=seq,
        memory_bytes=memory_bytes,
        precision=precision,
        say=lambda text: typer.echo(f"… {text}", err=True),
    )


def given_plan(text: str, num_ranks: int) -> Plan | str:
    """The plan in a file of either format, else the text itself: the compact notation."""
    from galvatron_compile.galvatron import plans
    from galvatron_compile.plans import Plan

    path = Path(text)
    if not _is_file(path):
        if path.suffix == ".json":
            raise PlanError(f"there is no plan at {path}; give a file or the compact notation")
        return text
    content = path.read_text(encoding="utf-8")
    if plans.is_galvatron(content):
        return plans.load(path, num_ranks)
    return Plan.load(path) if content.lstrip().startswith("{") else content.strip()


def read_plan(text: str, work: Workload) -> Plan:
    """A plan of ours or of Galvatron's from a file, or the compact notation."""
    from galvatron_compile import notation
    from galvatron_compile.galvatron import plans
    from galvatron_compile.plans import Plan

    path = Path(text)
    names = plans.layer_names(work.num_layers)
    if not _is_file(path):
        if path.suffix == ".json":
            raise PlanError(f"there is no plan at {path}; give a file or the compact notation")
        return notation.parse(text, names, work.num_gpus, work.global_batch_size)
    try:
        content = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise PlanError(f"{path}: plan is not UTF-8 text (byte {error.start})") from error
    if plans.is_galvatron(content):
        return plans.load(path, work.num_gpus)
    if content.lstrip().startswith("{"):
        return Plan.load(path)
    return notation.parse(content, names, work.num_gpus, work.global_batch_size)


def parse_bytes(text: str) -> int:
    """``36GiB``, ``512MiB``, ``80GB`` (10**9) or plain bytes. PlanError for anything else."""
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([KMGT]?)(i?)B?\s*", text, re.IGNORECASE)
    if match is None or (match[3] and not match[2]):
        raise PlanError(f"expected an amount of memory such as 36GiB, got {text!r}")
    unit = _UNITS[match[2].upper()]
    if not match[3] and unit > 1:
        unit = 1000 ** (["", "K", "M", "G", "T"].index(match[2].upper()))
    return int(float(match[1]) * unit)


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a long notation is no file name
        return False
