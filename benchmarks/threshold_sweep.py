"""``python -m benchmarks.threshold_sweep``: AdaDecode from threshold to threshold, beside vanilla.

Serves the target without the method and with it at each confidence threshold gamma, the same one
for all exits in use, sends all servers the same prompts at temperature 0, and shows how speed,
acceptance and the number of early predictions depend on gamma. A stopped run goes on when the same
command is given again.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from rich.console import Console

from benchmarks.compare import report as compared
from benchmarks.compare import table
from benchmarks.compare.run import Plan
from benchmarks.compare.store import Store
from benchmarks.paper import command, points, sweep
from benchmarks.paper.settings import Settings, name_of
from vllm_adadecode.files import write_json

# The paper's range.
GAMMAS = tuple(round(0.5 + 0.05 * i, 2) for i in range(9))


def variants(settings: Settings, gammas: tuple[float, ...]) -> command.Variants:
    """All gammas, and vanilla in the middle, so that no server's turn is far from vanilla's."""
    found: list[tuple[str, Mapping[str, Any]]] = [
        (name_of(gamma), settings.at(gamma)) for gamma in gammas
    ]
    found.insert(len(found) // 2, ("vanilla", {}))
    return dict(found)


def report(plan: Plan, store: Store, about: Mapping[str, Any], console: Console) -> int:
    """Print the table, write all files; 1 if a server failed."""
    found = points.read(plan, store)
    failed = table.failures(compared.turns_of(plan, store))
    result = {
        **about,
        "complete": all(store.has(cell) for cell in plan.all_cells()),
        "failed": failed,
        "findings": sweep.write(found, store, console),
        "points": [point.as_dict() for point in found],
    }
    write_json(store.folder / f"{sweep.NAME}.json", result)
    for method, error in failed.items():
        console.print(f"{method} failed: {table.short(error)}", style="bold red", markup=False)
    console.print(f"written to {store.folder}: {sweep.NAME}.json, .csv, .png")
    return 1 if failed else 0


def main(arguments: list[str] | None = None) -> int:
    options = command.parse(arguments, __doc__, GAMMAS, sweep.NAME)
    return command.run(
        sweep.NAME, options, lambda settings: variants(settings, options.gammas), report
    )


if __name__ == "__main__":
    sys.exit(main())
