"""What a page is made of: sections with a figure, its key, and a table. Data only, no HTML."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from galvatron_compile.quantities import decimals


class Column(NamedTuple):
    """kind: "number" is flush right, "code" is monospaced, "prose" takes the room that is left."""

    title: str
    kind: Literal["text", "number", "code", "prose"] = "text"


class Key(NamedTuple):
    """A colour of the figure (a class of page.css) and what it stands for."""

    colour: str
    label: str


@dataclass(frozen=True)
class Grid:
    """A table. swatches: the colour of every row, if rows have one.

    emphasised: the row that is this plan. folded: the heading under which a long table is closed.
    """

    columns: tuple[Column, ...]
    rows: tuple[tuple[str, ...], ...]
    swatches: tuple[str, ...] = ()
    emphasised: int | None = None
    folded: str = ""

    def __post_init__(self) -> None:
        assert all(len(row) == len(self.columns) for row in self.rows)
        assert not self.swatches or len(self.swatches) == len(self.rows)


@dataclass(frozen=True)
class Section:
    """lead: what to see, or what is missing. figure: SVG, or nothing. notes: under everything."""

    title: str
    lead: str
    figure: str = ""
    keys: tuple[Key, ...] = ()
    tables: tuple[Grid, ...] = ()
    notes: tuple[str, ...] = ()


def numbers(values: Sequence[float | None], scale: float = 1.0) -> list[str]:
    """A column's numbers with as many decimals each; "–" where there is none."""
    scaled = [None if value is None else value / scale for value in values]
    places = decimals(value for value in scaled if value is not None)
    return ["–" if value is None else f"{value:,.{places}f}" for value in scaled]
