"""Tables and numbers as text, the same in every printed noun."""

from __future__ import annotations

from collections.abc import Sequence


def columns(header: Sequence[str], rows: Sequence[Sequence[str]], *, left: int = 1) -> str:
    """Aligned columns, two spaces apart; the first ``left`` of them flush left, the rest right."""
    lines = [header, *rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i < left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def ms(time_ms: float) -> str:
    return f"{time_ms:.3f}"


def mib(num_bytes: float) -> str:
    return f"{num_bytes / 2**20:.1f}"
