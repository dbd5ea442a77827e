"""The one look of all results: tables in the terminal.

Owns how a figure is shown and what stands in for one that there is not. Results are JSON-ready
mappings; a figure is found in them by its path of keys.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from rich.console import Console
from rich.table import Table

NONE = "-"
Values = Mapping[str, Any]


def make_console() -> Console:
    """Standard output; wide enough for a table where that is a file."""
    return Console() if sys.stdout.isatty() else Console(width=230)


@dataclass(frozen=True)
class Figure:
    """What is shown under a title.

    Attributes:
        show: the text for a result.
    """

    title: str
    show: Callable[[Values], str]


def figure(title: str, form: str, *path: str) -> Figure:
    """A number, or a text, at a path of keys."""
    return Figure(title, lambda values: text(form, values, *path))


def text(form: str, values: Any, *path: str) -> str:
    """One figure, formatted; `NONE` where it is missing or None."""
    for key in path:
        values = values.get(key) if isinstance(values, Mapping) else None
    return NONE if values is None else form.format(values)


def of(values: Values, part: str, whole: str) -> str:
    """So many of so many."""
    return NONE if values.get(whole) is None else f"{values[part]} of {values[whole]}"


def table(
    title: str,
    figures: Sequence[Figure],
    rows: Iterable[Values],
    group: Callable[[Values], Any] = lambda _: None,
) -> Table:
    """A row for each result, and a line where ``group`` changes; text columns are on the left."""
    made = Table(title=title, title_justify="left")
    for i, each in enumerate(figures):
        made.add_column(each.title, justify="right" if i else "left", no_wrap=not i)
    for _, members in groupby(rows, key=group):
        made.add_section()
        for row in members:
            made.add_row(*(each.show(row) for each in figures))
    return made


def sideways(title: str, figures: Sequence[Figure], results: Mapping[str, Values]) -> Table:
    """A column for each result, a row for each figure."""
    made = Table(title=title, title_justify="left")
    made.add_column("")
    for name in results:
        made.add_column(name, justify="right")
    for each in figures:
        made.add_row(each.title, *(each.show(values) for values in results.values()))
    return made
