"""``python -m benchmarks.sanity``: the paper's three checks of an implementation.

1. With gamma 1 nothing is predicted early: as fast as vanilla, but for noise. A second server
   without the method shows how much noise there is.
2. With verification outputs are vanilla's; without it they are not.
3. From gamma 0.5 to 0.9: fewer early predictions, of which more are accepted.

Exit code 1 if one does not come out so, or could not be measured. A stopped run goes on when the
same command is given again.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.compare import report as compared
from benchmarks.compare import table
from benchmarks.compare.run import Plan
from benchmarks.compare.store import Store
from benchmarks.paper import checks, command, points, sweep
from benchmarks.paper.settings import OFF, UNVERIFIED, Settings, gamma_of, name_of
from vllm_adadecode.files import write_json

NAME = "sanity"
GAMMAS = (0.5, 0.6, 0.7, 0.8, 0.9)
VERDICTS = {True: "yes", False: "NO", None: "not measured"}


def variants(settings: Settings, gammas: tuple[float, ...]) -> command.Variants:
    """What is compared on times has its turns next to vanilla's.

    Verification is turned off at the lowest gamma, where it has most to do.
    """
    low = min(gammas)
    return {
        name_of(OFF): settings.at(OFF),
        checks.VANILLA: {},
        checks.CONTROL: {},
        **{name_of(gamma): settings.at(gamma) for gamma in gammas},
        name_of(low) + UNVERIFIED: settings.unverified(low),
    }


def report(plan: Plan, store: Store, about: Mapping[str, Any], console: Console) -> int:
    """Print tables and verdicts, write all files; 1 unless all three came out as they must."""
    found = points.read(plan, store)
    gammas = (gamma_of(name) for name in plan.methods)
    experiments = checks.judge(found, min(gamma for gamma in gammas if gamma is not None))
    failed = table.failures(compared.turns_of(plan, store))
    of_sweep = [p for p in found if p.gamma != OFF]
    sentences = sweep.write(of_sweep, store, console)
    print_verdicts(console, experiments)
    passed = all(experiment.passed for experiment in experiments)
    result = {
        **about,
        "complete": all(store.has(cell) for cell in plan.all_cells()),
        "passed": passed,
        "experiments": [asdict(experiment) for experiment in experiments],
        "failed": failed,
        "findings": sentences,
        "points": [point.as_dict() for point in found],
    }
    write_json(store.folder / f"{NAME}.json", result)
    for method, error in failed.items():
        console.print(f"{method} failed: {table.short(error)}", style="bold red", markup=False)
    console.print(f"written to {store.folder}: {NAME}.json, {sweep.NAME}.csv, {sweep.NAME}.png")
    return 0 if passed else 1


def print_verdicts(console: Console, experiments: list[checks.Experiment]) -> None:
    shown = Table(title="The paper's sanity experiments", title_justify="left", show_lines=True)
    for name in ("experiment", "must give", "gave", "as it must"):
        shown.add_column(name)
    for each in experiments:
        shown.add_row(each.name, each.expected, "\n".join(each.found), VERDICTS[each.passed])
    console.print(shown)


def main(arguments: list[str] | None = None) -> int:
    options = command.parse(arguments, __doc__, GAMMAS, NAME)
    gammas = tuple(gamma for gamma in options.gammas if gamma < OFF)
    if len(gammas) < 2:
        print(f"{NAME}: error: --gammas needs at least two below 1", file=sys.stderr)
        return 2
    return command.run(NAME, options, lambda settings: variants(settings, gammas), report)


if __name__ == "__main__":
    sys.exit(main())
