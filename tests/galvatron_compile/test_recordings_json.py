"""Recordings on disk: what is read is what was written, and what is damaged is refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import recorded_by_hand as hand

from galvatron_compile import recordings_json
from galvatron_compile.errors import PlanError
from galvatron_compile.recordings import Recordings


def test_round_trip(tmp_path: Path) -> None:
    recordings = hand.pipeline()
    recordings.save(tmp_path / "r.json")
    assert Recordings.load(tmp_path / "r.json") == recordings
    text = (tmp_path / "r.json").read_text(encoding="utf-8")
    assert '\n   ["forward", 0, 0, 1, 4, 110, 130],\n' in text  # a line an action


def test_memory_may_be_unknown(tmp_path: Path) -> None:
    recordings = hand.pipeline()
    bare = tuple(
        type(r)(r.rank, r.units, r.events, r.start_ms, r.end_ms) for r in recordings.ranks
    )
    without = hand.pipeline(ranks=bare)
    assert recordings_json.from_json(recordings_json.to_json(without)) == without
    assert without.timeline().memory == ()


def edited(path: list[Any], value: Any) -> str:
    document = json.loads(recordings_json.to_json(hand.pipeline()))
    place = document
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    return json.dumps(document)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (["what"], "plan", "this is not a recording"),
        (["version"], 7, "schema version 7, this version reads 1"),
        (["columns"], ["kind"], r"recording.columns must be \['kind', 'index'"),
        (["pp"], 3, "2 ranks do not divide into pp=3 groups"),
        (["more"], 1, "unknown field 'more'"),
        (["ranks", 0, "rank"], 1, r"every rank once, in order, got \[1, 1\]"),
        (["ranks", 0, "units"], [], r"ranks\[0\].events\[5\]: there is no unit 0"),
        (["ranks", 0, "start_bytes"], "no", r"ranks\[0\].start_bytes must be an integer"),
        (["ranks", 0, "end_ms"], None, r"ranks\[0\].end_ms must be a finite number, got None"),
        (["ranks", 1, "events", 0, 0], "dance", r"ranks\[1\].events\[0\]: 'dance' is no action"),
        (["ranks", 1, "events", 0, 1], 0.5, r"events\[0\]: index, micro_batch and bytes must be"),
        (["ranks", 1, "events", 0, 3], "1", r"events\[0\]: start_ms must be a finite number"),
        (["ranks", 1, "events", 0], [1, 2], r"events\[0\] must be a list of kind, index"),
        (["ranks", 1, "events", 0, 3], 30.0, "rank 1 goes back in time"),
        (["all_step_ms"], [float("nan")], "all_step_ms must be a finite number, got nan"),
        (["all_step_ms"], [True], "all_step_ms must be a finite number, got True"),
    ],
)
def test_damage_is_refused_by_name(path: list[Any], value: Any, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        recordings_json.from_json(edited(path, value))


def test_files_that_are_none_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=r"there is no recording at .*x\.json; make one with"):
        Recordings.load(tmp_path / "x.json")
    (tmp_path / "y.json").write_text('{"what": ', encoding="utf-8")
    with pytest.raises(PlanError, match=r"y\.json: recording is not valid JSON: .* line 1 column"):
        Recordings.load(tmp_path / "y.json")
    (tmp_path / "z.json").write_bytes(b"\xff")
    with pytest.raises(PlanError, match=r"cannot read the recording at .*z\.json"):
        Recordings.load(tmp_path / "z.json")


def test_a_message_without_an_end_is_refused() -> None:
    text = edited(["ranks", 1, "events", 1, 2], 5)
    with pytest.raises(PlanError, match="rank 1 never takes; the recording is incomplete"):
        _ = recordings_json.from_json(text).messages


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"plan": "dp2"}, "another plan: dp2, but the plan has dp1"),
        ({"global_batch_size": 8}, "another global batch: 8, but the plan has 4"),
    ],
)
def test_a_recording_of_another_plan_is_refused(changes: dict[str, Any], message: str) -> None:
    hand.pipeline().check_plan(hand.plan())
    with pytest.raises(PlanError, match=message):
        hand.pipeline(**changes).check_plan(hand.plan())
