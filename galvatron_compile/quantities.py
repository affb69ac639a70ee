"""Durations, sizes and counts as people read them: three digits and a unit."""

from __future__ import annotations

from collections.abc import Iterable

GIB = 1024**3
_SIZES = ((1024**4, "TiB"), (GIB, "GiB"), (1024**2, "MiB"), (1024, "KiB"))
_DURATIONS = ((60_000.0, "min"), (1_000.0, "s"), (1.0, "ms"), (1e-3, "µs"))
MINUS = "−"


def duration(time_ms: float) -> str:
    """``6.42 s``, ``812 ms``, ``12.3 ms``, ``45.0 µs``; minutes only from ten of them on."""
    size = abs(time_ms)
    if size == 0:
        return "0 ms"
    scale, unit = next(
        (
            (scale, unit)
            for scale, unit in _DURATIONS
            if size >= (10 * scale if unit == "min" else scale)
        ),
        _DURATIONS[-1],
    )
    return f"{_digits(time_ms / scale)} {unit}"


def size(num_bytes: float) -> str:
    """``61.2 GiB``, ``512 MiB``, ``17 B``."""
    for scale, unit in _SIZES:
        if abs(num_bytes) >= scale:
            return f"{_digits(num_bytes / scale)} {unit}"
    return f"{num_bytes:.0f} B"


def change(text: str) -> str:
    """A formatted difference with its sign: ``+3.1 ms``, ``−12.3 ms``."""
    return text.replace("-", MINUS, 1) if text.startswith("-") else f"+{text}"


def percent(share: float) -> str:
    """``0.423`` as ``42.3 %``."""
    return f"{100 * share:.1f} %"


def count(number: float, noun: str = "", plural: str = "") -> str:
    """``1,024 ranks``; the noun's plural is its singular and an s unless given."""
    shown = f"{number:,.0f}" if abs(number) >= 100 or number == int(number) else f"{number:,.1f}"
    if not noun:
        return shown
    return f"{shown} {noun if number == 1 else plural or noun + 's'}"


def decimals(values: Iterable[float]) -> int:
    """How many decimals give the greatest of ``values`` at least three digits."""
    greatest = max((abs(value) for value in values), default=0.0)
    return 0 if greatest >= 1_000 else 1 if greatest >= 100 else 2 if greatest >= 1 else 3


def spans(indices: Iterable[int]) -> str:
    """``(0, 1, 2, 8, 9)`` as ``0–2, 8–9``."""
    found: list[list[int]] = []
    for index in indices:
        if found and found[-1][1] == index - 1:
            found[-1][1] = index
        else:
            found.append([index, index])
    return ", ".join(str(a) if a == b else f"{a}–{b}" for a, b in found)


def _digits(value: float) -> str:
    size = abs(value)
    places = 0 if size >= 99.95 else 1 if size >= 9.995 else 2
    return f"{value:,.{places}f}"
