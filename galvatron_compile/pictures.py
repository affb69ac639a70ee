"""Pictures drawn with matplotlib, which is optional: how they are begun and written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from galvatron_compile.errors import UnsupportedError


def new_figure(path: Path, size_inches: tuple[float, float], option: str) -> Any:
    """A matplotlib figure that :func:`write` can put into ``path``.

    option: what asked for it, for the message. UnsupportedError without matplotlib or for a format
    that it does not write.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UnsupportedError(f"{option} needs matplotlib: pip install matplotlib") from error
    figure = Figure(figsize=size_inches, layout="constrained")
    FigureCanvasAgg(figure)
    known = figure.canvas.get_supported_filetypes()
    if path.suffix.removeprefix(".").lower() not in known:
        raise UnsupportedError(
            f"cannot write a picture as {path.suffix or 'a file without ending'}; use "
            f".{', .'.join(sorted(known))}"
        )
    return figure


def write(figure: Any, path: Path) -> None:
    """UnsupportedError for a place that cannot be written."""
    try:
        figure.savefig(path, dpi=150)
    except OSError as error:
        raise UnsupportedError(f"cannot write {path}: {error}") from error
