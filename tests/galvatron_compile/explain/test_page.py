"""The page of a plan: whole, self-contained, true to the plan, and sparing where it says little."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from dataclasses import replace
from html import unescape
from html.parser import HTMLParser
from typing import Any

import example_plans
import pytest

from galvatron_compile import notation
from galvatron_compile.explain import page
from galvatron_compile.plans import Plan

VOID = {"meta", "br", "hr", "img", "input", "link"}
DRAWN = {"rect", "line", "circle", "polyline", "path"}  # may close themselves, in SVG


class Reader(HTMLParser):
    """Collects texts by section and checks that every element is closed where it should be."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.sections: dict[str, str] = {}
        self.section = ""
        self.attributes: list[tuple[str, str | None]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += attrs
        assert tag in DRAWN, f"<{tag}/> is not empty"

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "h2":
            self.section = data
        if self.open and self.open[-1] == "title":
            return  # tips, which one sees only when pointing
        self.sections[self.section] = self.sections.get(self.section, "") + data + " "


def read(plan: Plan) -> tuple[str, Reader]:
    text = page(plan)
    reader = Reader()
    reader.feed(text)
    reader.close()
    assert reader.open == []
    return text, reader


def with_predicted(plan: Plan, **changed: Any) -> Plan:
    return replace(plan, predicted={**plan.predicted, **changed})


PLANS = {
    "four stages": example_plans.planned(30, 4, 16),
    "sixty-four stages": example_plans.planned(126, 64, 256),
    "interleaved": example_plans.planned(30, 4, 16, schedule="interleaved", virtual=2),
    "zero-bubble": example_plans.planned(30, 4, 16, schedule="zero-bubble"),
    "one stage": example_plans.of_one_stage(),
    "by hand": example_plans.bare(30, 4, 8),
    "one layer": Plan("", 1, 1, 1, ("only",), (example_plans.Strategy(),)),
}


@pytest.mark.parametrize("name", PLANS)
def test_page_is_whole_and_needs_nothing_else(name: str) -> None:
    text, reader = read(PLANS[name])
    assert text.startswith("<!doctype html>")
    assert "<script" not in text
    assert not re.search(r"https?:|//[a-z]|@import|url\(", text)
    assert not {"src", "href", "onclick", "onload"} & {key for key, _ in reader.attributes}
    assert "None" not in text
    assert "nan" not in re.sub(r"[a-z]+nan|nan[a-z]+", "", text.lower())
    for figure in re.findall(r"<svg.*?</svg>", text, flags=re.DOTALL):
        root = ET.fromstring(figure)
        width, height = map(float, root.attrib["viewBox"].split()[2:])
        for rect in root.iter("rect"):
            x, y, w, h = (float(rect.attrib[key]) for key in ("x", "y", "width", "height"))
            assert x >= 0 and y >= 0 and x + w <= width + 0.5 and y + h <= height, rect.attrib


@pytest.mark.parametrize("name", PLANS)
def test_every_colour_is_defined(name: str) -> None:
    text, _ = read(PLANS[name])
    style, body = text.split("</style>")
    used = {c for found in re.findall(r'<(?:rect|path|i) class="([^"]+)"', body)
            for c in found.split()} - {"swatch", "none"}  # fmt: skip
    assert {c for c in used if not re.search(rf"\.{c}[ ,{{]", style)} == set()


def test_headline_has_the_plans_numbers() -> None:
    plan = PLANS["four stages"]
    _, reader = read(plan)
    head = reader.sections[""]
    for expected in (
        "Llama-3-70B", "128 ranks", "pipeline of 4 groups with 32 ranks each", "1F1B schedule",
        "global batch 256 × 8,192 tokens", "9.95 s", "210,799", "41.0 %", "31.5 GiB",
        "of 76.0 GiB (41.4 %)", "compute of stage 1 (62 %)", "128 × 8 × H100",
        notation.format(plan),
    ):  # fmt: skip
        assert expected in head, expected


def test_warnings_come_before_the_numbers() -> None:
    text, reader = read(with_predicted(PLANS["four stages"], warnings=["NOT MEASURED: defaults."]))
    assert "NOT MEASURED: defaults." in reader.sections[""]
    assert text.index('class="warning"') < text.index('class="figures"')
    assert 'class="warning"' not in read(PLANS["four stages"])[0]


def test_causes_add_up_to_the_step() -> None:
    _, reader = read(PLANS["four stages"])
    section = reader.sections["Where the time goes"]
    assert "72.1 % of the step is computation" in section
    assert re.search(r"pipeline bubble\s+1,565\s+15\.7 %", section)
    assert re.search(r"the whole step\s+9,949\s+100\.0 %", section)


def test_what_the_causes_leave_is_shown() -> None:
    plan = with_predicted(PLANS["four stages"], causes={"compute_ms": 6000.0})
    section = read(plan)[1].sections["Where the time goes"]
    assert re.search(r"not explained\s+3,949\s+39\.7 %", section)


def test_memory_names_the_fullest_stage_and_what_is_left() -> None:
    section = read(PLANS["four stages"])[1].sections["Memory of a rank"]
    assert "Stage 1 needs the most: 31.5 GiB of 76.0 GiB" in section
    assert "44.5 GiB are left" in section
    assert "8–15" in section


def test_too_much_memory_is_loud() -> None:
    plan = with_predicted(PLANS["four stages"], memory_limit_bytes=30 * 2**30)
    text, reader = read(plan)
    assert "1.46 GiB TOO MUCH" in reader.sections["Memory of a rank"]
    assert 'class="gauge over"' in text


def test_layers_are_grouped_in_runs() -> None:
    section = read(PLANS["four stages"])[1].sections["Strategy of every layer"]
    assert "32 layers, 2 strategies. 4 stages" in section
    assert re.search(
        r"1–6\s+layers\.0 … layers\.5\s+6\s+B  tp8\.sp\.dp4\.zero1\.recompute", section
    )
    assert re.search(r"stage 0\s+stage 1\s+stage 2\s+stage 3", section)


def test_groups_are_written_beneath_interleaved_stages() -> None:
    section = read(PLANS["interleaved"])[1].sections["Strategy of every layer"]
    assert re.search(r"group 3\s+group 0\s+group 1", section)


def test_timeline_shows_every_micro_batch_where_there_is_room() -> None:
    text, reader = read(PLANS["four stages"])
    assert text.count("forward of micro-batch ") == 4 * 16
    assert text.count("backward of micro-batch ") == 4 * 16
    section = reader.sections["The pipeline's timeline"]
    assert "4 stages, 16 micro-batches, 1F1B schedule, simulated action by action" in section
    assert "Only the first" not in section


def test_timeline_of_many_micro_batches_is_cut_and_says_so() -> None:
    text, reader = read(PLANS["sixty-four stages"])
    assert "Only the first and the last" in reader.sections["The pipeline's timeline"]
    assert len(text) < 1_000_000


def test_schedule_that_cannot_run_is_said() -> None:
    plan = example_plans.planned(30, 4, 2)
    section = read(plan)[1].sections["The pipeline's timeline"]
    assert "cannot be drawn: 1f1b over 4 groups needs at least 4 micro-batches" in section


def test_tradeoff_marks_the_plan() -> None:
    text, reader = read(PLANS["four stages"])
    section = reader.sections["Step time against memory limit"]
    assert "this plan: 9.95 s at 76.0 GiB" in section
    assert "This plan is 4.2 % slower than it could be there" in section
    assert text.count('class="chosen"') == 1


def test_rivals_say_how_far_behind_and_why() -> None:
    sections = read(PLANS["four stages"])[1].sections
    assert "The nearest is 2.1 % slower." in sections["Runners-up"]
    assert "gathers of ZeRO-3 cross nodes" in sections["Runners-up"]
    assert re.search(r"pure FSDP\s+dp128\.zero3\s+[\d,]+\s+62\.0 %", sections["Standard baselines"])
    assert "1 of them cannot run." in sections["Standard baselines"]
    assert "81.3 GiB of 76.0 GiB" in sections["Rejected families"]


def test_plan_of_one_stage_shows_what_it_has() -> None:
    sections = read(PLANS["one stage"])[1].sections
    assert "83.0 % of the step is computation" in sections["Where the time goes"]
    assert "A rank needs 78.9 GiB" in sections["Memory of a rank"]
    assert "There is no pipeline" in sections["The pipeline's timeline"]
    assert "does not say what other memory limits" in sections["Step time against memory limit"]


def test_plan_by_hand_says_what_is_missing() -> None:
    sections = read(PLANS["by hand"])[1].sections
    assert "This plan predicts nothing" in sections[""]
    assert "does not say what its step time is spent on" in sections["Where the time goes"]
    assert "which is assumed here" in sections["The pipeline's timeline"]


@pytest.mark.parametrize("key", sorted(PLANS["four stages"].predicted))
@pytest.mark.parametrize("value", [None, "text", 7, [], [1], {}, [{}], [{"step_ms": "x"}], -1.0])
def test_no_prediction_breaks_the_page(key: str, value: Any) -> None:
    found = dict(PLANS["four stages"].predicted)
    del found[key]
    read(replace(PLANS["four stages"], predicted=found))
    read(replace(PLANS["four stages"], predicted={**found, key: value}))


def test_texts_of_a_plan_cannot_become_markup() -> None:
    evil = '<script>alert("x")</script>&'
    plan = replace(
        with_predicted(
            PLANS["four stages"], model_name=evil, warnings=[evil], hardware=evil, bound_by=evil,
            sources=[evil], rejected=[{"family": evil, "why": evil}],
        ),
        layers=tuple(f"{evil}{i}" for i in range(32)),
        model="",
    )  # fmt: skip
    text, _ = read(plan)
    assert "<script" not in text
    assert evil in unescape(text)
