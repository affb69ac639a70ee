"""The timeline's section: boxes from the simulation, communication and memory where they fit."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from dataclasses import replace

import example_plans
import pytest

from galvatron_compile import work_json
from galvatron_compile.actions import LayerOutline, Outline, UnitOutline
from galvatron_compile.explain import page
from galvatron_compile.explain.parts import Section
from galvatron_compile.explain.pipeline import section
from galvatron_compile.plans import Plan
from galvatron_compile.prediction import Prediction
from galvatron_compile.work import LayerWork, Phase, SendWork, UnitWork, Work


def with_work(pp: int, m: int = 4, recompute: bool = False) -> Plan:
    """ZeRO-3 with gathers that take longer than a layer, so that every gather is waited for."""
    plan = example_plans.bare(2 * pp - 2 if pp > 1 else 2, pp, m, mixed=False)
    outlines, works = [], []
    for group in range(pp):
        numbers = plan.group_layers(group)
        units = tuple(UnitOutline(f"of {i}", 3) for i in numbers)
        layers = {
            i: LayerOutline(plan.layers[i], (u,), recompute) for u, i in enumerate(numbers)
        }
        outlines.append(Outline((numbers,), layers, units, m, "1f1b", pp, group))
        each = LayerWork(Phase(1.0), Phase(2.0), Phase(1.0), saved_bytes=2**30)
        sends = SendWork(0.25 * (group < pp - 1), 0.25 * (group > 0))
        unit = UnitWork(1.5, 0.5, working_bytes=2**29, pending_bytes=2**29, gradient_bytes=2**28)
        works.append(Work(dict.fromkeys(numbers, each), (unit,) * len(numbers), (sends,)))
    return replace(plan, predicted={work_json.KEY: work_json.dump(outlines, works)})


def of(plan: Plan) -> Section:
    return section(plan, Prediction.of(plan))


def test_communication_and_memory_lie_beneath_the_boxes() -> None:
    found = of(with_work(2))
    labels = [key.label for key in found.keys]
    assert labels == [
        "forward", "backward", "gathering parameters", "summing gradients",
        "messages to other stages", "idle",
    ]  # fmt: skip
    assert found.figure.count("<polyline") == 2
    assert "its peaks are" in found.notes[0] and "GiB" in found.notes[0]
    assert "they idle" in found.lead and "simulated action by action" in found.lead


def test_memory_reaches_its_peak_inside_its_strip() -> None:
    figure = ET.fromstring(of(with_work(2)).figure)
    height = float(figure.attrib["viewBox"].split()[3])
    for line in figure.iter("polyline"):
        points = [tuple(map(float, p.split(","))) for p in line.attrib["points"].split()]
        assert all(0 <= x <= 1000 and 0 <= y <= height for x, y in points)
        assert [x for x, _ in points] == sorted(x for x, _ in points)
        assert 1 < max(y for _, y in points) - min(y for _, y in points) <= 16


def test_a_box_ends_where_a_gather_is_waited_for() -> None:
    """A stage of two layers: its forward is one box with plain times, two where it must wait."""
    plan = with_work(2)
    waited = of(plan).figure.count("forward of micro-batch 3:")
    plain = replace(plan, predicted={})
    assert (waited, of(plain).figure.count("forward of micro-batch 3:")) == (4, 2)


def test_recomputing_is_part_of_backward_and_named() -> None:
    labels = [key.label for key in of(with_work(2, recompute=True)).keys]
    assert "backward, forward again included" in labels and "forward again" not in labels


def test_one_stage_is_drawn_if_its_work_is_known() -> None:
    found = of(with_work(1))
    assert found.figure.count("<polyline") == 1 and "every rank" in found.figure
    assert found.lead.startswith("No pipeline: every rank runs all layers, for 4 micro-batches")


def test_many_stages_have_boxes_alone() -> None:
    found = of(with_work(9, m=12))
    assert "<polyline" not in found.figure
    assert "gathering parameters" not in [key.label for key in found.keys]


@pytest.mark.parametrize("pp", [1, 2, 8])
def test_the_page_stays_whole(pp: int) -> None:
    text = page(with_work(pp, m=8))
    assert "<script" not in text and not re.search(r"https?:|url\(", text)
    for figure in re.findall(r"<svg.*?</svg>", text, flags=re.DOTALL):
        ET.fromstring(figure)
