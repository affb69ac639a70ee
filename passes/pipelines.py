"""Which pipelines are worth pricing: degrees, micro-batches and schedules.

    pp ──▶ number of micro-batches ──▶ schedule ──▶ virtual stages

As in passes.strategies, a branch is cut where it is impossible or provably no better than one that
stays; what is cut for the caller's sake is a switch.
"""

from __future__ import annotations

from dataclasses import dataclass

from galvatron_compile.constraints import Constraints
from galvatron_compile.passes.pipeline.problem import Family
from galvatron_compile.schedules import why_not

RULES = {
    "pp divides the ranks": "impossible otherwise: stages run on equally many ranks",
    "pp × virtual at most the layers": "impossible otherwise: a stage needs a layer",
    "micro-batches divide the batch": "impossible otherwise: all have equally many samples",
    "gpipe only where 1f1b cannot run": (
        "no better otherwise: with m >= pp both take equally long, and gpipe holds more activations"
    ),
    "one schedule for one stage": "no better otherwise: without stages they are the same",
    "interleaved stages of equal length": (
        "a restriction, as in Megatron-LM: chunks of one group lie far apart, so their boundaries "
        "cannot be searched stage by stage; give stages=… in the notation to price others"
    ),
    "virtual up to 4": (
        "a switch (virtual=…): every doubling halves what is left of the bubble and doubles p2p"
    ),
}
MAX_VIRTUAL = 4


@dataclass(frozen=True)
class Space:
    """num_layers, num_ranks, global_batch_size: of the whole job. max_micro_batches: a switch."""

    num_layers: int
    num_ranks: int
    global_batch_size: int
    max_micro_batches: int | None = None


def families(space: Space, constraints: Constraints) -> list[Family]:
    """Every family that no rule cuts, small pipelines first."""
    found: list[Family] = []
    most = space.max_micro_batches or space.global_batch_size
    counts = constraints.choose("micro", _divisors(space.global_batch_size, most))
    for pp in constraints.choose("pp", _divisors(space.num_ranks, space.num_layers)):
        virtuals = constraints.choose("virtual", range(1, space.num_layers // pp + 1))
        virtuals = [v for v in virtuals if v <= MAX_VIRTUAL or constraints.names("virtual", v)]
        for count in counts:
            for schedule in ("1f1b", "gpipe", "interleaved", "zero-bubble"):
                found += [
                    Family(pp, count, schedule, virtual)
                    for virtual in (virtuals if schedule == "interleaved" else [1])
                    if _wanted(pp, count, schedule, virtual, constraints)
                ]
    return found


def _wanted(pp: int, count: int, schedule: str, virtual: int, constraints: Constraints) -> bool:
    if not constraints.allows("virtual", virtual) or why_not(schedule, pp, count, virtual):
        return False
    if pp == 1:  # without stages there is no schedule, so none that was asked for either
        return schedule == "1f1b" and constraints.allows("schedule", "1f1b")
    if not constraints.allows("schedule", schedule):
        return False
    replaced = constraints.allows("schedule", "1f1b") and why_not("1f1b", pp, count) is None
    return schedule != "gpipe" or not replaced


def _divisors(number: int, limit: int) -> list[int]:
    return [degree for degree in range(1, min(number, limit) + 1) if number % degree == 0]
