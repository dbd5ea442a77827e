"""Everything that a comparison leaves behind: table, JSON, CSV, figures and page.

Owns which files there are; what is in them is `metrics.py`'s, `table.py`'s, `plots.py`'s and
`page.py`'s. Made of what the store holds, so a run that is not finished can be reported on.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.compare import costs, metrics, page, plots, table
from benchmarks.compare.run import Plan
from benchmarks.compare.store import Store, Turn
from vllm_adadecode.files import write_json, write_whole


def turns_of(plan: Plan, store: Store) -> list[Turn]:
    """The last start of each method in each repetition, as far as there was one."""
    found = (store.load_turn(name, repetition) for repetition, name in plan.turns())
    return [turn for turn in found if turn is not None]


def write(plan: Plan, store: Store, about: Mapping[str, Any], console: Console) -> Path:
    """Print the table and write all files.

    Args:
        about: how it was made: at least the target.

    Returns:
        The page.
    """
    cells = plan.all_cells()
    turns = turns_of(plan, store)
    measured = store.load(cells)
    rows = metrics.rows(cells, measured, turns)
    sentences = metrics.findings(rows)
    spent, notes = costs.rows(plan, measured, rows)
    table.print_table(console, rows, turns, sentences)
    costs.print_table(console, spent, notes)
    folder = store.folder
    result = {
        **about,
        "complete": all(store.has(cell) for cell in cells),
        "failed": table.failures(turns),
        "findings": sentences,
        "speedup": {
            row.method: row.ratio.median
            for row in rows
            if row.setting == rows[0].setting and row.ratio is not None
        },
        "rows": [row.as_dict() for row in rows],
        "costs": [row.as_dict() for row in spent],
        "servers": [asdict(turn) for turn in turns],
    }
    write_json(folder / "compare.json", result)
    write_whole(folder / "compare.csv", table.as_csv(rows).encode())
    write_whole(folder / "costs.csv", costs.as_csv(spent).encode())
    images = plots.draw(rows)
    for name, content in images.items():
        write_whole(folder / name, content)
    html = page.render(rows, turns, sentences, images, about, costs.html(spent, notes))
    return write_whole(folder / "compare.html", html.encode())
