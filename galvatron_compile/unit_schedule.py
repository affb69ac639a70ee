"""When the parameters of a stage are gathered and freed, and when gradients are summed.

Every decision depends on the program alone, never on time, so all ranks launch the same
collectives in the same order. At most ``max_in_flight`` gradient reductions, and as many gathers,
are under way; buffers are held until their collective has been waited for.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import torch

from galvatron_compile.flat import InFlight

if TYPE_CHECKING:
    from galvatron_compile.units import ParameterUnit

State = Literal["stale", "gathering", "full"]


class UnitSchedule:
    """The units of one stage in the order of their first use.

    A step is ``begin``, then for every micro-batch ``begin_micro_batch``, forward, backward and
    ``end_micro_batch``, then ``finish`` and either ``commit`` or ``drop``.
    """

    def __init__(self, units: Sequence[ParameterUnit], max_in_flight: int = 4) -> None:
        self.units = list(units)
        self.max_in_flight = max_in_flight
        self._index = {unit: place for place, unit in enumerate(self.units)}
        self._states: dict[ParameterUnit, State] = dict.fromkeys(self.units, "stale")
        self._missing = dict.fromkeys(self.units, 0)  # gradients yet to come in this micro-batch
        self._reductions: deque[InFlight] = deque()
        self._refresh: deque[ParameterUnit] = deque()
        self._last_micro_batch = True
        gathered = [unit for unit in self.units if unit.zero == 3 and not unit.shared]
        self._last_gathered = gathered[-1] if gathered else None
        for unit in self.units:
            unit.schedule = self
            self._free(unit)

    # The course of a step.

    def begin(self) -> None:
        """The optimizer has run: persistent working tensors are out of date."""
        for unit in self.units:
            self._states[unit] = "stale"
        self._refresh = deque(unit for unit in self.units if unit.zero != 3)
        self._top_up()

    def begin_micro_batch(self, *, last: bool) -> None:
        self._last_micro_batch = last
        for unit in self.units:
            self._missing[unit] = unit.num_trainable

    def end_micro_batch(self) -> None:
        """Backward is over: sum what units hold that did not get all their gradients."""
        for unit in self.units:
            if self._missing[unit]:
                self._gradients_complete(unit)
            if not unit.shared:
                self._free(unit)

    def finish(self) -> None:
        """Wait for all sums over the data axis, then sum over the tensor axis."""
        self._drain()
        for unit in self.units:
            for bucket in unit.buckets:
                self._hold(bucket.launch_tensor_reduce())
        self._drain()
        self.release()

    def release(self) -> None:
        """Free every ZeRO-3 unit."""
        self._refresh.clear()
        for unit in self.units:
            self._wait_gather(unit)
            self._free(unit)

    def commit(self) -> None:
        for unit in self.units:
            for bucket in unit.buckets:
                bucket.commit()

    def drop(self) -> None:
        for unit in self.units:
            for bucket in unit.buckets:
                bucket.drop()

    # Parameters.

    def before_use(self, unit: ParameterUnit) -> None:
        self._launch_gather(unit)
        self._top_up()
        following = self._neighbour(unit, 1)
        if following is not None:
            self._launch_gather(following)
        self._wait_gather(unit)

    def after_forward(self, unit: ParameterUnit) -> None:
        """The layer's forward is done. The last unit is kept: backward begins with it."""
        if unit is self._last_gathered and torch.is_grad_enabled():
            return
        if not unit.shared:
            self._free(unit)

    def before_backward(self, units: Sequence[ParameterUnit]) -> None:
        # The engine runs nodes made later first, so when a fence is reached the backward of all
        # layers behind it is over, that of frozen parameters included.
        for other in self.units:
            if other not in units and not other.shared and self._states[other] == "full":
                self._free(other)
        for unit in units:
            self._launch_gather(unit)
        own = [unit for unit in units if not unit.shared]
        previous = self._neighbour(own[0], -1) if own else None
        if previous is not None:
            self._launch_gather(previous)
        for unit in units:
            self._wait_gather(unit)

    def _neighbour(self, unit: ParameterUnit, step: int) -> ParameterUnit | None:
        """The next ZeRO-3 unit in that direction, to be gathered ahead of its use."""
        if unit.zero != 3:
            return None
        place = self._index[unit] + step
        while 0 <= place < len(self.units):
            if self.units[place].zero == 3:
                return self.units[place]
            place += step
        return None

    def _top_up(self) -> None:
        gathering = sum(state == "gathering" for state in self._states.values())
        while self._refresh and gathering < self.max_in_flight:
            self._launch_gather(self._refresh.popleft())
            gathering += 1

    def _launch_gather(self, unit: ParameterUnit) -> None:
        if self._states[unit] == "stale":
            for bucket in unit.buckets:
                bucket.launch_gather()
            self._states[unit] = "gathering"

    def _wait_gather(self, unit: ParameterUnit) -> None:
        if self._states[unit] == "gathering":
            for bucket in unit.buckets:
                bucket.wait_gather()
            self._states[unit] = "full"

    def _free(self, unit: ParameterUnit) -> None:
        if unit.zero == 3:
            self._wait_gather(unit)  # prefetched, yet never used
            for bucket in unit.buckets:
                bucket.free()
            self._states[unit] = "stale"

    # Gradients.

    def gradient_arrived(self, unit: ParameterUnit) -> None:
        self._missing[unit] -= 1
        if self._missing[unit] == 0:
            self._gradients_complete(unit)

    def _gradients_complete(self, unit: ParameterUnit) -> None:
        if unit.zero >= 2 or self._last_micro_batch:
            for bucket in unit.buckets:
                self._hold(bucket.launch_reduce())

    def _hold(self, launched: InFlight | None) -> None:
        if launched is None:
            return
        self._reductions.append(launched)
        while len(self._reductions) > self.max_in_flight:
            self._reductions.popleft().wait()

    def _drain(self) -> None:
        while self._reductions:
            self._reductions.popleft().wait()
