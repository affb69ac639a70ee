"""order: Outline → the list of actions of a rank. When parameters are gathered and freed, when
gradients are summed, when activations travel.

The order depends on the outline alone, never on time, so all ranks of a group start the same
collectives in the same order. At most ``MAX_IN_FLIGHT`` gathers that are not yet needed, and as
many sums of gradients (one under ZeRO-2 and 3), are under way.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from typing import Literal, NamedTuple

from galvatron_compile.actions import COMPUTE, Action, Kind, Outline
from galvatron_compile.schedules import actions as schedule_actions

MAX_IN_FLIGHT = 4


def order(outline: Outline) -> tuple[Action, ...]:
    """Everything that a rank of ``outline.group`` does in a training step."""
    computed = list(_with_messages(outline, list(_training(outline))))
    return tuple(_with_gradients(outline, list(_with_parameters(outline, computed))))


def order_evaluation(outline: Outline) -> tuple[Action, ...]:
    """Forward only, every chunk for all micro-batches in turn."""
    blocks = [
        Block(outline.stage_of(c), "forward", batch, [Action("forward", i, batch) for i in layers])
        for c, layers in enumerate(outline.chunks)
        for batch in range(outline.num_micro_batches)
    ]
    return tuple(_with_parameters(outline, list(_with_messages(outline, blocks))))


class Block(NamedTuple):
    """What one stage computes for one micro-batch in one direction; perhaps nothing: values and
    gradients pass through a stage in which nothing learns."""

    stage: int
    direction: Literal["forward", "backward", "weight"]
    micro_batch: int
    work: list[Action]


def _training(outline: Outline) -> Iterator[Block]:
    """The schedule's pieces of work, layer by layer."""
    schedule = outline.schedule if outline.pp > 1 else "1f1b"
    chunks, count = outline.chunks, outline.num_micro_batches
    for work in schedule_actions(schedule, outline.pp, count, len(chunks), outline.group):
        stage, layers, batch = outline.stage_of(work.chunk), chunks[work.chunk], work.micro_batch
        if work.kind == "F":
            forward = [Action("forward", layer, batch) for layer in layers]
            yield Block(stage, "forward", batch, forward)
        else:
            backward = list(_backward(outline, work.kind, layers, batch))
            yield Block(stage, "weight" if work.kind == "W" else "backward", batch, backward)


def _backward(outline: Outline, kind: str, layers: Sequence[int], batch: int) -> Iterator[Action]:
    kinds: dict[str, Kind] = {"B": "backward", "I": "backward_input", "W": "backward_weight"}
    for layer in reversed(layers):
        found = outline.layers[layer]
        if found.differentiable:
            if found.recompute and kind != "W":
                yield Action("recompute", layer, batch)
            yield Action(kinds[kind], layer, batch)


# Messages between stages.


def _with_messages(outline: Outline, blocks: Sequence[Block]) -> Iterator[Action]:
    """Receives are posted one piece of a stage's work before they are waited for."""
    arrivals = [_arrival(outline, *block[:3]) for block in blocks]
    if arrivals and arrivals[0]:
        yield _receive(arrivals[0])
    for number, (stage, direction, batch, work) in enumerate(blocks):
        following = arrivals[number + 1] if number + 1 < len(blocks) else None
        if following:
            yield _receive(following)
        if arrival := arrivals[number]:
            yield arrival
        yield from work
        if direction == "forward" and stage < outline.num_stages - 1:
            yield Action("send_activations", stage, batch)
        if direction == "backward" and stage > 0:
            yield Action("send_gradients", stage, batch)


def _arrival(outline: Outline, stage: int, direction: str, batch: int) -> Action | None:
    if direction == "forward" and stage > 0:
        return Action("wait_activations", stage, batch)
    if direction == "backward" and stage < outline.num_stages - 1:
        return Action("wait_gradients", stage, batch)
    return None


def _receive(arrival: Action) -> Action:
    activations = arrival.kind == "wait_activations"
    kind = "receive_activations" if activations else "receive_gradients"
    return Action(kind, arrival.index, arrival.micro_batch)  # type: ignore[arg-type]


# Parameters.


def _with_parameters(outline: Outline, computed: list[Action]) -> Iterator[Action]:
    """Gathers one use ahead of their need; ZeRO-3 units are freed between uses that are apart."""
    needs = [_needed(outline, action) for action in computed]
    uses = [place for place, units in enumerate(needs) if units]
    following = dict(pairwise([*uses, len(computed)]))
    held = _Held(outline)
    refresh = deque(dict.fromkeys(u for units in needs for u in units if _persistent(outline, u)))
    for place, action in enumerate(computed):
        units = needs[place]
        if not units:
            yield action
            continue
        yield from held.gather(units)
        after = following[place]
        ahead = needs[after] if after < len(computed) else ()
        while refresh and held.num_gathering < MAX_IN_FLIGHT:
            yield from held.gather([refresh.popleft()])
        # Waited for first: what was gathered is copied to its place, and the room for the next
        # gather need not be there meanwhile.
        yield from held.wait(units)
        yield from held.gather(unit for unit in ahead if outline.units[unit].zero == 3)
        yield action
        yield from held.free(unit for unit in units if unit not in ahead and _freed(outline, unit))
    yield from held.free(unit for unit, found in enumerate(outline.units) if found.zero == 3)


class _Held:
    """Which units' working parameters are there at a point of the list."""

    def __init__(self, outline: Outline) -> None:
        none = {u for u, found in enumerate(outline.units) if not found.gathers}
        self.full, self.gathering = none, set[int]()

    @property
    def num_gathering(self) -> int:
        return len(self.gathering)

    def gather(self, units: Iterable[int]) -> Iterator[Action]:
        for unit in units:
            if unit not in self.full and unit not in self.gathering:
                self.gathering.add(unit)
                yield Action("gather", unit)

    def wait(self, units: Iterable[int]) -> Iterator[Action]:
        for unit in units:
            if unit in self.gathering:
                self.gathering.discard(unit)
                self.full.add(unit)
                yield Action("wait_gather", unit)

    def free(self, units: Iterable[int]) -> Iterator[Action]:
        for unit in units:
            yield from self.wait([unit])
            if unit in self.full:
                self.full.discard(unit)
                yield Action("free", unit)


def _needed(outline: Outline, action: Action) -> tuple[int, ...]:
    if action.kind not in COMPUTE:
        return ()
    layer = outline.layers[action.index]
    if action.kind == "backward_weight" and not layer.weights_for_weights:
        return ()
    return layer.units


def _freed(outline: Outline, unit: int) -> bool:
    """A shared unit stays from its first use to the end of the step."""
    return outline.units[unit].zero == 3 and not outline.units[unit].shared


def _persistent(outline: Outline, unit: int) -> bool:
    return outline.units[unit].zero != 3 and outline.units[unit].gathers


# Gradients.


def _with_gradients(outline: Outline, listed: list[Action]) -> Iterator[Action]:
    """Sums start when the last gradient of a unit has come: of a micro-batch under ZeRO-2 and
    ZeRO-3, of the step otherwise. Parameters are freed first: packing gradients takes room."""
    due = _due(outline, listed)
    ready: deque[int] = deque()
    under_way: deque[int] = deque()
    for place, action in enumerate(listed):
        yield action
        ready.extend(due[place])
        if place + 1 < len(listed) and listed[place + 1].kind == "free":
            continue
        while ready:
            unit = ready.popleft()
            while len(under_way) >= _most_sums(outline, unit) or unit in under_way:
                yield Action("wait_reduce", under_way.popleft())
            yield Action("reduce", unit)
            under_way.append(unit)
    yield from (Action("wait_reduce", unit) for unit in under_way)
    trained = [u for units in due.values() for u in units]
    for unit in dict.fromkeys(trained):
        if outline.units[unit].varying:
            yield Action("reduce_tensor", unit)
    # Groups number their units differently, but must sum them in one order.
    tied = [unit for unit, found in enumerate(outline.units) if found.tied]
    for unit in sorted(tied, key=lambda unit: outline.units[unit].name):
        yield Action("reduce_tied", unit)


def _most_sums(outline: Outline, unit: int) -> int:
    """Under ZeRO-2 and 3, which are there for their memory, a sum ends before the next begins."""
    return 1 if outline.units[unit].zero >= 2 else MAX_IN_FLIGHT


def _due(outline: Outline, listed: list[Action]) -> dict[int, list[int]]:
    """Place in the list -> units whose gradients are complete behind it."""
    last: dict[tuple[int, int], int] = {}  # (unit, micro-batch or -1) -> place
    for place, action in enumerate(listed):
        if action.kind in ("backward", "backward_weight"):
            for unit in outline.layers[action.index].units:
                found = outline.units[unit]
                if found.trainable:
                    last[unit, action.micro_batch if found.zero >= 2 else -1] = place
    due = defaultdict[int, list[int]](list)
    for (unit, _), place in last.items():
        due[place].append(unit)
    return due
