"""What the search over pipelines is given: costs of one way to divide the ranks, and a limit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from galvatron_compile.errors import PlanError
from galvatron_compile.schedules import why_not
from galvatron_compile.strategy import Strategy

Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]

_LARGEST = 1 << 53
"""Everything added up over a whole model stays below this, far inside 64 bits."""


@dataclass(frozen=True)
class StageCosts:
    """What a layer of every class costs under every option. All [classes, options] unless said.

    strategies: [options], what the options are.
    allowed: where the class can run with the option; the other numbers mean nothing elsewhere.
    micro_ns: forward and backward of one micro-batch with the communication that is not hidden.
    step_ns: once a step: exposed gradient synchronisation, gathers of parameters, optimizer.
    state_bytes: parameters, gradients, optimizer states; saved_bytes: activations kept for the
        backward of one micro-batch; transient_bytes: what lives only while the layer runs.
    forward_send_ns, backward_send_ns: per micro-batch, to the next and to the previous stage.
    layout: [options], how activations lie between layers; equal layouts switch for free.
    switch_ns: (class before, class after) -> [layouts, layouts] per micro-batch, forward and
        backward together; a pair of classes that is absent switches for free.

    Raises PlanError for shapes that do not match and negative or absurdly large numbers.
    """

    strategies: tuple[Strategy, ...]
    allowed: Bools
    micro_ns: Ints
    step_ns: Ints
    state_bytes: Ints
    saved_bytes: Ints
    transient_bytes: Ints
    forward_send_ns: Ints
    backward_send_ns: Ints
    layout: Ints
    switch_ns: Mapping[tuple[int, int], Ints]

    def __post_init__(self) -> None:
        if self.allowed.ndim != 2 or self.allowed.shape[1] != len(self.strategies):
            raise PlanError(
                f"allowed must be [classes, {len(self.strategies)} options], got shape "
                f"{self.allowed.shape}"
            )
        for name in (
            *("micro_ns", "step_ns", "state_bytes", "saved_bytes", "transient_bytes"),
            *("forward_send_ns", "backward_send_ns"),
        ):
            numbers: Ints = getattr(self, name)
            _check_numbers(name, numbers, self.allowed.shape, self.allowed)
        _check_numbers("layout", self.layout, (len(self.strategies),))
        for (before, after), numbers in self.switch_ns.items():
            name = f"switch_ns[{before}, {after}]"
            if not 0 <= min(before, after) <= max(before, after) < self.num_classes:
                raise PlanError(f"{name} must name classes 0 to {self.num_classes - 1}")
            _check_numbers(name, numbers, (self.num_layouts, self.num_layouts))
            if np.diagonal(numbers).any():
                raise PlanError(f"{name} must be 0 between equal layouts")

    @property
    def num_classes(self) -> int:
        return int(self.allowed.shape[0])

    @property
    def num_options(self) -> int:
        return len(self.strategies)

    @property
    def num_layouts(self) -> int:
        return int(self.layout.max(initial=-1)) + 1


@dataclass(frozen=True, order=True)
class Family:
    """pp groups of ranks that run ``virtual`` stages each in one schedule; PlanError if illegal."""

    pp: int
    num_micro_batches: int
    schedule: str
    virtual: int = 1

    def __post_init__(self) -> None:
        reason = why_not(self.schedule, self.pp, self.num_micro_batches, self.virtual)
        if reason is not None:
            raise PlanError(reason)

    @property
    def num_stages(self) -> int:
        return self.pp * self.virtual

    def __str__(self) -> str:
        virtual = f", {self.virtual} stages a group" if self.virtual > 1 else ""
        return f"pp {self.pp}, {self.num_micro_batches} micro-batches, {self.schedule}{virtual}"


@dataclass(frozen=True)
class PipelineProblem:
    """The best stage boundaries and options of one family are sought.

    layers: class of every layer, in order.
    costs: for the ranks of one pipeline group and the family's number of micro-batches.
    tied: layers that share a parameter must have one option if they are in the same group.
    capacity_bytes: what a rank can hold.
    uncut: edges, as numbers of layers in front of them, where no stage may begin.
    """

    family: Family
    layers: tuple[int, ...]
    costs: StageCosts
    tied: tuple[tuple[int, ...], ...]
    capacity_bytes: int
    uncut: frozenset[int] = frozenset()

    def __post_init__(self) -> None:
        num_layers, num_stages = len(self.layers), self.family.num_stages
        if num_layers < num_stages:
            raise PlanError(
                f"cannot split {num_layers} layers into {num_stages} stages; lower pp or virtual"
            )
        if not all(0 <= index < self.costs.num_classes for index in self.layers):
            raise PlanError(f"layers must name classes 0 to {self.costs.num_classes - 1}")
        for group in self.tied:
            if not all(0 <= layer < num_layers for layer in group):
                raise PlanError(f"tied layers {group} must lie in 0 to {num_layers - 1}")
        if not all(0 < edge < num_layers for edge in self.uncut):
            raise PlanError(f"uncut edges must lie in 1 to {num_layers - 1}: {sorted(self.uncut)}")
        if self.capacity_bytes < 0:
            raise PlanError(f"capacity_bytes must not be negative, got {self.capacity_bytes}")
        self._check_sums()

    def _check_sums(self) -> None:
        """Times and sizes of a whole step are representable, with room for the search's sums."""
        costs, m = self.costs, self.family.num_micro_batches
        sends = _largest(costs.forward_send_ns) + _largest(costs.backward_send_ns)
        switch = max((_largest(matrix) for matrix in costs.switch_ns.values()), default=0)
        time = m * (_largest(costs.micro_ns) + sends + switch) + _largest(costs.step_ns)
        size = _largest(costs.state_bytes) + _largest(costs.transient_bytes)
        size += m * _largest(costs.saved_bytes)
        if max(time, size) * len(self.layers) >= _LARGEST:
            raise PlanError(
                f"costs are too large to add up over {len(self.layers)} layers and {m} "
                "micro-batches; check their units (nanoseconds, bytes)"
            )


def _check_numbers(
    name: str, numbers: Ints, shape: tuple[int, ...], allowed: Bools | None = None
) -> None:
    if numbers.shape != shape or numbers.dtype != np.int64:
        raise PlanError(
            f"{name} must be int64 of shape {shape}, got {numbers.dtype} of {numbers.shape}"
        )
    used = numbers if allowed is None else numbers[allowed]
    if used.size and not (used.min() >= 0 and used.max() < _LARGEST):
        raise PlanError(f"{name} must lie between 0 and {_LARGEST}")


def _largest(numbers: Ints) -> int:
    return int(numbers.max(initial=0))
