"""Predicted against measured step times as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from galvatron_compile.pictures import new_figure, write
from galvatron_compile.validation.metrics import Pair

BANDS = {0.25: "0.92", 0.1: "0.82"}
"""Relative errors whose bands are shaded around the diagonal, and their greys."""


def plot(pairs: Sequence[Pair], path: Path) -> None:
    """Write the picture: both axes logarithmic, the diagonal, a colour per source.

    The file's ending chooses the format (png, svg, pdf). UnsupportedError without matplotlib or
    for a format that it does not write.
    """
    figure = new_figure(path, (7.5, 7), "--plot")
    draw(figure.add_subplot(), pairs)
    write(figure, path)


def draw(axes: Any, pairs: Sequence[Pair]) -> None:
    """On matplotlib axes."""
    times = [t for pair in pairs for t in (pair.run.step_ms, pair.predicted.step_ms)]
    low, high = min(times, default=1.0) / 1.3, max(times, default=1.0) * 1.3
    ends = [low, high]
    for band, grey in BANDS.items():
        axes.fill_between(
            ends, [t / (1 + band) for t in ends], [t * (1 + band) for t in ends],
            color=grey, linewidth=0, label=f"within {band:.0%}",
        )  # fmt: skip
    axes.plot(ends, ends, color="black", linewidth=1)
    for source in dict.fromkeys(pair.run.source for pair in pairs):
        own = [pair for pair in pairs if pair.run.source == source]
        axes.scatter(
            [pair.run.step_ms for pair in own], [pair.predicted.step_ms for pair in own],
            s=14, alpha=0.7, linewidths=0, label=f"{source} ({len(own)})",
        )  # fmt: skip
    axes.set(
        xscale="log", yscale="log", xlim=ends, ylim=ends, aspect="equal",
        xlabel="measured step time (ms)", ylabel="predicted step time (ms)",
    )  # fmt: skip
    axes.grid(which="both", linewidth=0.3, alpha=0.5)
    axes.legend(loc="upper left", frameon=False)
