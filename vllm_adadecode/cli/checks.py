"""A check and its outcome, as every sub-command reports it.

Owns how checks are printed; what is checked is each sub-command's.
"""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text


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

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


_MARKS = {True: ("ok", "green"), False: ("not ok", "bold red"), None: ("-", "dim")}


def all_ok(checks: Iterable[Check]) -> bool:
    """Whether none has failed."""
    return all(check.ok is not False for check in checks)


def print_pairs(console: Console, pairs: Iterable[tuple[str, str]]) -> None:
    """A two-column list."""
    grid = Table.grid(padding=(0, 2))
    grid.add_column(no_wrap=True)
    grid.add_column(overflow="fold")
    for name, value in pairs:
        grid.add_row(Text(name, style="bold"), Text(value))
    console.print(grid)


def print_checks(console: Console, checks: Iterable[Check]) -> None:
    """One line per check."""
    grid = Table.grid(padding=(0, 2))
    grid.add_column(no_wrap=True)
    grid.add_column(no_wrap=True)
    grid.add_column(overflow="fold")
    for check in checks:
        mark, style = _MARKS[check.ok]
        grid.add_row(Text(check.name, style="bold"), Text(mark, style=style), Text(check.detail))
    console.print(grid)
