"""Galvatron's space of plans, priced: what :mod:`.search` chooses from.

Pipeline degrees and all other degrees are powers of two, stages are cut evenly (the last takes the
rest). A layer has tensor parallelism with sequence parallelism or Ulysses, ZeRO-2 or ZeRO-3 over
data parallelism, recomputation or not; embedding and head share one such setting. Left out, with
the reason:

- DDP: as fast as ZeRO-2 by the formulas and larger, so no optimum needs it;
- GPipe: as fast as 1F1B by the formulas and never smaller;
- ZeRO over Ulysses ranks alone (dp 1): Galvatron does not enumerate it;
- context parallelism: the formulas have no term for it;
- splits that do not divide the global batch: the formulas would drop samples;
- degrees that the profile has no measurement of (listed in :attr:`Space.left_out`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

from galvatron_compile.errors import ProfileError
from galvatron_compile.galvatron.formulas import (
    CONTEXT_MB,
    Workload,
    buffer_mb,
    end_memory,
    end_times,
    layer_memory,
    layer_time,
)
from galvatron_compile.galvatron.pricing import MemoryLimit, in_flight
from galvatron_compile.strategy import Strategy

PS_PER_MS = 10**9


def whole_ps(time_ms: float) -> int:
    """Whole picoseconds: sums of them are exact, and a plan's total is right to 1e-7 ms."""
    return round(time_ms * PS_PER_MS)


@dataclass(frozen=True)
class Ends:
    """A setting of embedding and head. time_ps, units: by stage, the framework's memory too."""

    strategy: Strategy
    time_ps: tuple[int, ...]
    units: tuple[int, ...]


@dataclass(frozen=True)
class Family:
    """What is fixed before layers choose: embedding and head, and the largest degree allowed.

    degree: the largest tp or Ulysses degree, which sizes the buffer of tensor parallelism; None
    for plans of Ulysses only, which have no such buffer. allowed: indices of strategies.
    """

    ends: Ends
    degree: int | None
    allowed: tuple[int, ...]
    buffer_units: int


@dataclass(frozen=True)
class Space:
    """All plans of one pipeline degree and number of micro-batches, priced.

    strategies: of layers; unsynchronised_ps, synchronised_ps: their times; units: [stage]
    [strategy] memory in the limit's units, rounded up. left_out: strategies without measurement.
    """

    pp: int
    chunks: int
    lengths: tuple[int, ...]
    strategies: tuple[Strategy, ...]
    unsynchronised_ps: tuple[int, ...]
    synchronised_ps: tuple[int, ...]
    units: tuple[tuple[int, ...], ...]
    ends: tuple[Ends, ...]
    buffers: tuple[tuple[int, int], ...]
    left_out: tuple[str, ...]

    @cached_property
    def families(self) -> tuple[Family, ...]:
        return tuple(self._families())

    def _families(self) -> Iterator[Family]:
        settings: list[tuple[int | None, int]] = [(None, 0), *self.buffers]
        for degree, units in settings:
            allowed = tuple(i for i, s in enumerate(self.strategies) if _admits(degree, s))
            for ends in self.ends:
                if allowed and _admits(degree, ends.strategy):
                    yield Family(ends, degree, allowed, units)


def _admits(degree: int | None, strategy: Strategy) -> bool:
    """Galvatron filters by the larger of the two degrees, so that a buffer admits both kinds."""
    if degree is None:
        return strategy.tp == 1
    return max(strategy.tp, strategy.ulysses) <= degree


def spaces(work: Workload, limit: MemoryLimit) -> list[Space]:
    """One for every pipeline degree and number of micro-batches that fills it."""
    found = []
    for chunks in range(1, work.global_batch_size + 1):
        if work.global_batch_size % chunks:
            continue
        for pp in powers(min(work.num_gpus, work.num_layers, chunks)):
            if work.num_gpus % pp == 0:
                found.append(space(work, limit, pp, chunks))
    return found


def space(work: Workload, limit: MemoryLimit, pp: int, chunks: int) -> Space:
    alive = in_flight("1f1b", pp, chunks)
    strategies, times, units, ends, left_out = [], [], [], [], []
    for strategy in enumerate_strategies(work, pp, chunks):
        try:
            time = layer_time(work, strategy, pp, chunks)
            sizes = [sum(layer_memory(work, strategy, chunks, n)) for n in alive]
        except ProfileError as error:
            left_out.append(f"{strategy}: {error}")
            continue
        strategies.append(strategy)
        times.append(time)
        units.append([limit.units(size) for size in sizes])
        if strategy.recompute == "none":
            try:
                ends.append(_ends(work, limit, strategy, pp, chunks, alive))
            except ProfileError as error:
                left_out.append(f"embedding and head {strategy}: {error}")
    degrees = sorted({max(s.tp, s.ulysses) for s in strategies})
    return Space(
        pp=pp,
        chunks=chunks,
        lengths=even(work.num_layers, pp),
        strategies=tuple(strategies),
        unsynchronised_ps=tuple(whole_ps(time.unsynchronised_ms) for time in times),
        synchronised_ps=tuple(whole_ps(time.synchronised_ms) for time in times),
        units=tuple(zip(*units, strict=True)) if units else (),
        ends=tuple(ends),
        buffers=tuple((d, _buffer_units(work, limit, pp, chunks, d)) for d in degrees),
        left_out=tuple(left_out),
    )


def enumerate_strategies(work: Workload, pp: int, chunks: int) -> Iterator[Strategy]:
    """Strategies of a layer, recomputed ones first (also the order of layers in a plan)."""
    ranks = work.num_gpus // pp
    samples = work.global_batch_size // chunks
    for recompute in ("full", "none"):
        for degree in powers(ranks):
            dp = ranks // degree
            if ranks % degree or samples % dp:
                continue
            for ulysses in (False, True) if degree > 1 else (False,):
                for zero in (2, 3) if dp > 1 else (0,):
                    yield Strategy(
                        tp=1 if ulysses else degree,
                        dp=dp,
                        sequence_parallel=degree > 1 and not ulysses,
                        zero=zero,
                        recompute=recompute,
                        ulysses=degree if ulysses else 1,
                    )


def even(num_layers: int, pp: int) -> tuple[int, ...]:
    each = num_layers // pp
    return (*[each] * (pp - 1), num_layers - each * (pp - 1))


def powers(most: int) -> list[int]:
    return [1 << i for i in range(max(most, 0).bit_length()) if 1 << i <= most]


def _ends(
    work: Workload,
    limit: MemoryLimit,
    strategy: Strategy,
    pp: int,
    chunks: int,
    alive: tuple[int, ...],
) -> Ends:
    times = end_times(work, strategy, pp, chunks)
    sizes = end_memory(work, strategy, chunks, alive)
    return Ends(
        strategy,
        tuple(whole_ps(time.unsynchronised_ms) for time in times),
        tuple(limit.units(sum(size) + CONTEXT_MB) for size in sizes),
    )


def _buffer_units(work: Workload, limit: MemoryLimit, pp: int, chunks: int, degree: int) -> int:
    size = buffer_mb(work, pp, chunks, degree)
    return limit.units(size) if limit.exact else int(size)  # Galvatron rounds this one down
