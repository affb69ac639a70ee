"""The decision tree of strategies: which ways to run a layer are worth pricing.

    tp ──▶ sequence parallel? ──▶ ulysses, cp ──▶ ep ──▶ ZeRO stage ──▶ recompute

dp is not a choice: a layer uses all ranks of its stage, so dp = ranks / (tp · ulysses · cp). A
branch is cut where a rule below proves that it is impossible, or no better than another, or where
the caller does not want it; nothing is cut because it looks slow, since only the cost table knows
the cluster. Rules that are not proofs are switches, with the default and its reason.

Deliberately kept, because neither side always wins: ZeRO-1 beside ZeRO-0 (equal bytes on the wire,
but ZeRO-1's gather of updated parameters hides behind nothing), ZeRO-2 beside ZeRO-1 (less memory,
but a reduction in every micro-batch), sequence parallel beside plain tensor parallel (less memory,
equal bytes, but twice as many collectives).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

from galvatron_compile.errors import PlanError, ShapeError
from galvatron_compile.strategy import Recompute, Strategy


@dataclass(frozen=True)
class Limits:
    """What the enumeration may use, on the ranks of one stage. max_…: None for no limit.

    num_micro_batches: if known, branches that only it rules out are cut too.
    experts: numbers of experts of the model's mixtures; none: expert parallel is not offered.
    keep: names of rules of the kind "switch" that are not to cut anything.
    """

    world_size: int
    global_batch_size: int | None = None
    num_micro_batches: int | None = None
    max_tp: int | None = None
    sequence_parallel: bool = True
    max_ulysses: int | None = 1
    max_cp: int | None = 1
    experts: tuple[int, ...] = ()
    zero_stages: tuple[int, ...] = (0, 1, 2, 3)
    recompute: tuple[Recompute, ...] = ("none", "full")
    keep: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        switches = [rule.name for rule in RULES if rule.kind == "switch"]
        for name in self.keep:
            if name not in switches:
                raise PlanError(
                    f"{name!r} is no rule that can be switched off; these can: "
                    f"{', '.join(switches)}"
                )


class Branch(NamedTuple):
    """A strategy without its recompute."""

    tp: int
    dp: int
    sp: bool
    ulysses: int
    cp: int
    ep: int
    zero: int

    @property
    def data_ranks(self) -> int:
        return self.dp * self.ulysses * self.cp


@dataclass(frozen=True)
class Pruning:
    """A rule that cuts a branch. kind: "impossible", "no better" than a branch that stays (the
    reason is the proof), or a "switch" of the caller's."""

    name: str
    kind: Literal["impossible", "no better", "switch"]
    reason: str
    cuts: Callable[[Limits, Branch], bool]


def _over(limit: int | None, degree: int) -> bool:
    return limit is not None and degree > limit


RULES = (
    Pruning(
        "degrees-divide-world",
        "impossible",
        "groups of ranks have equal size, so tp × ulysses × cp divides the number of ranks",
        lambda limits, b: b.tp * b.data_ranks != limits.world_size,
    ),
    Pruning(
        "tp-within-limit",
        "switch",
        "tensor-parallel collectives are not hidden behind computation; a caller may keep their "
        "groups within max_tp ranks",
        lambda limits, b: _over(limits.max_tp, b.tp),
    ),
    Pruning(
        "sequence-within-limit",
        "switch",
        "the caller limits ulysses and cp (the runtime executes neither yet: the default is 1)",
        lambda limits, b: _over(limits.max_ulysses, b.ulysses) or _over(limits.max_cp, b.cp),
    ),
    Pruning(
        "dp-divides-batch",
        "impossible",
        "every data-parallel rank gets equally many samples, so dp divides the global batch",
        lambda limits, b: (
            limits.global_batch_size is not None
            and limits.global_batch_size % (b.dp * (limits.num_micro_batches or 1)) != 0
        ),
    ),
    Pruning(
        "sp-needs-tp",
        "no better",
        "sequence parallel shards over the tensor-parallel ranks; with tp 1 it changes nothing",
        lambda limits, b: b.sp and b.tp == 1,
    ),
    Pruning(
        "sequence-only-when-samples-run-out",
        "switch",
        "where the samples of a micro-batch still divide over cp × ulysses × dp ranks, giving "
        "them whole samples computes, stores and synchronises as much without any exchange in "
        "attention; what this gives up is a cheaper change of layout next to a layer that has to "
        "divide sequences",
        lambda limits, b: (
            limits.global_batch_size is not None
            and b.ulysses * b.cp > 1
            and limits.global_batch_size % ((limits.num_micro_batches or 1) * b.data_ranks) == 0
        ),
    ),
    Pruning(
        "one-user-of-heads",
        "switch",
        "tp and ulysses both divide the heads and send activations around attention; usually one "
        "of them does it better alone",
        lambda limits, b: b.tp > 1 and b.ulysses > 1,
    ),
    Pruning(
        "ep-divides-experts",
        "impossible",
        "every rank of an expert-parallel group holds equally many experts",
        lambda limits, b: b.ep > 1 and all(number % b.ep for number in limits.experts),
    ),
    Pruning(
        "ep-divides-data-ranks",
        "impossible",
        "expert-parallel groups are made of data ranks",
        lambda limits, b: b.data_ranks % b.ep != 0,
    ),
    Pruning(
        "zero-needs-dp",
        "no better",
        "ZeRO shards states over the data ranks; with one of them every stage is stage 0",
        lambda limits, b: b.zero > 0 and b.data_ranks == 1,
    ),
    Pruning(
        "zero-not-wanted",
        "switch",
        "the caller restricts the ZeRO stages; with one data rank there is nothing to restrict",
        lambda limits, b: b.data_ranks > 1 and b.zero not in limits.zero_stages,
    ),
)


def enumerate_within(limits: Limits) -> tuple[Strategy, ...]:
    """Every strategy that no rule cuts, fewest tensor ranks first; may be empty."""
    return tuple(
        Strategy(b.tp, b.dp, b.sp, b.zero, again, b.ulysses, b.cp, b.ep)
        for b in _leaves(limits)
        for again in limits.recompute
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
    """Every strategy that the runtime executes on ``world_size`` ranks and no rule cuts.

    Raises ShapeError if no strategy is left, which happens where no allowed dp divides the batch.
    """
    limits = Limits(
        world_size,
        global_batch_size,
        max_tp=max_tp,
        sequence_parallel=sequence_parallel,
        zero_stages=tuple(zero_stages),
        recompute=("none", "full") if recompute else ("none",),
    )
    strategies = enumerate_within(limits)
    if not strategies:
        within = "" if max_tp is None else f" with tp of at most {max_tp}"
        rule = next(rule for rule in RULES if rule.name == "dp-divides-batch")
        raise ShapeError(
            f"no strategy{within} splits a global batch of {global_batch_size} over {world_size} "
            f"ranks: {rule.reason}; use a multiple of {_least_dp(world_size, max_tp)}"
        )
    return strategies


def _leaves(limits: Limits) -> Iterator[Branch]:
    ranks = limits.world_size
    rules = [rule for rule in RULES if rule.name not in limits.keep]
    experts = {d for number in limits.experts for d in _divisors(number)}
    for tp in _divisors(ranks):
        for sp in (False, True) if limits.sequence_parallel else (False,):
            for ulysses in _divisors(ranks // tp, limits.max_ulysses):
                for cp in _divisors(ranks // (tp * ulysses), limits.max_cp):
                    dp = ranks // (tp * ulysses * cp)
                    for ep in sorted(experts | {1}):
                        for zero in (0, 1, 2, 3):
                            branch = Branch(tp, dp, sp, ulysses, cp, ep, zero)
                            if not any(rule.cuts(limits, branch) for rule in rules):
                                yield branch


def _divisors(number: int, limit: int | None = None) -> list[int]:
    top = number if limit is None else min(number, limit)
    return [degree for degree in range(1, top + 1) if number % degree == 0]


def _least_dp(world_size: int, max_tp: int | None) -> int:
    most = world_size if max_tp is None else max_tp
    return min(world_size // tp for tp in range(1, most + 1) if world_size % tp == 0)
