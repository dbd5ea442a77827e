"""``python -m benchmarks.paper``: the paper's experiments, AdaDecode beside vanilla.

The sweep: with each confidence threshold gamma, the same for all exits in use, how speed, draft
acceptance rate and cost depend on it. Three sanity checks: (1) with gamma 1 nothing is drafted, and
it is as fast as vanilla, but for noise, which a second server without the method shows; (2) with
verification outputs are vanilla's, without it they are not; (3) from the lowest gamma to the
highest, fewer draft tokens, of which more are accepted.

Exit code 1 if a check does not come out so, or could not be measured. A stopped run goes on when
the same command is given again.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks import arguments
from benchmarks.arguments import list_of, make_parser
from benchmarks.compare import __main__ as compare
from benchmarks.compare import figures, report
from benchmarks.compare.figures import Row, setting_of
from benchmarks.compare.run import Plan, run
from benchmarks.costs import load_heads
from benchmarks.paper import checks
from benchmarks.paper.settings import OFF, VANILLA, Settings, gamma_of
from benchmarks.tables import NONE, Figure, figure, make_console, table
from vllm_adadecode.cli.arguments import positive
from vllm_adadecode.cli.progress import counting
from vllm_adadecode.files import write_json

# The paper's range.
GAMMAS = tuple(round(0.5 + 0.05 * i, 2) for i in range(9))
# Chosen by the experiments.
NOT_PASSED_ON = ("--methods", "--temperature", "--spec", "--drafter")
SHARED = """\
These of `python -m benchmarks.compare`, which its --help explains, are taken as well: --target,
--data, --prompts, --tokens, --chat, --concurrency (here 1), --repetitions, --dtype, --serve-args
and --report-only."""
VERDICTS = {True: "yes", False: "NO", None: "not measured"}


def parse(given: list[str] | None = None) -> argparse.Namespace:
    """Own options, and as `compare` those of the comparison."""
    parser = make_parser("benchmarks.paper", __doc__)
    parser.epilog, parser.allow_abbrev = SHARED, False
    add = parser.add_argument
    add("--gammas", type=list_of(_gamma), default=list(GAMMAS), help="thresholds, two or more")
    add("--heads", metavar="FOLDER", help="of the heads, or hub id; else those beside the target")
    add("--draft-tokens", type=positive, metavar="K", help="most draft tokens, else the heads' own")
    add("--no-gates", action="store_true", help="evaluate all heads in use, as in the paper")
    add("--out", type=Path, default=Path("results/paper"), help="folder of the results")
    options, shared = parser.parse_known_args(given)
    options.gammas = sorted(options.gammas)
    if len(options.gammas) < 2:
        parser.error("--gammas needs at least two")
    refused = [flag for flag in shared if flag.partition("=")[0] in NOT_PASSED_ON]
    if refused:
        parser.error(f"{refused[0].partition('=')[0]} is chosen by the experiments: drop it")
    options.shared = ["--concurrency", "1", *shared, "--out", str(options.out)]
    # Mistakes in these are to end the command before anything is read.
    options.compare = compare.parse(["--methods", VANILLA, *options.shared])
    return options


def _gamma(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < OFF:
        raise argparse.ArgumentTypeError(f"must be numbers in [0, 1) with commas, not {text}")
    return value


def make_plan(options: argparse.Namespace) -> Plan:
    """
    Raises:
        AdaDecodeError: target, heads or data can't be used.
    """
    heads = load_heads(options.compare.target, {"model": options.heads})
    settings = Settings(heads, options.heads, options.draft_tokens, not options.no_gates)
    variants = settings.variants(options.gammas)
    specs = [f"--spec={name}={json.dumps(config)}" for name, config in variants.items()]
    given = [*options.shared, "--temperature", "0", "--methods", ",".join(variants), *specs]
    return compare.make_plan(compare.parse(given))


# --- the report ----------------------------------------------------------------------------------


def swept(rows: Sequence[Row]) -> list[Row]:
    """Of the sweep, what was measured, with vanilla; with ``gamma`` and the share of the output
    tokens that were accepted draft tokens, the paper's early predictions."""
    found: list[Row] = []
    for row in rows:
        gamma, length = gamma_of(row["method"]), row["mean_acceptance_length"]
        if row["repetitions"] and (row["method"] == VANILLA or gamma not in (None, OFF)):
            # Each verification step gives one token of its own.
            early = None if length is None else 1 - 1 / length
            found.append({**row, "gamma": gamma, "predicted_early": early})
    return found


COLUMNS = (
    Figure("data", checks.where),
    figure("gamma", "{:g}", "gamma"),
    *report.SPEED,
    *report.COUNTS,
    figure("predicted early", "{:.1%}", "predicted_early"),
    figure("bytes, of vanilla's", "{:.3f}", "costs", "bytes", "of_vanilla"),
    figure("FLOPs, of vanilla's", "{:.3f}", "costs", "flops", "of_vanilla"),
    figure("predicted speed-up", "{:.2f}", "costs", "predicted_speedup"),
)
CHECK_COLUMNS = (
    figure("check", "{}", "name"),
    figure("must give", "{}", "expected"),
    Figure("gave", lambda check: "\n".join(check["found"]) or NONE),
    Figure("as it must", lambda check: VERDICTS[check["passed"]]),
)


def experiments(options: argparse.Namespace) -> int:
    """Measure what is missing and report: what a comparison leaves behind, the sweep, the checks.

    Returns:
        1 unless all checks came out as they must.
    """
    console = make_console()
    plan = make_plan(options)
    store = compare.open_store(plan, options.out)
    if not options.compare.report_only:
        with counting(console, left=True) as progress:
            run(plan, store, progress)
    about = compare.about(plan)
    report.write(plan, store, about, console)
    rows, _ = figures.rows(plan, store)
    sweep, verdicts = swept(rows), checks.judge(rows, options.gammas)
    console.print(table("AdaDecode by confidence threshold", COLUMNS, sweep, setting_of))
    console.print(table("The paper's sanity checks", CHECK_COLUMNS, verdicts))
    passed = all(check["passed"] for check in verdicts)
    write_json(
        store.folder / "paper.json",
        {**about, "passed": passed, "checks": verdicts, "sweep": sweep},
    )
    console.print(f"written to {store.folder}: paper.json, and as benchmarks.compare")
    return 0 if passed else 1


def main(given: list[str] | None = None) -> int:
    options = parse(given)
    return arguments.run("paper", lambda: experiments(options), compare.STOPPED)


if __name__ == "__main__":
    sys.exit(main())
