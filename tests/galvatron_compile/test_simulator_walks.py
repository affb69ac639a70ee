"""What must hold in every walk of the simulator, and walks that are long."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from simulated import run

from galvatron_compile.actions import COMPUTE, LayerOutline, Outline, UnitOutline
from galvatron_compile.passes.order import order
from galvatron_compile.schedules import why_not
from galvatron_compile.simulated_group import Group, Job
from galvatron_compile.simulator import simulate
from galvatron_compile.work import LayerWork, Phase, SendWork, UnitWork, Work


@st.composite
def any_pipeline(draw: st.DrawFn) -> tuple[list[Outline], list[Work]]:
    schedule = draw(st.sampled_from(["gpipe", "1f1b", "interleaved", "zero-bubble"]))
    pp, m = draw(st.integers(1, 4)), draw(st.integers(1, 5))
    virtual = 2 if schedule == "interleaved" else 1
    m = pp * (1 + m // pp) if virtual > 1 else max(m, pp)
    if why_not(schedule, pp, m, virtual):
        schedule, virtual = "1f1b", 1
    per_stage, time = draw(st.integers(1, 3)), st.sampled_from([0.0, 0.5, 1.0, 3.0])
    size = st.integers(0, 9)
    alike = LayerWork(Phase(1, 0.5), Phase(2, 0.5), Phase(1))
    outlines, works = [], []
    for group in range(pp):
        chunks = tuple(
            tuple(range(stage * per_stage, (stage + 1) * per_stage))
            for stage in range(group, pp * virtual, pp)
        )
        numbers = [i for chunk in chunks for i in chunk]
        zero = draw(st.integers(0, 3))
        tied = {0: "tied", pp - 1: "tied"}.get(group) if pp > 1 else None
        units = [
            UnitOutline(f"of {i}", zero, gathers=zero > 0, varying=i % 2 == 0) for i in numbers
        ]
        units += [UnitOutline(tied, zero, gathers=zero > 0, tied=True)] if tied else []
        layers = {
            i: LayerOutline(f"layer {i}", (u,), draw(st.booleans()))
            for u, i in enumerate(numbers)
        }
        if tied:
            layers[numbers[0]] = replace(layers[numbers[0]], units=(0, len(units) - 1))
        outlines.append(Outline(chunks, layers, tuple(units), m, schedule, pp, group))
        priced = {
            i: alike
            if draw(st.booleans())
            else LayerWork(
                Phase(draw(time), draw(time)), Phase(draw(time), 0, draw(time)), Phase(1.0),
                draw(st.floats(0, 1)), draw(size), draw(size), draw(size),
            )
            for i in numbers
        }  # fmt: skip
        last = pp * virtual - 1
        slow = st.sampled_from([1.0, 1.25, 2.0])
        works.append(
            Work(
                priced,
                tuple(
                    UnitWork(
                        draw(time), draw(time), draw(time), draw(time), 2, 4, 3, 8, 2,
                        in_node=draw(st.booleans()),
                    )
                    for _ in units
                ),
                tuple(
                    SendWork(
                        draw(time) * (s < last), draw(time) * (s > 0), 3, 4,
                        draw(st.booleans()), draw(st.booleans()),
                    )
                    for s in range(group, pp * virtual, pp)
                ),
                draw(time), 11, draw(slow), draw(slow), draw(st.booleans()), draw(st.booleans()),
                None, draw(slow), draw(slow),
            )
        )  # fmt: skip
    return outlines, works


@given(any_pipeline())
@settings(max_examples=120, deadline=None)
def test_every_action_runs_once_and_the_causes_add_up_to_the_step(
    given_: tuple[list[Outline], list[Work]],
) -> None:
    outlines, works = given_
    found = run(outlines, works)
    for outline, work, group in zip(outlines, works, found.groups, strict=True):
        assert sum(group.causes().values()) == pytest.approx(found.step_ms)
        assert group.bubble_ms >= -1e-9 and group.slowed_ms >= -1e-9
        compute = [s for s in group.spans if s.stream == "compute"]
        ran = [(s.kind, s.index, s.micro_batch) for s in compute if s.kind != "optimizer"]
        listed = [(a.kind, a.index, a.micro_batch) for a in order(outline) if a.kind in COMPUTE]
        assert Counter(ran) == Counter(listed)
        for stream in ("compute", "communication"):
            row = found.timeline.row(outline.group, stream)  # type: ignore[arg-type]
            assert all(a.end_ms <= b.start_ms + 1e-9 for a, b in pairwise(row))
        assert group.memory.peak_bytes >= max(held.num_bytes for held in group.memory.steps)
        resident = 11 + sum(u.parameter_bytes + u.optimizer_bytes for u in work.units)
        trained = {u for x in outline.layers.values() for u in x.units}
        assert group.memory.steps[-1].num_bytes == resident + 2 * len(trained) + _persistent(
            outline
        )


def _persistent(outline: Outline) -> int:
    """Working parameters that were gathered and stay, where the work counts them so."""
    return 3 * sum(unit.gathers and unit.zero != 3 for unit in outline.units)


@given(any_pipeline())
@settings(max_examples=60, deadline=None)
def test_walking_equal_layers_as_one_changes_nothing(
    given_: tuple[list[Outline], list[Work]],
) -> None:
    together = run(*given_)
    original = Group.next_run

    def one_at_a_time(self: Group, index: int) -> Job:
        job = original(self, index)
        self.at -= len(self.run) - 1
        self.run = self.run[:1]
        job.alone_ms = job.left = self.phase(job.action).alone_ms
        return job

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Group, "next_run", one_at_a_time)
        apart = run(*given_)
    assert together.step_ms == pytest.approx(apart.step_ms)
    for one, other in zip(together.groups, apart.groups, strict=True):
        ends, others = (
            {(s.kind, s.index, s.micro_batch): s.end_ms for s in group.spans if s.micro_batch >= 0}
            for group in (one, other)
        )
        assert ends == pytest.approx(others)
        assert one.bubble_ms == pytest.approx(other.bubble_ms, abs=1e-6)


def test_sixteen_groups_of_five_layers_are_walked_action_by_action() -> None:
    """64 micro-batches under ZeRO-3: fifty thousand actions, a fraction of a second."""
    outlines, works = [], []
    for group in range(16):
        numbers = range(5 * group, 5 * group + 5)
        units = tuple(UnitOutline(f"of {i}", zero=3) for i in numbers)
        layers = {i: LayerOutline(f"layer {i}", (u,)) for u, i in enumerate(numbers)}
        outlines.append(Outline((tuple(numbers),), layers, units, 64, "1f1b", 16, group))
        each = LayerWork(Phase(1.0), Phase(2.0), saved_bytes=1)
        works.append(Work(dict.fromkeys(numbers, each), (UnitWork(0.5, 0.5, working_bytes=9),) * 5))
    lists = [order(outline) for outline in outlines]
    assert sum(map(len, lists)) > 50_000
    found = simulate(outlines, lists, works)
    # Every first gather of a pass is seen, by every group on the way of the first micro-batch.
    balanced = 15 * (64 + 15)
    assert balanced < found.step_ms < 1.01 * balanced + 16 * 0.5
    peaks = [group.memory.parts["saved activations"] for group in found.groups]
    assert peaks == [5 * min(64, 16 - group) for group in range(16)]
