"""Pieces of SVG as text. Colours are classes of page.css, so that they follow dark mode and print.

Figures are WIDTH units wide and scale with the page. All text is escaped here.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from html import escape

WIDTH = 1000.0
CHARACTER = 7.2  # advance of a wide digit at the figures' 12 units: fonts differ


def figure(height: float, parts: Iterable[str], label: str) -> str:
    """label: what a person hears who cannot see it."""
    return (
        f'<svg viewBox="0 0 {WIDTH:g} {_n(height)}" role="img" aria-label="{escape(label)}">'
        f"{''.join(parts)}</svg>"
    )


def rect(
    x: float, y: float, width: float, height: float, colour: str, tip: str = "", radius: float = 0
) -> str:
    """tip: shown when the pointer rests on it."""
    corner = f' rx="{_n(radius)}"' if radius else ""
    box = f'x="{_n(x)}" y="{_n(y)}" width="{_n(max(width, 0))}" height="{_n(height)}"{corner}'
    return _titled(f'<rect class="{colour}" {box}', "rect", tip)


def rects(boxes: Sequence[tuple[float, float, float, float]], colour: str) -> str:
    """Many rectangles of one colour as one path: a tenth of the bytes, but no tips."""
    if not boxes:
        return ""
    moves = "".join(f"M{_n(x)} {_n(y)}h{_n(w)}v{_n(h)}h{_n(-w)}z" for x, y, w, h in boxes)
    return f'<path class="{colour}" d="{moves}"/>'


def text(x: float, y: float, content: str, colour: str = "", anchor: str = "start") -> str:
    """anchor: "start", "middle" or "end"; y is the middle of the text."""
    name = f' class="{colour}"' if colour else ""
    return (
        f'<text{name} x="{_n(x)}" y="{_n(y)}" text-anchor="{anchor}" dy=".35em">'
        f"{escape(content)}</text>"
    )


def line(x1: float, y1: float, x2: float, y2: float, colour: str) -> str:
    return f'<line class="{colour}" x1="{_n(x1)}" y1="{_n(y1)}" x2="{_n(x2)}" y2="{_n(y2)}"/>'


def polyline(points: Sequence[tuple[float, float]], colour: str) -> str:
    places = " ".join(f"{_n(x)},{_n(y)}" for x, y in points)
    return f'<polyline class="{colour}" points="{places}"/>'


def circle(x: float, y: float, radius: float, colour: str, tip: str = "") -> str:
    box = f'cx="{_n(x)}" cy="{_n(y)}" r="{_n(radius)}"'
    return _titled(f'<circle class="{colour}" {box}', "circle", tip)


def fits(content: str, width: float) -> bool:
    """Whether a text of the figures' size has room, with a little air."""
    return len(content) * CHARACTER + 6 <= width


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """About so many round numbers (1, 2 or 5 times a power of ten apart) between two."""
    if high <= low:
        return [low]
    power = 10.0 ** math.floor(math.log10((high - low) / about))
    found = []
    for step in (power, 2 * power, 5 * power, 10 * power):
        first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
        found.append([index * step for index in range(first, last + 1)])
    return min(found, key=lambda places: abs(len(places) - about))


def _titled(opening: str, name: str, tip: str) -> str:
    return f"{opening}><title>{escape(tip)}</title></{name}>" if tip else f"{opening}/>"


def _n(value: float) -> str:
    """Two decimals at most: a hundredth of a pixel."""
    return f"{value:.2f}".rstrip("0").rstrip(".") or "0"
