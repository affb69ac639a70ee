"""Numbers as people read them."""

from __future__ import annotations

import pytest

from galvatron_compile.quantities import change, count, decimals, duration, percent, size, spans


@pytest.mark.parametrize(
    ("time_ms", "shown"),
    [
        (0.045, "45.0 µs"), (0.9999, "1,000 µs"), (12.34, "12.3 ms"), (812.4, "812 ms"),
        (6_420, "6.42 s"), (99_960, "100 s"), (599_000, "599 s"), (720_000, "12.0 min"),
        (-3.1, "-3.10 ms"), (0, "0 ms"),
    ],
)  # fmt: skip
def test_durations(time_ms: float, shown: str) -> None:
    assert duration(time_ms) == shown


@pytest.mark.parametrize(
    ("num_bytes", "shown"),
    [(17, "17 B"), (1536, "1.50 KiB"), (61.2 * 2**30, "61.2 GiB"), (-(2**29), "-512 MiB")],
)
def test_sizes(num_bytes: float, shown: str) -> None:
    assert size(num_bytes) == shown


def test_changes_have_a_sign() -> None:
    assert change(duration(3.1)) == "+3.10 ms"
    assert change(duration(-12.3)) == "−12.3 ms"


def test_counts() -> None:
    assert count(1024, "rank") == "1,024 ranks"
    assert count(1, "micro-batch", "micro-batches") == "1 micro-batch"
    assert count(5.25) == "5.2"
    assert percent(0.4231) == "42.3 %"


def test_columns_keep_three_digits_of_their_greatest() -> None:
    assert [decimals([x, 0.1]) for x in (12_345, 123, 12, 1.2, 0.2)] == [0, 1, 2, 2, 3]
    assert decimals([]) == 3


def test_spans() -> None:
    assert spans((0, 1, 2, 8, 9, 12)) == "0–2, 8–9, 12"
    assert spans(()) == ""
