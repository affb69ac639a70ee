"""What every action of a group's list takes: times alone, and bytes that come and go with it.

An :class:`~galvatron_compile.actions.Outline` says what there is to order, a :class:`Work` what it
costs; the simulator walks a list with both. Times are those of an action that runs by itself; what
running beside each other costs is a fact about the group, see :class:`Work`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields

from galvatron_compile.actions import Outline
from galvatron_compile.errors import PlanError


def _check(noun: object) -> None:
    """Every number is finite and none is negative."""
    for each in fields(noun):  # type: ignore[arg-type]
        value = getattr(noun, each.name)
        if isinstance(value, int | float) and not (math.isfinite(value) and value >= 0):
            raise PlanError(f"{each.name} must be finite and not negative, got {value}")


@dataclass(frozen=True, slots=True)
class Phase:
    """A layer once in one direction: computation, and its own collectives by cause.

    The collectives follow and precede products all through the layer, so the phase is taken to be
    an even mixture, in which computation and they run one after the other.
    """

    compute_ms: float = 0.0
    tensor_ms: float = 0.0
    context_ms: float = 0.0
    expert_ms: float = 0.0
    resharding_ms: float = 0.0

    def __post_init__(self) -> None:
        _check(self)

    @property
    def inner_ms(self) -> float:
        """What the collectives take."""
        return self.tensor_ms + self.context_ms + self.expert_ms + self.resharding_ms

    @property
    def alone_ms(self) -> float:
        return self.compute_ms + self.inner_ms

    def scaled(self, compute: float, inner: float) -> Phase:
        """With a share of the computation and a share of the collectives."""
        return Phase(
            compute * self.compute_ms,
            inner * self.tensor_ms,
            inner * self.context_ms,
            inner * self.expert_ms,
            inner * self.resharding_ms,
        )


@dataclass(frozen=True, slots=True)
class LayerWork:
    """One layer, one micro-batch, one rank.

    recompute: forward again, where the list asks for it; backward does not include it.
    weight_share: of backward's computation, what the gradients of weights take where it is split;
        the collectives go with the gradients of inputs.
    saved_bytes: kept from forward until backward is over (its weight half, where it is split).
    recomputed_bytes: what recomputing brings back, until backward is over.
    transient_bytes: workspace while the layer computes, in either direction.
    """

    forward: Phase
    backward: Phase
    recompute: Phase = field(default_factory=Phase)
    weight_share: float = 0.5
    saved_bytes: int = 0
    recomputed_bytes: int = 0
    transient_bytes: int = 0

    def __post_init__(self) -> None:
        _check(self)
        if self.weight_share > 1:
            raise PlanError(f"weight_share must be at most 1, got {self.weight_share}")

    def phase(self, kind: str) -> Phase:
        """Of a compute action."""
        if kind == "backward_input":
            return self.backward.scaled(1 - self.weight_share, 1)
        if kind == "backward_weight":
            return self.backward.scaled(self.weight_share, 0)
        phase: Phase = getattr(self, kind)
        return phase


@dataclass(frozen=True, slots=True)
class UnitWork:
    """The parameters of one unit on one rank.

    gather_ms, reduce_ms: one collective over the data axis; tensor_ms, tied_ms: the sums over the
        tensor axis and over stages, once a step. in_node: whether the data axis lies in a node.
    parameter_bytes: held all the time: masters, and working copies that are never freed.
    optimizer_bytes: moments. working_bytes: gathered parameters, from gather to free (ZeRO-3).
    pending_bytes: gradients not yet summed over ranks, from the first backward to the end of their
        sum; gradient_bytes: this rank's part of the sum, from there to the end of the step. The
        sum is made in place if both are equal. exchange_bytes: what a sum needs beside them, from
        its start until it has been waited for (galvatron_compile.gather_scatter).
    """

    gather_ms: float = 0.0
    reduce_ms: float = 0.0
    tensor_ms: float = 0.0
    tied_ms: float = 0.0
    parameter_bytes: int = 0
    optimizer_bytes: int = 0
    working_bytes: int = 0
    pending_bytes: int = 0
    gradient_bytes: int = 0
    exchange_bytes: int = 0
    in_node: bool = False

    def __post_init__(self) -> None:
        _check(self)


@dataclass(frozen=True, slots=True)
class SendWork:
    """What one of a group's stages sends in a micro-batch: activations to the next stage,
    gradients to the one before. Zero at the ends of the pipeline. …_in_node: whether the stage
    there is on the same node, for all ranks."""

    activations_ms: float = 0.0
    gradients_ms: float = 0.0
    activations_bytes: int = 0
    gradients_bytes: int = 0
    activations_in_node: bool = False
    gradients_in_node: bool = False

    def __post_init__(self) -> None:
        _check(self)


@dataclass(frozen=True, slots=True)
class Cores:
    """A set of cores (groups with one ``pool`` number share it), and the group's threads on it.

    num_cores: not a whole number where a quota allows so many cores' worth of time.
    """

    pool: int
    num_cores: float
    num_threads: int

    def __post_init__(self) -> None:
        _check(self)

    def speed(self, busy_threads: int, all_threads: int) -> float:
        """Of a busy thread against its speed with all of them busy; none uses more than a core."""
        return max(self.num_cores, all_threads) / max(self.num_cores, busy_threads)


@dataclass(frozen=True)
class Work:
    """Everything that one group does. layers: by layer number; units: as the outline's; sends: per
    chunk.

    optimizer_ms: the update, once a step. reserve_bytes: what the framework keeps.
    compute_slowdown, communication_slowdown: how many times longer computation takes while any
        collective or message runs beside it, and the other way round; with both equal to o, a
        computation c and a collective x that start together take max(c, x) + (o - 1) min(c, x)
        (Galvatron, arXiv 2211.13878, section 4.2).
    node_compute_slowdown, node_communication_slowdown: the same where the collective or message
        stays within a node.
    inner_shares_wire: whether layers' own collectives use the links that gathers and sums use.
    inner_computes: whether they are work of the cores, as within a node of CPUs, and suffer as
        computation does (as a shared wire does where inner_shares_wire).
    messages_share_wire: whether messages between stages do. Who shares gets half of a link.
    cores: those that the group's ranks share with others; None where every rank has a device of its
        own. Times of layers are those with all ranks busy: where fewer are, the others get more.
    """

    layers: Mapping[int, LayerWork]
    units: tuple[UnitWork, ...] = ()
    sends: tuple[SendWork, ...] = (SendWork(),)
    optimizer_ms: float = 0.0
    reserve_bytes: int = 0
    compute_slowdown: float = 1.0
    communication_slowdown: float = 1.0
    inner_shares_wire: bool = False
    messages_share_wire: bool = False
    cores: Cores | None = None
    node_compute_slowdown: float = 1.0
    node_communication_slowdown: float = 1.0
    inner_computes: bool = False

    def __post_init__(self) -> None:
        _check(self)
        for name in ("compute_slowdown", "communication_slowdown"):
            for each in (name, f"node_{name}"):
                value = getattr(self, each)
                if value < 1:
                    raise PlanError(f"{each} must be at least 1, got {value}")

    def slowdowns(self, in_node: bool) -> tuple[float, float]:
        """Of computation and of communication, see the class."""
        if in_node:
            return self.node_compute_slowdown, self.node_communication_slowdown
        return self.compute_slowdown, self.communication_slowdown

    def check(self, outline: Outline) -> None:
        """PlanError unless it says what every part of ``outline`` costs."""
        missing = [i for chunk in outline.chunks for i in chunk if i not in self.layers]
        if missing:
            raise PlanError(f"no work is known for layer {missing[0]}")
        for what, given, wanted in (
            ("units", len(self.units), len(outline.units)),
            ("sends", len(self.sends), len(outline.chunks)),
        ):
            if given != wanted:
                raise PlanError(f"the work has {given} {what}, the outline {wanted}")
