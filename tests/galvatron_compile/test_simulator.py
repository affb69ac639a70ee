"""The simulator against times and bytes worked out by hand, and what must hold in every walk."""

from __future__ import annotations

from dataclasses import replace

import pytest
from simulated import alone, layer, pipeline, run

from galvatron_compile.actions import Action, LayerOutline, Outline
from galvatron_compile.errors import PlanError
from galvatron_compile.passes.order import order
from galvatron_compile.schedules import bubble_share
from galvatron_compile.simulator import simulate
from galvatron_compile.work import Cores, SendWork, UnitWork, Work

BESIDE = [Action("gather", 0), Action("forward", 0, 0), Action("wait_gather", 0)]


# Slowdown.


@pytest.mark.parametrize(("compute", "gather"), [(10.0, 4.0), (4.0, 10.0), (6.0, 6.0)])
def test_what_starts_together_takes_the_longer_and_part_of_the_shorter(
    compute: float, gather: float
) -> None:
    o = 1.3
    found = alone(
        BESIDE, [layer(compute)], UnitWork(gather_ms=gather),
        compute_slowdown=o, communication_slowdown=o,
    )  # fmt: skip
    longer, shorter = max(compute, gather), min(compute, gather)
    assert found.step_ms == pytest.approx(longer + (o - 1) * shorter)


def test_slowdowns_may_differ() -> None:
    found = alone(
        BESIDE, [layer(12.0)], UnitWork(gather_ms=4.0),
        compute_slowdown=1.5, communication_slowdown=2.0,
    )  # fmt: skip
    # The gather takes 8 ms, in which 8 / 1.5 ms are computed; the rest at full speed.
    assert found.step_ms == pytest.approx(8 + 12 - 8 / 1.5)
    (gather,) = found.timeline.row(0, "communication")
    assert (gather.start_ms, gather.end_ms) == (0.0, 8.0)
    assert found.groups[0].slowed_ms == pytest.approx(8 - 8 / 1.5)


@pytest.mark.parametrize("forward_ms", [0.0, 5e-324, 1e-300])
def test_layers_of_hardly_any_time_do_not_hold_up_a_gather(forward_ms: float) -> None:
    """Half of the least number above 0 is 0, which as a speed would be for ever."""
    found = alone(
        BESIDE, [layer(forward_ms)], UnitWork(gather_ms=4.0), communication_slowdown=2.0
    )
    assert found.step_ms == pytest.approx(4.0)


@pytest.mark.parametrize(("in_node", "end_ms"), [(False, 12 + 4 * 0.5), (True, 12 + 4 * 2.0)])
def test_what_stays_within_a_node_has_slowdowns_of_its_own(in_node: bool, end_ms: float) -> None:
    """Communication as long as before; computation beside it at 1 / 1.5 or 1 / 3 of its speed."""
    found = alone(
        BESIDE, [layer(12.0)], UnitWork(gather_ms=6.0 if not in_node else 12.0, in_node=in_node),
        compute_slowdown=1.5, node_compute_slowdown=3.0,
    )  # fmt: skip
    assert found.step_ms == pytest.approx(end_ms)


@pytest.mark.parametrize(("in_node", "ends"), [(False, 4.0), (True, 8.0)])
def test_computation_slows_down_communication_by_tier(in_node: bool, ends: float) -> None:
    found = alone(
        BESIDE, [layer(12.0)], UnitWork(gather_ms=4.0, in_node=in_node),
        node_communication_slowdown=2.0,
    )  # fmt: skip
    assert found.timeline.row(0, "communication")[0].end_ms == pytest.approx(ends)


def test_sums_within_a_node_slow_down_as_gathers_do() -> None:
    actions = [
        Action("forward", 0, 0), Action("reduce", 0), Action("backward", 0, 0),
        Action("wait_reduce", 0),
    ]  # fmt: skip
    found = alone(
        actions, [layer(1.0, backward=12.0)], UnitWork(reduce_ms=6.0, in_node=True),
        node_compute_slowdown=3.0,
    )  # fmt: skip
    assert found.step_ms == pytest.approx(1 + 6 + (12 - 6 / 3))


@pytest.mark.parametrize("near", ["activations", "gradients"])
def test_messages_within_a_node_slow_down_both_ends(near: str) -> None:
    """A layer runs while the one before it travels for half a millisecond: at half the speed."""
    outlines, works = pipeline(2, 2)
    first = SendWork(activations_ms=0.5, activations_in_node=near == "activations")
    last = SendWork(gradients_ms=0.5, gradients_in_node=near == "gradients")
    works = [
        replace(work, sends=(sends,), node_compute_slowdown=2.0)
        for work, sends in zip(works, (first, last), strict=True)
    ]
    found = run(outlines, works)
    # Behind the first forward (1 ms) of group 0, behind the first backward (2 ms) of group 1.
    took = [
        next(
            span.end_ms - span.start_ms
            for span in found.timeline.row(group, "compute")
            if (span.kind, span.micro_batch) == ("forward", 1)
        )
        for group in (0, 1)
    ]
    assert took == pytest.approx([1.25, 1.0] if near == "activations" else [1.0, 1.25])


def test_beside_both_tiers_the_slower_counts() -> None:
    outlines, works = pipeline(2, 2)
    works[0] = replace(
        works[0], sends=(SendWork(activations_ms=0.5),), compute_slowdown=2.0,
        units=(UnitWork(gather_ms=5.0, in_node=True),), node_compute_slowdown=4.0,
    )  # fmt: skip
    lists = [list(order(outline)) for outline in outlines]
    lists[0] = [Action("gather", 0), *lists[0], Action("wait_gather", 0)]
    found = simulate(outlines, lists, works)
    # A quarter of the speed to 5 ms, half of it would be that beside the message from 4 to 4.5.
    ends = [span.end_ms for span in found.timeline.row(0, "compute")[:2]]
    assert ends == pytest.approx([4.0, 5 + 1 - 0.25])


def test_speeds_change_when_something_starts_or_ends() -> None:
    """A collective that starts with the second of three layers and outlasts it."""
    actions = [
        Action("forward", 0, 0), Action("gather", 0), Action("forward", 1, 0),
        Action("forward", 2, 0), Action("wait_gather", 0),
    ]  # fmt: skip
    found = alone(
        actions, [layer(5.0), layer(2.0), layer(10.0)], UnitWork(gather_ms=4.0),
        compute_slowdown=2.0, communication_slowdown=2.0,
    )  # fmt: skip
    # Everything at half speed from 5 to 13: 2 ms of layer 1 and 2 of layer 2, whose 8 follow.
    ends = [(span.start_ms, span.end_ms) for span in found.timeline.row(0, "compute")]
    assert ends == [(0, 5), (5, 9), (9, 21)]
    assert found.timeline.row(0, "communication")[0].end_ms == pytest.approx(13)


def test_equal_layers_that_run_on_keep_their_own_times() -> None:
    """They are walked as one, with a change of speed in the middle of the second."""
    actions = [
        Action("gather", 0), *(Action("forward", i, 0) for i in range(3)), Action("wait_gather", 0),
    ]  # fmt: skip
    found = alone(
        actions, [layer(4.0)] * 3, UnitWork(gather_ms=6.0),
        compute_slowdown=2.0, communication_slowdown=2.0,
    )  # fmt: skip
    ends = [(span.start_ms, span.end_ms) for span in found.timeline.row(0, "compute")]
    assert ends == [(0, 8), (8, 14), (14, 18)]


@pytest.mark.parametrize(("shares", "gather_ends"), [(False, 6.0), (True, 8.0)])
def test_a_layers_own_collectives_leave_the_wire_or_half_of_it(
    shares: bool, gather_ends: float
) -> None:
    found = alone(
        BESIDE, [layer(2.0, inner=2.0)], UnitWork(gather_ms=6.0), inner_shares_wire=shares
    )
    # Shared: 2 ms computed, 2 ms at half speed take 4; of the gather 2 + 2 are done in those 6.
    assert found.timeline.row(0, "communication")[0].end_ms == pytest.approx(gather_ends)
    compute = found.timeline.row(0, "compute")[0]
    assert compute.end_ms == pytest.approx(6.0 if shares else 4.0)
    assert found.groups[0].inner["tensor_ms"] == 2.0


@pytest.mark.parametrize(("shares", "ends"), [(False, (6.0, 9.0)), (True, (7.0, 9.0))])
def test_a_layers_own_collectives_may_be_work_of_the_cores(
    shares: bool, ends: tuple[float, float]
) -> None:
    """On CPUs: 4 ms at 1 / 1.5 of the speed. A wire that is shared slows them down more."""
    found = alone(
        BESIDE, [layer(2.0, inner=2.0)], UnitWork(gather_ms=6.0 if shares else 7.0),
        inner_computes=True, inner_shares_wire=shares,
        compute_slowdown=1.5, communication_slowdown=1.5,
    )  # fmt: skip
    # The gather does 4 of 7 ms in 6, or 2 + 2 of 6 in 3 + 4; the rest alone.
    compute, gather = (found.timeline.row(0, name)[0] for name in ("compute", "communication"))
    assert (compute.end_ms, gather.end_ms) == pytest.approx(ends)


def test_a_layers_own_collectives_that_only_wait_slow_nothing_down() -> None:
    found = alone(
        BESIDE, [layer(2.0, inner=2.0)], UnitWork(gather_ms=7.0),
        compute_slowdown=1.5, communication_slowdown=1.5,
    )  # fmt: skip
    # 2 ms computed take 3, of the gather 2 are done in them and 2 in the 2 ms that follow.
    compute, gather = (found.timeline.row(0, name)[0] for name in ("compute", "communication"))
    assert (compute.end_ms, gather.end_ms) == pytest.approx((5.0, 8.0))


def test_waiting_is_exposed_by_kind() -> None:
    actions = [
        *BESIDE, Action("backward", 0, 0), Action("reduce", 0), Action("wait_reduce", 0),
        Action("reduce_tensor", 0),
    ]  # fmt: skip
    unit = UnitWork(gather_ms=5.0, reduce_ms=7.0, tensor_ms=1.5)
    found = alone(actions, [layer(3.0, backward=6.0)], unit, optimizer_ms=0.5)
    group = found.groups[0]
    assert group.exposed == {"gather": 2.0, "reduce": 7.0, "reduce_tensor": 1.5}
    assert found.step_ms == 3 + 2 + 6 + 7 + 1.5 + 0.5
    assert group.bubble_ms == 0


# Pipelines.


@pytest.mark.parametrize(
    ("schedule", "pp", "m", "virtual"),
    [
        ("gpipe", 4, 6, 1), ("1f1b", 1, 5, 1), ("1f1b", 4, 9, 1), ("1f1b", 8, 8, 1),
        ("interleaved", 4, 8, 2), ("interleaved", 2, 6, 3), ("zero-bubble", 4, 9, 1),
        ("zero-bubble", 3, 3, 1),
    ],
)  # fmt: skip
def test_a_balanced_pipeline_takes_the_closed_form(
    schedule: str, pp: int, m: int, virtual: int
) -> None:
    """(m + phi (P - 1)) micro-batches, one synchronisation (see passes.pipeline.closed_form)."""
    found = run(*pipeline(pp, m, schedule, virtual))
    expected = 3 * (m + float(bubble_share(schedule, virtual)) * (pp - 1)) + 0.5 + 1.5
    assert found.step_ms == pytest.approx(expected)


def test_messages_travel_while_both_compute_on() -> None:
    found = run(*pipeline(2, 2, messages=True))
    first, second = (found.timeline.row(group, "compute") for group in (0, 1))
    assert second[0].start_ms == pytest.approx(1.25)
    assert first[2].start_ms == pytest.approx(1.25 + 3 + 0.25)
    sent = found.timeline.row(0, "messages")
    assert [(s.kind, s.micro_batch) for s in sent] == [
        ("send_activations", 0), ("send_activations", 1),
    ]  # fmt: skip
    waited = found.groups[0].exposed["send_gradients"]
    assert waited == pytest.approx(2 * 0.25)
    assert found.groups[1].exposed["send_activations"] == pytest.approx(0.25)


def test_messages_and_sums_share_a_wire_where_they_must() -> None:
    """ZeRO-2: the sum of micro-batch 0 runs beside the message to the stage before."""
    outlines, works = pipeline(2, 2, messages=True)
    outlines = [replace(o, units=(replace(o.units[0], zero=2),)) for o in outlines]
    free, shared = (
        run(outlines, [replace(w, messages_share_wire=shares) for w in works])
        for shares in (False, True)
    )
    first, slower = (
        next(s for s in each.timeline.row(1, "messages") if s.micro_batch == 0)
        for each in (free, shared)
    )
    assert first.end_ms - first.start_ms == pytest.approx(0.25)
    assert slower.end_ms - slower.start_ms == pytest.approx(0.5)


def test_sums_over_stages_start_when_all_have_come() -> None:
    outlines, works = pipeline(2, 2)
    outlines = [replace(o, units=(replace(o.units[0], name="tied", tied=True),)) for o in outlines]
    works = [replace(w, units=(replace(w.units[0], tied_ms=2.0),)) for w in works]
    found = run(outlines, works)
    ends = [found.timeline.row(group, "communication")[-1] for group in (0, 1)]
    assert {(s.kind, s.start_ms, s.end_ms) for s in ends} == {("reduce_tied", 9.5, 11.5)}
    # The last stage ends a backward earlier than the first, and waits for it.
    assert found.groups[1].bubble_ms == pytest.approx(1 + 2)
    assert all(group.exposed["reduce_tied"] == pytest.approx(2.0) for group in found.groups)


def test_messages_are_held_from_where_room_is_made_to_where_they_are_taken() -> None:
    outlines, works = pipeline(2, 2, messages=True)
    (first, second) = (group.memory for group in run(outlines, works).groups)
    # The second stage makes room before it waits; both hold an activation on its way.
    assert second.steps[0].num_bytes == 7
    assert dict(first.steps)[1.0] == 7 + 5  # and the first makes room for the gradient
    assert first.steps[-1].num_bytes == second.steps[-1].num_bytes == 0


# What cannot be walked, and how a walk prints.


@pytest.mark.parametrize(
    ("num_micro_batches", "cores", "step_ms"),
    [
        (1, (None, None), 12.0),  # 2 + 2 forward, 4 + 4 backward, one group after the other
        (1, (Cores(0, 1, 1), Cores(0, 1, 1)), 6.0),  # the busy one has both shares of the core
        (1, (Cores(0, 2, 2), Cores(0, 2, 2)), 6.0),
        (1, (Cores(0, 3, 2), Cores(0, 3, 2)), 9.0),  # but no thread more than a core of its own
        (1, (Cores(0, 1, 1), Cores(1, 1, 1)), 12.0),  # the other's core is out of reach
        (1, (Cores(0, 0.5, 1), Cores(1, 0.5, 1)), 12.0),  # and so is the other's half of a core
        (1, (Cores(0, 1.5, 1), Cores(0, 1.5, 1)), 9.0),  # a thread with a core of one and a half
        # Forward: 1 alone, then 2 both busy, then 1 alone; backward likewise, twice as long.
        (2, (Cores(0, 1, 1), Cores(0, 1, 1)), 12.0),
    ],
)
def test_where_ranks_share_cores_idle_groups_speed_up_busy_ones(
    num_micro_batches: int, cores: tuple[Cores | None, Cores | None], step_ms: float
) -> None:
    outlines = [
        Outline(((group,),), {group: LayerOutline("l")}, (), num_micro_batches, "gpipe", 2, group)
        for group in range(2)
    ]
    works = [Work({g: layer(2.0, backward=4.0)}, cores=cores[g]) for g in range(2)]
    found = simulate(outlines, [order(outline) for outline in outlines], works)
    assert found.step_ms == pytest.approx(step_ms)


def test_groups_that_wait_for_each_other_are_refused() -> None:
    outlines, works = pipeline(2, 1)
    lists = [
        [Action("receive_gradients", 0, 0), Action("wait_gradients", 0, 0)],
        [Action("receive_activations", 1, 0), Action("wait_activations", 1, 0)],
    ]
    with pytest.raises(PlanError, match="group 0 waits for ever at 'wait_gradients stage 0 @0'"):
        simulate(outlines, lists, works)


def test_a_work_that_does_not_fit_is_refused() -> None:
    outlines, works = pipeline(1, 1)
    with pytest.raises(PlanError, match="no work is known for layer 0"):
        run(outlines, [replace(works[0], layers={})])
    with pytest.raises(PlanError, match="the work has 0 units, the outline 1"):
        run(outlines, [replace(works[0], units=())])


def test_a_simulation_says_where_the_time_and_the_memory_go() -> None:
    found = run(*pipeline(2, 2, messages=True))
    lines = str(found).splitlines()
    assert lines[0] == f"simulated step: 11.5 ms, bubble {100 * found.bubble_share:.1f} %"
    assert len([line for line in lines if line.startswith(("0 ", "1 "))]) == 2
    assert any("sending gradients: at most 500 µs of a group" in line for line in lines)
    summary = found.summary()
    assert summary["groups"][0]["exposed_ms"]["send_gradients"] == pytest.approx(0.5)
    assert summary["step_ms"] == found.step_ms
