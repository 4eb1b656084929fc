"""What the page is made of: tables and figures, ready to be shown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from .curves import Series
from .formats import NONE


@dataclass(frozen=True)
class Grid:
    """A table: heads as (text, "text" | "num" | "long"); the first cell of a row is its header."""

    caption: str
    heads: tuple[tuple[str, str], ...]
    rows: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Panel:
    """A figure with what a reader needs to understand it."""

    title: str
    svg: Markup
    series: tuple[Series, ...] = ()
    note: str = ""


def grid(caption: str, heads: Sequence[str], kinds: str, rows: Iterable[Sequence[Any]]) -> Grid:
    """A table; ``kinds`` has one word a head."""
    cells = tuple(tuple(NONE if cell is None else str(cell) for cell in row) for row in rows)
    return Grid(caption, tuple(zip(heads, kinds.split(), strict=True)), cells)
