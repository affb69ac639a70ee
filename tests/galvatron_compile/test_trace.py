"""What was predicted and what was measured, quantity by quantity."""

from __future__ import annotations

from dataclasses import replace

import pytest
import recorded_by_hand as hand

from galvatron_compile import work_json
from galvatron_compile.errors import PlanError
from galvatron_compile.trace import Row, Trace


def test_causes_of_a_rank_add_up_to_the_step_on_both_sides() -> None:
    trace = Trace.of(hand.predicted(), hand.pipeline())
    whole = trace.rows[0]
    for group in (0, 1):
        rows = trace.causes(group)
        assert sum(row.predicted or 0 for row in rows) == pytest.approx(whole.predicted)
        assert sum(row.measured or 0 for row in rows) == pytest.approx(whole.measured)
    names = [row.name for row in trace.causes(0)]
    assert names == [
        "layers", "summing gradients", "summing gradients over stages", "sending activations",
        "sending gradients", "optimizer", "bubble", "between and around the actions",
    ]  # fmt: skip


def test_means_over_ranks_by_hand() -> None:
    rows = {row.name: row for row in Trace.of(hand.predicted(), hand.pipeline()).rows}
    assert rows["layers"] == Row("layers", (6 + 3) / 2, (7 + 3) / 2)
    assert rows["exposed communication"].measured == (3.5 + 4) / 2
    assert rows["bubble"].measured == 13 / 2


def test_a_ratio_needs_both_sides() -> None:
    assert Row("x", 2.0, 3.0).ratio == 1.5
    for predicted, measured in ((None, 3.0), (0.0, 3.0), (1.0, None)):
        assert Row("x", predicted, measured).ratio is None


def test_of_a_group_the_rank_that_computed_longest_is_compared() -> None:
    first, second = hand.pipeline().ranks
    quick = replace(second, rank=0)
    slow = replace(first, rank=1)
    one_group = hand.pipeline(ranks=(quick, slow), pp=1)
    assert one_group.of_group(0) is slow


def test_the_reserve_is_no_tensor() -> None:
    trace = Trace.of(hand.predicted(), hand.pipeline())
    assert trace.simulation is not None
    peak = trace.simulation.groups[0].memory.peak_bytes
    assert trace.peaks[0].predicted == peak - 7


def test_a_damaged_prediction_counts_as_none() -> None:
    plan = hand.predicted(**{work_json.KEY: [{}, {}]})
    trace = Trace.of(plan, hand.pipeline())
    assert trace.simulation is None
    assert "predicts nothing" in trace.missing


def test_a_recording_of_another_plan_is_refused() -> None:
    plan = replace(hand.predicted(), num_micro_batches=2, predicted={})
    with pytest.raises(PlanError, match="the recording is of another plan: dp1; stages=1,1"):
        Trace.of(plan, hand.pipeline())
