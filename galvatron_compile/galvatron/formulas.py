"""What one layer, and embedding and head, cost by Galvatron's published formulas.

Written from the formulas that its search engine documents and computes (PKU-DAIR Hetu-Galvatron,
``galvatron/core/cost_model``); they give its own price of its own plan. In them

    l    samples of a micro-batch on one replica, B // chunks // dp
    ts   tp, or the Ulysses degree
    sdp  dp · Ulysses, the ranks that ZeRO divides states over
    o    slowdown of computation and communication that run at the same time

The embedding and the head have one setting. There is no term for context or expert parallelism,
selective recomputation, ZeRO-1 or tensor parallelism without sequence parallelism: refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from galvatron_compile.errors import ProfileError, ShapeError, UnsupportedError
from galvatron_compile.galvatron.profile import Ends, GalvatronProfile, ModelProfile
from galvatron_compile.strategy import Strategy

MB = 2**20
CONTEXT_MB = 1024.0  # what the framework keeps on every GPU, Galvatron's constant
BACKWARD = 2.0  # backward computation over forward
TP_MESSAGES = 6.0  # all-gathers and reduce-scatters of a layer, forward and backward
ULYSSES_MESSAGES = 4.0  # all-to-alls of a layer, forward and backward
RECOMPUTED = 1.5  # messages with recomputation over messages without
ZERO_NOISE = 0.003  # share of the states that Galvatron adds to what ZeRO leaves on a rank


@dataclass(frozen=True)
class Workload:
    """What is trained on what: a profile, and the numbers that it does not hold."""

    profile: GalvatronProfile
    num_gpus: int
    seq_length: int
    global_batch_size: int
    num_layers: int
    hidden_size: int

    def __post_init__(self) -> None:
        for name in ("seq_length", "global_batch_size", "num_layers", "hidden_size"):
            if getattr(self, name) < 1:
                raise ShapeError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.num_gpus != self.profile.num_gpus:
            raise ProfileError(
                f"{self.profile.directory} was measured on {self.profile.num_gpus} GPUs, not "
                f"{self.num_gpus}; plan for {self.profile.num_gpus} or profile the other machine"
            )
        self.profile.at(self.seq_length)

    @cached_property
    def model(self) -> ModelProfile:
        return self.profile.at(self.seq_length)

    def samples(self, strategy: Strategy, chunks: int) -> int:
        """Samples of a micro-batch on one replica."""
        return self.global_batch_size // chunks // strategy.dp

    def message_mb(self, samples: float) -> float:
        """One activation tensor, samples × sequence × hidden."""
        per_sample = self.seq_length * self.hidden_size * self.profile.element_bytes
        return samples * per_sample / MB

    def sync_mb_per_ms(self, strategy: Strategy) -> float:
        """Bandwidth of gradient synchronisation: ranks are consecutive unless tp is inside."""
        size = strategy.dp * strategy.ulysses
        consecutive = strategy.tp == 1
        key = (size, consecutive)
        if key not in self.profile.bandwidth:
            raise ProfileError(
                f"{self.profile.files['bandwidth']} lacks the field "
                f"'allreduce_size_{size}_consec_{int(consecutive)}'"
            )
        return self.profile.bandwidth[key]


@dataclass(frozen=True)
class LayerTime:
    """One layer and one micro-batch, by cause.

    sync_ms: what synchronising its gradients adds to the backward that it overlaps with.
    gather_ms: gathers of ZeRO-3, not overlapped. exchange_ms: tensor parallelism or Ulysses.
    """

    forward_ms: float
    backward_ms: float
    recompute_ms: float
    gather_ms: float
    exchange_ms: float
    p2p_ms: float
    sync_ms: float

    @property
    def unsynchronised_ms(self) -> float:
        computation = self.forward_ms + self.backward_ms + self.recompute_ms
        return computation + self.gather_ms + self.exchange_ms + self.p2p_ms

    @property
    def synchronised_ms(self) -> float:
        return self.unsynchronised_ms + self.sync_ms


def layer_time(work: Workload, strategy: Strategy, pp: int, chunks: int) -> LayerTime:
    """Raises UnsupportedError or ProfileError for a strategy that cannot be priced."""
    check(strategy)
    degree = max(strategy.tp, strategy.ulysses)
    samples = work.samples(strategy, chunks)
    forward = work.model.layer_ms.at(samples / degree)
    backward = BACKWARD * forward
    recompute = forward if strategy.recompute == "full" else 0.0
    whole = _sync_ms(work, strategy, work.model.parameter_mb / strategy.tp)
    computed = backward + recompute
    slowed = (work.profile.overlap - 1) * min(whole, computed)
    exposed = max(whole, computed) + slowed - computed if strategy.dp > 1 else 0.0
    return LayerTime(
        forward_ms=forward,
        backward_ms=backward,
        recompute_ms=recompute,
        gather_ms=0.5 * whole if strategy.zero == 3 else 0.0,
        exchange_ms=_exchange_ms(work, strategy, samples),
        p2p_ms=_p2p_ms(work, samples, pp),
        sync_ms=exposed,
    )


@dataclass(frozen=True)
class EndTime:
    """Embedding and head on one stage, one micro-batch, without gradient synchronisation.

    sync_ms of these layers is nowhere in Galvatron's step. gather_ms: what ZeRO-3's gathers add to
    the computation that they overlap with (only the computation is slowed down).
    """

    computation_ms: float = 0.0
    gather_ms: float = 0.0
    exchange_ms: float = 0.0

    @property
    def unsynchronised_ms(self) -> float:
        return self.computation_ms + self.gather_ms + self.exchange_ms


def end_times(work: Workload, strategy: Strategy, pp: int, chunks: int) -> tuple[EndTime, ...]:
    """By stage: on one stage both ends, on several half on the first and half on the last."""
    check(strategy)
    degree = max(strategy.tp, strategy.ulysses)
    samples = work.samples(strategy, chunks)
    forward = work.model.ends_ms.at(samples / degree)
    message = 0.0 if strategy.tp == 1 else _all_gather_ms(work, strategy.tp, samples)
    if pp == 1:
        return (_end_time(work, strategy, work.model.whole, forward, 2 * message),)
    first = _end_time(work, strategy, work.model.first, forward / 2, message)
    last = _end_time(work, strategy, work.model.last, forward / 2, message)
    return (first, *[EndTime()] * (pp - 2), last)


def _end_time(
    work: Workload, strategy: Strategy, ends: Ends, forward: float, exchange: float
) -> EndTime:
    computation = (1 + BACKWARD) * forward
    gather = 0.0
    if strategy.zero == 3:
        parameter_mb = entry(work, ends.states_mb, strategy.tp, "model_states") / 4
        message = 0.5 * (0.5 * _sync_ms(work, strategy, parameter_mb))
        overlap = work.profile.overlap
        for computed in (forward, BACKWARD * forward):
            # Communication runs to its end, then the rest of the computation at full speed.
            rest = max(0.0, overlap * computed - message) / overlap
            gather += message + rest - computed
    return EndTime(computation, gather, exchange)


def layer_memory(
    work: Workload, strategy: Strategy, chunks: int, in_flight: int
) -> tuple[float, float]:
    """MB of states, and of activations of ``in_flight`` micro-batches."""
    degree = max(strategy.tp, strategy.ulysses)
    states = 4 * work.model.parameter_mb / strategy.tp * states_share(strategy, chunks)
    kept = work.samples(strategy, chunks) * in_flight
    if strategy.recompute == "full":
        return states, work.model.recomputed_mb * kept / degree
    return states, entry(work, work.model.activation_mb, degree, "activation") * kept


def end_memory(
    work: Workload, strategy: Strategy, chunks: int, in_flight: tuple[int, ...]
) -> list[tuple[float, float]]:
    """MB of states and activations of embedding and head, by stage.

    in_flight: by stage, micro-batches whose activations of the ends are alive.
    """

    def one(ends: Ends, alive: int) -> tuple[float, float]:
        degree = max(strategy.tp, strategy.ulysses)
        states = entry(work, ends.states_mb, strategy.tp, "model_states")
        activation = entry(work, ends.activation_mb, degree, "activation")
        kept = work.samples(strategy, chunks) * alive
        return states * states_share(strategy, chunks), activation * kept

    if len(in_flight) == 1:
        return [one(work.model.whole, 1)]
    first, last = one(work.model.first, in_flight[0]), one(work.model.last, in_flight[-1])
    return [first, *[(0.0, 0.0)] * (len(in_flight) - 2), last]


def states_share(strategy: Strategy, chunks: int) -> float:
    """Share of the states that ZeRO leaves on a rank, in mixed precision.

    With several micro-batches the reduction of gradients runs beside computation, and whole
    gradients are kept meanwhile.
    """
    left = 1 / (strategy.dp * strategy.ulysses) + ZERO_NOISE
    if strategy.zero == 0:
        return 1.0
    whole_eighths = (1 if chunks == 1 else 2) - (1 if strategy.zero == 3 else 0)
    return (8 - whole_eighths) / 8 * left + whole_eighths / 8


def buffer_mb(work: Workload, pp: int, chunks: int, degree: int) -> float:
    """The buffer of tensor parallelism when the largest degree in use is ``degree``."""
    replicas = work.num_gpus // pp // degree
    return work.message_mb(work.global_batch_size / chunks / replicas)


def check(strategy: Strategy) -> None:
    """UnsupportedError for what the formulas have no term for."""
    problem = ""
    if strategy.cp > 1 or strategy.ep > 1:
        problem = "context and expert parallelism; use Ulysses or tensor parallelism"
    elif strategy.recompute == "selective":
        problem = "selective recomputation; use recompute or none"
    elif strategy.zero == 1:
        problem = "ZeRO-1; use zero0, zero2 or zero3"
    elif strategy.tp > 1 and strategy.ulysses > 1:
        problem = "tensor parallelism together with Ulysses; use one of them"
    elif strategy.tp > 1 and not strategy.sequence_parallel:
        problem = f"tensor parallelism without sequence parallelism; write tp{strategy.tp}.sp"
    if problem:
        raise UnsupportedError(f"{strategy}: Galvatron's formulas have no term for {problem}")


def entry(work: Workload, table: Mapping[int, float], degree: int, field: str) -> float:
    if degree not in table:
        known = ", ".join(map(str, sorted(table)))
        raise ProfileError(
            f"{work.profile.files['memory']} lacks the field {field} of degree {degree}; it has "
            f"{known}: use one of these"
        )
    return table[degree]


def _sync_ms(work: Workload, strategy: Strategy, parameter_mb: float) -> float:
    """Reduce-scatter and all-gather of 2-byte gradients (``parameter_mb`` counts 4 bytes)."""
    size = strategy.dp * strategy.ulysses
    if size == 1:
        return 0.0
    return (size - 1) / size * parameter_mb / work.sync_mb_per_ms(strategy)


def _exchange_ms(work: Workload, strategy: Strategy, samples: int) -> float:
    messages = RECOMPUTED if strategy.recompute == "full" else 1.0
    if strategy.tp > 1:
        return messages * TP_MESSAGES * _all_gather_ms(work, strategy.tp, samples)
    if strategy.ulysses == 1:
        return 0.0
    tables = work.profile.all_to_all
    if strategy.ulysses not in tables:
        raise ProfileError(
            f"{work.profile.files['times']} lacks the field 'all2all_size_{strategy.ulysses}_…'"
        )
    return messages * ULYSSES_MESSAGES * tables[strategy.ulysses].ms(work.message_mb(samples))


def _all_gather_ms(work: Workload, tp: int, samples: int) -> float:
    """Half an all-reduce, Galvatron's convention."""
    if tp not in work.profile.all_reduce:
        raise ProfileError(f"{work.profile.files['times']} lacks the field 'allreduce_size_{tp}_…'")
    return work.profile.all_reduce[tp].ms(work.message_mb(samples)) / 2


def _p2p_ms(work: Workload, samples: int, pp: int) -> float:
    """All transfers between stages, spread evenly over the layers."""
    if pp == 1:
        return 0.0
    if pp not in work.profile.p2p:
        raise ProfileError(f"{work.profile.files['p2p']} lacks the field 'pp_size_{pp}'")
    return pp * 2 * work.message_mb(samples) / work.profile.p2p[pp] / work.num_layers
