"""The timeline of a plan alone: closed forms, dependencies, and where its times come from."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import example_plans
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from galvatron_compile import simulator, work_json
from galvatron_compile.errors import PlanError
from galvatron_compile.passes.order import order
from galvatron_compile.schedules import why_not
from galvatron_compile.timeline import Span, StageTimes, Timeline, blocks, by_stage, simulate

FORWARD, BACKWARD = 2.0, 4.0


def walk(schedule: str, pp: int, m: int, virtual: int, times: StageTimes) -> Timeline:
    """One layer a stage."""
    number = pp * virtual
    plan = example_plans.bare(
        max(0, number - 2), pp, m, schedule=schedule, virtual=virtual, mixed=False
    )
    outlines, works = by_stage(plan, times)
    return simulator.simulate(outlines, [order(each) for each in outlines], works).timeline


def run(schedule: str, pp: int, m: int, virtual: int = 1, p2p_ms: float = 0.0) -> Timeline:
    """Equal stages: a group needs 2 ms forward and 4 ms backward over all its chunks."""
    number = pp * virtual
    times = StageTimes(
        (FORWARD / virtual,) * number, (BACKWARD / virtual,) * number, (0.0,) * pp, p2p_ms
    )
    return walk(schedule, pp, m, virtual, times)


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b"])
@pytest.mark.parametrize(("pp", "m"), [(1, 3), (2, 2), (4, 4), (4, 16), (8, 24)])
def test_equal_stages_take_the_closed_form(schedule: str, pp: int, m: int) -> None:
    timeline = run(schedule, pp, m)
    assert timeline.total_ms == pytest.approx((pp - 1 + m) * (FORWARD + BACKWARD))
    assert timeline.idle_share == pytest.approx((pp - 1) / (pp - 1 + m))


def test_interleaving_divides_the_bubble_by_the_number_of_chunks() -> None:
    timeline = run("interleaved", 4, 16, virtual=2)
    assert timeline.total_ms == pytest.approx((16 + 3 / 2) * (FORWARD + BACKWARD))
    assert timeline.idle_share < run("1f1b", 4, 16).idle_share


def test_split_backwards_fill_the_bubble() -> None:
    timeline = run("zero-bubble", 4, 16)
    assert timeline.total_ms == pytest.approx((16 + 3 / 3) * (FORWARD + BACKWARD))
    assert timeline.idle_share < run("1f1b", 4, 16).idle_share


def test_p2p_delays_the_neighbour() -> None:
    alone, late = run("1f1b", 2, 2), run("1f1b", 2, 2, p2p_ms=0.5)
    first, moved = (found.row(1, "compute")[0].start_ms for found in (alone, late))
    assert moved == first + 0.5
    assert late.total_ms > alone.total_ms


@st.composite
def pipelines(draw: st.DrawFn) -> tuple[str, int, int, StageTimes]:
    schedule = draw(st.sampled_from(["gpipe", "1f1b", "interleaved", "zero-bubble"]))
    pp, m = draw(st.integers(1, 5)), draw(st.integers(1, 12))
    virtual = draw(st.integers(2, 3)) if schedule == "interleaved" else 1
    if schedule == "interleaved":
        m = pp * (1 + m // pp)
    m = max(m, pp)
    if why_not(schedule, pp, m, virtual):
        schedule, virtual = "1f1b", 1
    times = st.lists(st.floats(0.1, 9.0), min_size=pp * virtual, max_size=pp * virtual).map(tuple)
    once = draw(st.sampled_from([0.0, 3.0]))
    return schedule, m, virtual, StageTimes(draw(times), draw(times), (once,) * pp, 0.25)


@given(pipelines())
@settings(max_examples=60, deadline=None)
def test_everything_runs_once_and_waits_for_what_it_needs(
    case: tuple[str, int, int, StageTimes],
) -> None:
    schedule, m, virtual, times = case
    pp = len(times.step_once_ms)
    timeline = walk(schedule, pp, m, virtual, times)
    found: dict[tuple[str, int, int], Span] = {}
    for group in range(pp):
        row = timeline.row(group, "compute")
        assert all(a.end_ms <= b.start_ms for a, b in pairwise(row))
        assert [s.kind for s in row].count("optimizer") == (times.step_once_ms[group] > 0)
        for span in row:
            key = (span.kind, span.index, span.micro_batch)  # one layer a stage
            assert key not in found or span.kind == "optimizer"
            found[key] = span
    stages = range(pp * virtual)
    for stage in stages:
        for batch in range(m):
            forward = found["forward", stage, batch]
            whole = found.get(("backward", stage, batch))
            backward = whole or found["backward_input", stage, batch]
            assert backward.start_ms >= forward.end_ms
            if whole is None:
                weights = found["backward_weight", stage, batch]
                assert weights.start_ms >= backward.end_ms
            if stage > 0:
                assert forward.start_ms >= found["forward", stage - 1, batch].end_ms + times.p2p_ms
            if stage + 1 in stages:
                after = found.get(("backward", stage + 1, batch))
                after = after or found["backward_input", stage + 1, batch]
                assert backward.start_ms >= after.end_ms + times.p2p_ms
    busy = m * (sum(times.forward_ms) + sum(times.backward_ms)) + sum(times.step_once_ms)
    assert timeline.idle_share == pytest.approx(1 - busy / (pp * timeline.total_ms))


def test_a_plan_that_its_schedule_cannot_run_is_refused() -> None:
    plan = example_plans.bare(30, 4, 6, schedule="interleaved", virtual=2)
    with pytest.raises(PlanError, match="multiple of 4 micro-batches"):
        simulate(plan)


def test_times_come_from_the_groups() -> None:
    plan = example_plans.planned(30, 4, 8)
    times, groups = StageTimes.of(plan), plan.predicted["groups"]
    assert times.forward_ms == pytest.approx([group["forward_ms"] for group in groups])
    assert times.step_once_ms == (38.0,) * 4
    assert not times.assumed


def test_a_groups_time_is_spread_over_its_chunks_as_its_layers_are() -> None:
    plan = example_plans.planned(30, 2, 8, schedule="interleaved", virtual=2)
    times, groups = StageTimes.of(plan), plan.predicted["groups"]
    for group in range(2):
        mine = times.forward_ms[group::2]
        assert sum(mine) == pytest.approx(groups[group]["forward_ms"])
    # The first stage has the embedding, which is nearly free, in place of a block.
    assert times.forward_ms[0] < 0.9 * times.forward_ms[2]


def test_times_come_from_the_layers_without_groups() -> None:
    plan = example_plans.planned(30, 4, 8)
    layers = plan.predicted["layers"]
    times = StageTimes.of(replace(plan, predicted={"layers": layers}))
    assert times.backward_ms[1] == pytest.approx(sum(x["backward_ms"] for x in layers[8:16]))
    assert not times.assumed


def test_without_predictions_all_layers_count_the_same() -> None:
    times = StageTimes.of(example_plans.bare(30, 4, 8))
    assert times.forward_ms == (8.0,) * 4
    assert times.backward_ms == (16.0,) * 4
    assert times.assumed


def test_transfers_share_the_pipeline_communication() -> None:
    plan = example_plans.planned(30, 4, 8)
    causes = {**plan.predicted["causes"], "pipeline_comm_ms": 48.0}
    plan = replace(plan, predicted={**plan.predicted, "causes": causes})
    assert StageTimes.of(plan).p2p_ms == 3.0  # of 8 micro-batches, there and back
    plan = replace(plan, predicted={**plan.predicted, "slowest_group": 3})
    assert StageTimes.of(plan).p2p_ms == 6.0  # the last stage sends back only


def test_a_large_pipeline_runs_to_its_end() -> None:
    timeline = simulate(example_plans.planned(126, 64, 512))
    lengths = {len(timeline.row(group, "compute")) for group in range(64)}
    assert lengths == {2 * 512 + 1}
    assert 0.1 < timeline.idle_share < 0.5


def test_work_that_no_longer_fits_an_edited_plan_counts_as_nothing() -> None:
    plan = example_plans.planned(30, 4, 8)
    outlines, works = by_stage(plan, StageTimes.of(plan))
    # Made for one layer a stage, while the plan has eight: the stages' own times are taken.
    kept = replace(plan, predicted={**plan.predicted, "work": work_json.dump(outlines, works)})
    assert work_json.of_plan(kept) is None
    assert simulate(kept) == simulate(plan)


def test_boxes_join_what_goes_on_at_once_and_nothing_else() -> None:
    def span(kind: str, index: int, batch: int, start: float, end: float) -> Span:
        return Span(kind, index, batch, "compute", start, end)

    row = [
        span("forward", 0, 0, 0, 1), span("forward", 1, 0, 1, 2),
        Span("gather", 0, -1, "communication", 0, 2),
        span("forward", 2, 0, 2, 3),  # another stage of the group
        span("recompute", 1, 0, 4, 5), span("backward_input", 1, 0, 5, 6),
        span("backward_input", 0, 0, 6, 7), span("backward_weight", 1, 0, 7, 8),
        span("backward_weight", 0, 0, 9, 10),  # it had to wait
        span("optimizer", -1, -1, 10, 11),
    ]  # fmt: skip
    found = [(s.kind, chunk, s.start_ms, s.end_ms) for s, chunk in blocks(row, (0, 0, 1))]
    assert found == [
        ("forward", 0, 0, 2), ("forward", 1, 2, 3), ("backward_input", 0, 4, 7),
        ("backward_weight", 0, 7, 8), ("backward_weight", 0, 9, 10), ("optimizer", 0, 10, 11),
    ]  # fmt: skip
