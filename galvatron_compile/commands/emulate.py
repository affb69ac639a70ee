"""``galvatron-compile emulate``: run a script on emulated nodes with limited links."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import typer

from galvatron_compile.commands import user_errors
from galvatron_compile.emulation_network import EmulationError
from galvatron_compile.errors import PeerError

_UNITS = {"bit": 1.0, "kbit": 1e3, "mbit": 1e6, "gbit": 1e9}


def emulate(
    command: Annotated[
        list[str],
        typer.Argument(
            help="A script and its arguments; with -m after --, a module and its arguments.",
            metavar="SCRIPT.py [ARGUMENT]",
        ),
    ],
    nodes: Annotated[int, typer.Option(help="Number of nodes.")] = 2,
    ranks_per_node: Annotated[int, typer.Option(help="Processes on each node.")] = 1,
    rate: Annotated[
        str | None,
        typer.Option(
            help="Of every node's link, in each direction: 200mbit, 1.5gbit. Default: no limit."
        ),
    ] = None,
    pin: Annotated[
        bool, typer.Option("--pin", help="Keep rank i on core i mod the number of cores.")
    ] = False,
    cpus_per_rank: Annotated[
        float | None,
        typer.Option(
            help="Cores' worth of time for every rank, also while others are idle: 0.5. "
            "Default: no limit."
        ),
    ] = None,
    timeout: Annotated[
        float | None, typer.Option(help="Seconds after which the run is stopped as failed.")
    ] = None,
) -> None:
    """Run a script on several emulated nodes of this machine, as torchrun would on real ones.

    Nodes are Linux network namespaces, joined by links whose rate is limited; ranks of one node
    talk over its loopback, without a limit. Needs root and the package iproute2. Only the rate is
    emulated, not the latency (that would need the kernel's netem). Nodes reach each other and
    nothing else: load data and models from files. Nothing is left behind, however it ends.
    """
    with user_errors():
        from galvatron_compile import emulation

        if not command[0].startswith("-") and not Path(command[0]).is_file():
            raise EmulationError(f"there is no script {command[0]}; give a Python file")
        settings = emulation.EmulatedCluster(
            nodes, ranks_per_node, parse_rate(rate), pin, cpus_per_rank
        )
        with emulation.emulated_cluster(settings) as cluster:
            try:
                cluster.run(command, timeout_s=timeout, on_line=show)
            except PeerError as error:
                typer.echo(f"error: {error}", err=True)
                raise typer.Exit(1) from error


def show(rank: int, stream: str, line: str) -> None:
    typer.echo(f"[{rank}] {line}", err=stream == "stderr")


def parse_rate(text: str | None) -> float | None:
    """Bits a second from ``200mbit`` or ``1.5gbit``; EmulationError for anything else."""
    if text is None:
        return None
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([kmg]?bit)\s*", text, re.IGNORECASE)
    if match is None:
        raise EmulationError(f"expected a rate such as 200mbit or 1.5gbit, got {text!r}")
    return float(match[1]) * _UNITS[match[2].lower()]
