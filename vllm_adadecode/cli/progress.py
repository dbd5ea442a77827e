"""How long work shows how far it is: the one look of all commands, those in benchmarks/ included.

Imported by a command when it begins to work, not when it reads its options: rich takes a moment.
"""

from __future__ import annotations

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)


def counting(
    console: Console | None = None,
    *,
    left: bool = False,
    transient: bool = False,
    count: ProgressColumn | None = None,
) -> Progress:
    """A line for each task: what it is, a bar, how many of how many, and the time since its start.

    Args:
        console: standard output's if None.
        left: also the time that is left, for work of many like steps.
        transient: whether the lines vanish at the end.
        count: in place of the counts.
    """
    columns: list[ProgressColumn] = [
        TextColumn("{task.description}"),
        BarColumn(),
        count or MofNCompleteColumn(),
        TimeElapsedColumn(),
    ]
    if left:
        columns += [TextColumn("left"), TimeRemainingColumn()]
    return Progress(*columns, console=console, transient=transient)
