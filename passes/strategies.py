"""The decision tree of strategies: which ways to run a layer are worth pricing.

    tp ──▶ sequence parallel? ──▶ ZeRO stage ──▶ recompute?

dp is not a choice: a layer uses all ranks, so dp = ranks / tp. A branch is cut where a rule below
proves that it is impossible, or the same as another; nothing is cut because it looks slow, since
only the cost table knows the cluster.

Deliberately kept, because neither side always wins: ZeRO-1 beside ZeRO-0 (equal bytes on the wire,
but ZeRO-1's gather of updated parameters hides behind nothing), ZeRO-2 beside ZeRO-1 (less memory,
but a reduction in every micro-batch), sequence parallel beside plain tensor parallel (less memory,
equal bytes, but twice as many collectives).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass

from galvatron_compile.errors import ShapeError
from galvatron_compile.strategy import Recompute, Strategy


@dataclass(frozen=True)
class Limits:
    """What the enumeration may use. max_tp: None for no limit."""

    world_size: int
    global_batch_size: int | None = None
    max_tp: int | None = None
    sequence_parallel: bool = True
    zero_stages: tuple[int, ...] = (0, 1, 2, 3)
    recompute: bool = True


@dataclass(frozen=True)
class Pruning:
    """A rule that cuts a branch: ``cuts(limits, tp, dp, sequence_parallel, zero)``."""

    name: str
    reason: str
    cuts: Callable[[Limits, int, int, bool, int], bool]


RECOMPUTE_RUN: tuple[Recompute, ...] = ("none", "full")  # "selective" is planned, not run yet

RULES = (
    Pruning(
        "tp-divides-world",
        "tensor-parallel groups have equal size, so tp divides the number of ranks",
        lambda limits, tp, dp, sp, zero: tp * dp != limits.world_size,
    ),
    Pruning(
        "tp-within-limit",
        "tensor-parallel collectives are not hidden behind computation, so their groups stay "
        "within max_tp ranks (those of one node)",
        lambda limits, tp, dp, sp, zero: limits.max_tp is not None and tp > limits.max_tp,
    ),
    Pruning(
        "dp-divides-batch",
        "every data-parallel rank gets equally many samples, so dp divides the global batch",
        lambda limits, tp, dp, sp, zero: (
            limits.global_batch_size is not None and limits.global_batch_size % dp != 0
        ),
    ),
    Pruning(
        "sp-needs-tp",
        "sequence parallel shards over the tensor-parallel ranks; with tp 1 it changes nothing",
        lambda limits, tp, dp, sp, zero: sp and tp == 1,
    ),
    Pruning(
        "zero-needs-dp",
        "ZeRO shards states over the data-parallel ranks; with dp 1 every stage is stage 0",
        lambda limits, tp, dp, sp, zero: zero > 0 and dp == 1,
    ),
    Pruning(
        "zero-not-wanted",
        "the caller restricts the ZeRO stages; with dp 1 there is nothing to restrict",
        lambda limits, tp, dp, sp, zero: dp > 1 and zero not in limits.zero_stages,
    ),
)


def enumerate_strategies(
    world_size: int,
    *,
    global_batch_size: int | None = None,
    max_tp: int | None = None,
    sequence_parallel: bool = True,
    zero_stages: Collection[int] = (0, 1, 2, 3),
    recompute: bool = True,
) -> tuple[Strategy, ...]:
    """Every strategy on ``world_size`` ranks that no rule cuts, fewest tensor ranks first.

    Raises ShapeError if no strategy is left, which happens where no allowed dp divides the batch.
    """
    stages = tuple(zero_stages)
    limits = Limits(world_size, global_batch_size, max_tp, sequence_parallel, stages, recompute)
    strategies = tuple(
        Strategy(tp, dp, sp, zero, again)
        for tp, dp, sp, zero in _leaves(limits)
        for again in RECOMPUTE_RUN[: 1 + recompute]
    )
    if not strategies:
        within = "" if max_tp is None else f" with tp of at most {max_tp}"
        raise ShapeError(
            f"no strategy{within} splits a global batch of {global_batch_size} over {world_size} "
            f"ranks: {RULES[2].reason}; use a multiple of {_least_dp(world_size, max_tp)}"
        )
    return strategies


def _leaves(limits: Limits) -> Iterator[tuple[int, int, bool, int]]:
    for tp in range(1, limits.world_size + 1):
        dp = limits.world_size // tp
        for sp in (False, True) if limits.sequence_parallel else (False,):
            for zero in (0, 1, 2, 3):
                if not any(rule.cuts(limits, tp, dp, sp, zero) for rule in RULES):
                    yield tp, dp, sp, zero


def _least_dp(world_size: int, max_tp: int | None) -> int:
    most = world_size if max_tp is None else max_tp
    return min(world_size // tp for tp in range(1, most + 1) if world_size % tp == 0)
