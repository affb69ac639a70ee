"""Printed cost table and search report, as golden text."""

from __future__ import annotations

from pathlib import Path

from galvatron_compile.costs import CostTable, LayerCost
from galvatron_compile.passes.partition import search
from galvatron_compile.strategy import Strategy

GOLDEN = Path(__file__).parents[1] / "golden"
DATA, ZERO, TENSOR = Strategy(1, 4), Strategy(1, 4, zero=3), Strategy(4, 1, True)
MIB = 1 << 20


def make_table() -> CostTable:
    entries = {}
    for index, size in enumerate((8, 2)):
        for m in (1, 2):
            own = size * MIB
            entries[index, DATA, m] = LayerCost(
                *(size / m, 2 * size / m, 0, 0, 0, 0, 0, 0, size * 1.5, 0.125),
                *(own, own, 2 * own, 3 * own // m, MIB),
                source="measured",
            )
            entries[index, ZERO, m] = LayerCost(
                *(size / m, 2 * size / m, 0, 0, size / 8, size / 8, 0, size / 4, 0, 0.03125),
                *(own // 4, own // 4, own // 2, 3 * own // m, MIB + own),
                source="measured",
            )
    for m in (1, 2):
        entries[1, TENSOR, m] = LayerCost(
            *(2.5 / m, 5 / m, 0.75, 1.5, 0, 0, 0, 0, 0, 0.03125),
            *(MIB // 2, MIB // 2, MIB, 3 * MIB // 2 // m, MIB),
            source="analytic",
        )
    reshard = {
        (cut, before, after, m): 0.5
        for cut in (0, 1, 2)
        for before, after in ((DATA, TENSOR), (TENSOR, DATA), (ZERO, TENSOR), (TENSOR, ZERO))
        for m in (1, 2)
    }
    illegal = {(0, TENSOR): "the vocabulary of 257 does not divide by tp 4"}
    return CostTable(
        layers=(0, 1, 1, 0),
        class_names=("embedding", "block"),
        strategies=(DATA, ZERO, TENSOR),
        micro_batch_counts=(1, 2),
        entries=entries,
        resharding_ms=reshard,
        same_strategy=((0, 3),),
        overlap_slowdown=1.25,
        world_size=4,
        global_batch_size=16,
        illegal=illegal,
    )


def test_printed_cost_table_is_the_golden_one() -> None:
    assert str(make_table()) + "\n" == (GOLDEN / "costs.txt").read_text(encoding="utf-8")


def test_another_number_of_micro_batches_can_be_shown() -> None:
    lines = make_table().show(2).splitlines()
    assert "in 2 of 1, 2 micro-batches" in lines[0]
    row = next(line for line in lines if line.startswith("tp4.sp "))
    assert row.split()[1:3] == ["1.250", "2.500"]


def test_printed_search_report_is_the_golden_one() -> None:
    names = ("embed", "h.0", "h.1", "head")
    report = search(
        make_table(), 64 * MIB, model="m", layer_names=names, global_batch_size=16
    )  # fmt: skip
    text = f"{report}\n\n{report.best}\n"
    assert text == (GOLDEN / "search.txt").read_text(encoding="utf-8")
