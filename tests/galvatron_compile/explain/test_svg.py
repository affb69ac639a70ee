"""Pieces of figures: round ticks, escaping, room for texts."""

from __future__ import annotations

import pytest

from galvatron_compile.explain import svg


@pytest.mark.parametrize(
    ("low", "high", "about", "expected"),
    [
        (0, 100, 6, [0, 20, 40, 60, 80, 100]),
        (0, 76, 4, [0, 20, 40, 60]),
        (9.2, 13.4, 4, [10, 11, 12, 13]),
        (0, 0.9, 4, [0, 0.2, 0.4, 0.6, 0.8]),
        (5, 5, 4, [5]),
    ],
)
def test_ticks_are_round(low: float, high: float, about: int, expected: list[float]) -> None:
    assert svg.ticks(low, high, about) == pytest.approx(expected)


def test_texts_are_escaped() -> None:
    assert "<b>" not in svg.text(0, 0, "<b>") + svg.rect(0, 0, 1, 1, "x", "<b>")


def test_numbers_are_short() -> None:
    assert svg.line(0, 1 / 3, 100, 2e-9, "grid") == (
        '<line class="grid" x1="0" y1="0.33" x2="100" y2="0"/>'
    )


def test_many_boxes_are_one_path() -> None:
    assert svg.rects([(0, 0, 2, 1), (4, 0, 2, 1)], "x") == (
        '<path class="x" d="M0 0h2v1h-2zM4 0h2v1h-2z"/>'
    )
    assert svg.rects([], "x") == ""
