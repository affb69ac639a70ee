"""What a rank holds while its list is walked: every buffer from where it is made to its end.

The rules are those of the runtime (galvatron_compile.flat): working parameters live from gather to
free, gradients that are not summed yet from the first backward to the wait for their sum, saved
activations from forward to backward, messages from where room is made to where they are taken.
"""

from __future__ import annotations

from typing import NamedTuple

from galvatron_compile.actions import Action, Outline
from galvatron_compile.timeline import Held
from galvatron_compile.work import SendWork, Work

PARTS = (
    "parameters", "optimizer states", "framework reserve", "gathered parameters", "gradients",
    "saved activations", "transient", "messages",
)  # fmt: skip
_PARAMETERS, _OPTIMIZER, _RESERVE, _GATHERED, _GRADIENTS, _SAVED, _TRANSIENT, _MESSAGES = range(8)


class MemoryCurve(NamedTuple):
    """parts: what the peak is made of, by the names of PARTS. steps: held from when on."""

    peak_bytes: int
    peak_at_ms: float
    parts: dict[str, int]
    steps: tuple[Held, ...]


class MemoryLog:
    """Changes of what a rank of one group holds."""

    def __init__(self, outline: Outline, work: Work) -> None:
        self.outline, self.work = outline, work
        self.changes: list[tuple[float, int, int]] = []  # (time, part, bytes more or less)
        self.pending = set[int]()  # units with gradients that no sum has taken yet
        self.reduced = set[int]()
        self.again = set[tuple[int, int]]()  # (layer, micro-batch) with recomputed activations
        self.coming: dict[tuple[str, int, int], int] = {}
        self.going: dict[tuple[str, int, int], int] = {}

    def add(self, time_ms: float, part: int, num_bytes: int) -> None:
        if num_bytes:
            self.changes.append((time_ms, part, num_bytes))

    def computed(self, action: Action, start_ms: float, end_ms: float) -> None:
        kind, layer, key = action.kind, action.index, (action.index, action.micro_batch)
        work, outline = self.work.layers[layer], self.outline.layers[layer]
        if kind == "forward":
            self.add(start_ms, _SAVED, work.saved_bytes if outline.differentiable else 0)
        elif key not in self.again:
            self.again.add(key)
            self.add(start_ms, _SAVED, work.recomputed_bytes)
        self.add(start_ms, _TRANSIENT, work.transient_bytes)
        found = outline.units if kind in ("backward", "backward_weight") else ()
        fresh = [u for u in found if self.outline.units[u].trainable and u not in self.pending]
        if kind in ("backward", "backward_weight"):
            self.add(end_ms, _SAVED, -work.saved_bytes - work.recomputed_bytes)
        # Gradients are packed while those that backward made are still there, or kept as they are
        # for a sum that follows (ZeRO-2 and 3).
        packed = [u for u in fresh if self.outline.units[u].zero < 2]
        kept = [u for u in fresh if self.outline.units[u].zero >= 2]
        self._gradients(end_ms, packed)
        self.add(end_ms, _TRANSIENT, -work.transient_bytes)
        self._gradients(end_ms, kept)

    def _gradients(self, now_ms: float, units: list[int]) -> None:
        self.pending.update(units)
        for unit in units:
            self.add(now_ms, _GRADIENTS, self.work.units[unit].pending_bytes)

    def collective_started(self, action: Action, now_ms: float) -> None:
        unit = self.work.units[action.index]
        if action.kind == "gather":
            self.add(now_ms, _GATHERED, unit.working_bytes)
        elif action.kind == "reduce":
            self.pending.discard(action.index)
            if self.outline.units[action.index].zero >= 2:
                self._passing(now_ms, _GRADIENTS, unit.pending_bytes)  # packs what backward made
            self.add(now_ms, _GRADIENTS, unit.exchange_bytes)
            if unit.gradient_bytes != unit.pending_bytes:
                self.add(now_ms, _GRADIENTS, unit.gradient_bytes)

    def waited(self, kind: str, index: int, now_ms: float) -> None:
        """For the end of a gather or a sum, which is when the runtime lets go of its buffers."""
        unit = self.work.units[index]
        if kind == "gather":
            self._passing(now_ms, _GATHERED, unit.working_bytes)  # copies to where it is read
        elif kind == "reduce":
            self.add(now_ms, _GRADIENTS, -unit.exchange_bytes)
            if unit.gradient_bytes != unit.pending_bytes:
                first = index not in self.reduced
                gone = unit.pending_bytes + (0 if first else unit.gradient_bytes)
                self.add(now_ms, _GRADIENTS, -gone)
                self.reduced.add(index)

    def _passing(self, now_ms: float, part: int, num_bytes: int) -> None:
        """There for a moment only."""
        self.add(now_ms, part, num_bytes)
        self.add(now_ms, part, -num_bytes)

    def freed(self, unit: int, now_ms: float) -> None:
        self.add(now_ms, _GATHERED, -self.work.units[unit].working_bytes)

    def made_room(self, key: tuple[str, int, int], sends: SendWork, now_ms: float) -> None:
        """key: the direction, the sending stage and the micro-batch of a message."""
        self.coming[key] = _bytes(key, sends)
        self.add(now_ms, _MESSAGES, self.coming[key])

    def taken(self, key: tuple[str, int, int], now_ms: float) -> None:
        """The layer that takes a message counts it from now on."""
        self.add(now_ms, _MESSAGES, -self.coming.pop(key))

    def leaving(self, key: tuple[str, int, int], sends: SendWork, now_ms: float) -> None:
        self.going[key] = _bytes(key, sends)
        self.add(now_ms, _MESSAGES, self.going[key])

    def left(self, key: tuple[str, int, int], now_ms: float) -> None:
        self.add(now_ms, _MESSAGES, -self.going.pop(key))

    def curve(self) -> MemoryCurve:
        held = [0] * len(PARTS)
        held[_PARAMETERS] = sum(unit.parameter_bytes for unit in self.work.units)
        held[_OPTIMIZER] = sum(unit.optimizer_bytes for unit in self.work.units)
        held[_RESERVE] = self.work.reserve_bytes
        total = peak = sum(held)
        peak_at_ms, at_peak = 0.0, tuple(held)
        steps = [Held(0.0, total)]
        for time_ms, part, change in sorted(self.changes, key=lambda found: found[0]):
            held[part] += change
            total += change
            if total > peak:
                peak, peak_at_ms, at_peak = total, time_ms, tuple(held)
            if steps[-1].time_ms == time_ms:
                steps[-1] = Held(time_ms, total)
            else:
                steps.append(Held(time_ms, total))
        parts = {name: size for name, size in zip(PARTS, at_peak, strict=True) if size}
        return MemoryCurve(peak, peak_at_ms, parts, tuple(steps))


def _bytes(key: tuple[str, int, int], sends: SendWork) -> int:
    return sends.activations_bytes if key[0] == "activations" else sends.gradients_bytes
