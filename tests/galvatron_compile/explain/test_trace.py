"""Predicted and measured on one page and in one picture."""

from __future__ import annotations

import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
import recorded_by_hand as hand

from galvatron_compile.errors import UnsupportedError
from galvatron_compile.explain import page
from galvatron_compile.explain.svg import WIDTH
from galvatron_compile.explain.trace import sections
from galvatron_compile.explain.trace_lines import lines
from galvatron_compile.explain.trace_png import draw
from galvatron_compile.recorded import Recording
from galvatron_compile.trace import Trace


class Balanced(HTMLParser):
    """Every element is closed where it should be."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: object) -> None:
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: object) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@pytest.fixture
def trace() -> Trace:
    return Trace.of(hand.predicted(), hand.pipeline())


def test_every_group_has_both_lines_under_each_other(trace: Trace) -> None:
    assert [line.label for line in lines(trace)] == [
        "stage 0 predicted", "stage 0 measured", "stage 1 predicted", "stage 1 measured",
    ]  # fmt: skip
    measured = lines(trace)[1]
    kinds = [(span.kind, span.start_ms, span.end_ms) for span, _ in measured.boxes]
    assert kinds == [("forward", 1, 4), ("backward", 14, 18), ("optimizer", 20, 21)]


def test_both_timelines_share_the_axis(trace: Trace) -> None:
    """What was measured for 3 ms is drawn as wide as 3 ms of what was predicted."""
    figure = sections(trace)[0].figure
    boxes = re.findall(
        r'x="([\d.]+)" y="[\d.]+" width="([\d.]+)"[^>]*><title>(stage 0 \w+): (\w+)', figure
    )
    widths = {(who, kind): float(width) + 0.6 for _, width, who, kind in boxes}
    per_ms = (WIDTH - 148) / 22
    assert widths["stage 0 measured", "forward"] == pytest.approx(3 * per_ms, abs=0.02)
    assert widths["stage 0 predicted", "forward"] == pytest.approx(2 * per_ms, abs=0.02)
    assert max(float(x) + float(width) for x, width, _, _ in boxes) <= WIDTH


def test_the_table_has_every_cause_twice_and_their_ratio(trace: Trace) -> None:
    first, memory, by_group = sections(trace)
    rows = {row[0]: row[1:] for row in first.tables[0].rows}
    # Predicted: forward 2, send 1, forward and backward 3, send 1, backward 4, sums 0.5 and 1,
    # optimizer 1; measured: see recorded_by_hand.
    assert rows["the whole step"] == ("13.50", "22.00", "1.63")
    assert rows["layers"] == ("4.50", "5.00", "1.11")
    assert rows["optimizer"] == ("1.00", "0.50", "0.50")
    columns = [[float(row[side]) for row in rows.values()] for side in (0, 1)]
    for whole, *parts in columns:
        assert sum(parts) == pytest.approx(whole, abs=0.03)
    assert [row[0] for row in memory.tables[0].rows] == ["stage 0", "stage 1"]
    assert ("stage 0", "layers", "6.00", "7.00", "1.17") in by_group.tables[0].rows


def test_memory_leaves_out_what_a_recording_cannot_see(trace: Trace) -> None:
    first, second = trace.peaks
    # Parameters, room for the gradient that will come, activations, workspace; no reserve (7).
    assert (first.predicted, first.measured) == (100 + 4 + 10 + 20, 140)
    assert (second.predicted, second.measured) == (80 + 5 + 9, 105)
    memory = sections(trace)[1]
    assert memory.lead == (
        "Stage 0 holds the most: 140 B at its peak, 4.5 % more than the predicted 134 B."
    )
    assert memory.figure.count("<polyline") == 4


def test_the_page_is_whole_and_has_the_sections(trace: Trace) -> None:
    html = page(hand.predicted(), trace)
    reader = Balanced()
    reader.feed(html)
    assert reader.open == []
    assert "measured step" in html
    assert "Where the time goes, predicted and measured" in html
    assert "src=" not in html
    classes = set(re.findall(r'class="(curve measured|end-mark|swatch line-[a-z]+)"', html))
    assert len(classes) == 4
    style = html.split("<style>")[1].split("</style>")[0]
    assert all(f".{name.split()[-1]}" in style for name in classes)
    assert "measured step" not in page(hand.predicted())


def test_a_plan_without_a_prediction_says_so_and_shows_what_was_measured() -> None:
    trace = Trace.of(hand.plan(), hand.pipeline())
    first, memory, _ = sections(trace)
    assert "predicts nothing: it was written by hand" in first.lead
    assert "`galvatron-compile price` gives it what is missing" in first.lead
    assert [line.label for line in lines(trace)] == ["stage 0 measured", "stage 1 measured"]
    assert first.tables[0].rows[0] == ("the whole step", "–", "22.00", "–")
    assert memory.lead.endswith("the plan predicts no memory over time.")
    assert "predicts nothing" in page(hand.plan(), trace)


def test_a_plan_that_predicts_whole_stages_lacks_the_actions() -> None:
    groups = [{"forward_ms": 2.0, "backward_ms": 4.0}, {"forward_ms": 1.0, "backward_ms": 2.0}]
    plan = replace(hand.plan(), predicted={"step_ms": 9.0, "groups": groups})
    trace = Trace.of(plan, hand.pipeline())
    first, _, _ = sections(trace)
    assert "whole stages but not of every action" in first.lead
    assert first.tables[0].rows[0][:2] == ("the whole step", "9.00")
    assert len(lines(trace)) == 4


def test_without_an_optimizer_neither_side_has_one() -> None:
    recordings = hand.pipeline()
    ranks = tuple(
        replace(r, events=tuple(e for e in r.events if e.kind != "optimizer"))
        for r in recordings.ranks
    )
    trace = Trace.of(hand.predicted(), hand.pipeline(ranks=ranks))
    assert trace.rows[0].predicted == pytest.approx(13.5 - 1)
    assert any("left out on both sides" in note for note in sections(trace)[0].notes)


def test_a_recording_without_memory_says_so() -> None:
    ranks = tuple(
        Recording(r.rank, r.units, r.events, r.start_ms, r.end_ms) for r in hand.pipeline().ranks
    )
    memory = sections(Trace.of(hand.predicted(), hand.pipeline(ranks=ranks)))[1]
    assert memory.lead == "The recording has no memory."


def test_the_picture_is_written_and_other_formats_refused(trace: Trace, tmp_path: Path) -> None:
    draw(trace, tmp_path / "trace.png")
    assert (tmp_path / "trace.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    draw(trace, tmp_path / "trace.svg")
    text = (tmp_path / "trace.svg").read_text(encoding="utf-8")
    for label in ("stage 0 predicted", "stage 1 measured", "summing gradients"):
        assert label in text
    with pytest.raises(UnsupportedError, match=r"cannot write a picture as \.doc; use"):
        draw(trace, tmp_path / "trace.doc")
    with pytest.raises(UnsupportedError, match="cannot write"):
        draw(trace, tmp_path / "missing" / "trace.png")
