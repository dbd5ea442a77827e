"""A check and its outcome, as every sub-command reports it.

Owns how checks are printed; what is checked is each sub-command's. rich is imported when something
is printed, not when a sub-command is.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console


@dataclass(frozen=True)
class Check:
    """One thing that was looked at.

    Attributes:
        name: what was looked at, in a word or two.
        ok: None: could not be or need not be checked, which is no failure.
        detail: what was found; if not ok, what to do.
    """

    name: str
    ok: bool | None
    detail: str


_MARKS = {True: ("ok", "green"), False: ("not ok", "bold red"), None: ("-", "dim")}


def all_ok(checks: Iterable[Check]) -> bool:
    """Whether none has failed."""
    return all(check.ok is not False for check in checks)


def print_pairs(console: Console, pairs: Iterable[tuple[str, str]]) -> None:
    """A two-column list."""
    _print_rows(console, ([(name, "bold"), (value, "")] for name, value in pairs), columns=2)


def print_checks(console: Console, checks: Iterable[Check]) -> None:
    """One line per check."""
    rows = ([(c.name, "bold"), _MARKS[c.ok], (c.detail, "")] for c in checks)
    _print_rows(console, rows, columns=3)


def _print_rows(console: Console, rows: Iterable[list[tuple[str, str]]], *, columns: int) -> None:
    from rich.table import Table
    from rich.text import Text

    grid = Table.grid(padding=(0, 2))
    for _ in range(columns - 1):
        grid.add_column(no_wrap=True)
    grid.add_column(overflow="fold")
    for row in rows:
        grid.add_row(*(Text(text, style=style) for text, style in row))
    console.print(grid)
