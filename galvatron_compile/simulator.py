"""A step before it runs: every group's list of actions walked with what each action costs.

One rank stands for all ranks of its group, which do the same at the same time. Every group has a
compute stream, on which layers run in the order of the list, and a communication stream, on which
gathers and sums run in the order they are started; messages between two groups have a stream per
direction. What runs side by side in a group slows each other down, so speeds change whenever
something starts or ends: the walk goes from event to event and never adds times up.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Sequence
from heapq import heappop, heappush
from itertools import count

from galvatron_compile.actions import COMPUTE, Action, Outline, format_actions
from galvatron_compile.errors import PlanError
from galvatron_compile.simulated_group import OPTIMIZER, Group, Job, Message
from galvatron_compile.simulation import Simulation
from galvatron_compile.work import Work


def simulate(
    outlines: Sequence[Outline], lists: Sequence[Sequence[Action]], works: Sequence[Work]
) -> Simulation:
    """Walk the lists of all groups at once, each as passes.order made it of its outline.

    PlanError if a work does not fit its outline, or if groups wait for each other for ever.
    """
    groups = []
    for outline, actions, work in zip(outlines, lists, works, strict=True):
        work.check(outline)
        groups.append(Group(outline, actions, work))
    _Walk(groups).to_the_end()
    step_ms = max(_ended(number, group) for number, group in enumerate(groups))
    return Simulation(tuple(group.result(step_ms) for group in groups), step_ms)


def _ended(number: int, group: Group) -> float:
    if group.end_ms is not None:
        return group.end_ms
    stuck = format_actions(group.outline, [group.actions[group.at - 1]]).split()[1:]
    raise PlanError(
        f"the schedule never ends: group {number} waits for ever at {' '.join(stuck)!r}; use "
        "another schedule"
    )


class _Walk:
    """Time goes on to whatever ends next; what ended lets its group take its next actions."""

    def __init__(self, groups: Sequence[Group]) -> None:
        self.groups, self.pp = groups, len(groups)
        self.crowded = any(group.work.cores is not None for group in groups)
        self.now = 0.0
        self.events: list[tuple[float, int, Job, int]] = []  # (time, tie-break, job, version)
        self.numbers = count()
        # (direction, sending stage, micro-batch), and what waits in order (from, to).
        self.mail = defaultdict[tuple[str, int, int], Message](Message)
        self.wires = defaultdict[tuple[int, int], deque[Job]](deque)
        self.holders = defaultdict[str, int](int)  # tied unit -> groups that hold it
        self.met = defaultdict[str, list[int]](list)  # tied unit -> groups that came to its sum
        for group in groups:
            for unit in group.outline.units:
                self.holders[unit.name] += unit.tied

    def to_the_end(self) -> None:
        for index in range(self.pp):
            self.go_on(index)
        while self.events:
            time, _, job, version = heappop(self.events)
            if version == job.version:
                self.now = job.end = time
                self.ended(job)

    # Speeds.

    def start(self, job: Job) -> None:
        job.start = job.since = self.now
        for index in job.groups:
            self.retime(index)

    def retime(self, index: int) -> None:
        """What runs in a group has changed, and with it the speed of everything there; where groups
        share cores, of everything everywhere."""
        if not self.crowded:
            self.retime_group(index, 1.0)
            return
        for other in range(self.pp):
            self.retime_group(other, self.share_of_cores(other))

    def share_of_cores(self, index: int) -> float:
        """How fast a group's layers run against their times, which are those of all groups busy."""
        cores = self.groups[index].work.cores
        if cores is None:
            return 1.0
        mates = [
            (mate.work.cores.num_threads, mate.layer is not None)
            for mate in self.groups
            if mate.work.cores is not None and mate.work.cores.pool == cores.pool
        ]
        busy = sum(threads for threads, is_busy in mates if is_busy)
        return cores.speed(max(busy, cores.num_threads), sum(threads for threads, _ in mates))

    def retime_group(self, index: int, crowd_speed: float) -> None:
        group = self.groups[index]
        layer, collective, messages = group.layer, group.collective, group.messages
        if layer is not None:
            beside = {job.in_node for job in (collective, *messages) if job is not None}
            slowest = min((group.speeds(layer.phase, near)[0] for near in beside), default=1.0)
            self.set_rate(layer, crowd_speed * slowest)
        if collective is not None:
            self.set_rate(collective, _speed(collective, group, bool(messages)))
        for message in messages:
            ends = [self.groups[end] for end in message.groups]
            speeds = [_speed(message, end, end.collective is not None) for end in ends]
            self.set_rate(message, min(speeds))

    def set_rate(self, job: Job, rate: float) -> None:
        if job.rate == rate:
            return
        job.left = max(0.0, job.left - (self.now - job.since) * job.rate)
        job.since, job.rate = self.now, rate
        job.version += 1
        job.trace.append((self.now, job.alone_ms - job.left))
        heappush(self.events, (self.now + job.left / rate, next(self.numbers), job, job.version))

    # What is over.

    def ended(self, job: Job) -> None:
        index = job.groups[0]
        group = self.groups[index]
        if job is group.collective:
            self.collective_ended(index, group, job)
        elif job is not group.layer:
            self.message_ended(job)
        else:
            group.layer = None
            group.record_run(job)
            self.retime(index)
            if job.action is OPTIMIZER:
                group.end_ms = self.now
            else:
                self.go_on(index)

    def collective_ended(self, index: int, group: Group, job: Job) -> None:
        del group.open[job.action.kind, job.action.index]
        group.record(job.action, "communication", job)
        group.collective = group.queue.popleft() if group.queue else None
        if group.collective is not None:
            self.start(group.collective)
        else:
            self.retime(index)
        if group.awaited is job:
            group.awaited = None
            group.memory.waited(job.action.kind, job.action.index, self.now)
            group.exposed[job.action.kind] += self.now - group.blocked_at
            self.go_on(index)

    def message_ended(self, job: Job) -> None:
        source, target = job.groups
        key = _key(job.action)
        message, wire = self.mail[key], self.wires[source, target]
        self.groups[source].record(job.action, "messages", job)
        self.groups[source].memory.left(key, self.now)
        wire.popleft()
        for end in job.groups:
            self.groups[end].messages.remove(job)
        if wire:
            self.travel(wire[0])
        for end in job.groups:
            self.retime(end)
        if message.waiting is not None:
            group = self.groups[message.waiting]
            travelling_ms = self.now - max(group.blocked_at, message.sent_at)
            group.exposed[job.action.kind] += travelling_ms
            group.bubble_ms += self.now - group.blocked_at - travelling_ms
            group.memory.taken(key, self.now)
            self.go_on(message.waiting)

    # What comes next.

    def go_on(self, index: int) -> None:
        """Take a group's next actions, up to a layer that runs or something to wait for."""
        group = self.groups[index]
        group.blocked_at = self.now
        while group.at < len(group.actions):
            action = group.actions[group.at]
            if action.kind in COMPUTE:
                break
            group.at += 1
            if not self.passes(index, group, action):
                return
        if group.at < len(group.actions):
            group.layer = group.next_run(index)
        else:
            group.layer = Job(OPTIMIZER, group.work.optimizer_ms, (index,))
        self.start(group.layer)

    def passes(self, index: int, group: Group, action: Action) -> bool:
        """Do an action that takes no time itself; False where the group has to wait."""
        kind = action.kind
        if kind in ("gather", "reduce"):
            group.memory.collective_started(action, self.now)
            self.collective(index, action)
        elif kind == "wait_gather" or kind == "wait_reduce":
            started = kind.removeprefix("wait_")
            group.awaited = group.open.get((started, action.index))
            if group.awaited is None:
                group.memory.waited(started, action.index, self.now)
            return group.awaited is None
        elif kind == "reduce_tensor":
            group.awaited = self.collective(index, action)
            return False
        elif kind == "reduce_tied":
            self.meet(index, group.outline.units[action.index].name)
            return False
        elif kind == "free":
            group.memory.freed(action.index, self.now)
        elif kind.startswith("wait_"):
            return self.has_arrived(index, action)
        else:
            self.post(index, group, action)
        return True

    def collective(self, index: int, action: Action) -> Job:
        group = self.groups[index]
        unit = group.work.units[action.index]
        alone_ms = {
            "gather": unit.gather_ms, "reduce": unit.reduce_ms,
            "reduce_tensor": unit.tensor_ms, "reduce_tied": unit.tied_ms,
        }[action.kind]  # fmt: skip
        within = unit.in_node and action.kind in ("gather", "reduce")
        job = Job(action, alone_ms, (index,), within)
        group.open[action.kind, action.index] = job
        if group.collective is None:
            group.collective = job
            self.start(job)
        else:
            group.queue.append(job)
        return job

    def meet(self, index: int, name: str) -> None:
        """A sum over stages starts when every group that holds the unit has come to it."""
        self.met[name].append(index)
        if len(self.met[name]) < self.holders[name]:
            return
        for other in self.met[name]:
            group = self.groups[other]
            units = group.outline.units
            unit = next(u for u, found in enumerate(units) if found.tied and found.name == name)
            group.bubble_ms += self.now - group.blocked_at
            group.blocked_at = self.now
            group.awaited = self.collective(other, Action("reduce_tied", unit))

    # Messages.

    def post(self, index: int, group: Group, action: Action) -> None:
        """A send or a receive; the message travels once both have been posted."""
        key = _key(action)
        message, (direction, source, _) = self.mail[key], key
        sends = self.groups[source % self.pp].work.sends[source // self.pp]
        if action.kind.startswith("send"):
            onward = direction == "activations"
            target = (source + (1 if onward else -1)) % self.pp
            alone_ms = sends.activations_ms if onward else sends.gradients_ms
            within = sends.activations_in_node if onward else sends.gradients_in_node
            message.job = Job(action, alone_ms, (index, target), within)
            message.sent_at = self.now
            group.memory.leaving(key, sends, self.now)
        else:
            message.posted = True
            group.memory.made_room(key, sends, self.now)
        if message.job is not None and message.posted:
            wire = self.wires[message.job.groups[0], message.job.groups[1]]
            wire.append(message.job)
            if len(wire) == 1:
                self.travel(message.job)

    def travel(self, job: Job) -> None:
        for end in job.groups:
            self.groups[end].messages.append(job)
        self.start(job)

    def has_arrived(self, index: int, action: Action) -> bool:
        message = self.mail[_key(action)]
        if message.is_there:
            self.groups[index].memory.taken(_key(action), self.now)
            return True
        message.waiting = index
        return False


def _speed(job: Job, group: Group, other: bool) -> float:
    """Of a collective (other: there are messages) or of a message (there is a collective)."""
    layer = group.layer
    speed = group.speeds(layer.phase, job.in_node)[1] if layer is not None else 1.0
    return speed / 2 if other and group.work.messages_share_wire else speed


def _key(action: Action) -> tuple[str, int, int]:
    """The direction, the sending stage and the micro-batch of the message of an action."""
    verb, direction = action.kind.split("_")
    step = 0 if verb == "send" else -1 if direction == "activations" else 1
    return direction, action.index + step, action.micro_batch
