"""What the two commands share: their options, the comparison that they run, and how they end.

Owns nothing of the measuring, which is `benchmarks.compare`'s: order, servers, going on after a
stop, and its options, which are passed on to it.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.arguments import make_parser
from benchmarks.compare import __main__ as compare
from benchmarks.compare.run import Plan
from benchmarks.compare.store import Store
from benchmarks.demo.server import stop_on_sigterm
from benchmarks.paper.settings import OFF, Settings, read_heads
from vllm_adadecode.cli.arguments import positive
from vllm_adadecode.errors import AdaDecodeError

# Chosen by the experiment.
NOT_PASSED_ON = ("--methods", "--temperature", "--spec", "--drafter")
SHARED = """\
These of `python -m benchmarks.compare`, which its --help explains, are taken as well: --target,
--data, --prompts, --tokens, --chat, --concurrency (here 1), --repetitions, --dtype, --serve-args,
--retry and --report-only."""

# Of a comparison's methods, in the order of their turns: the speculative configuration of each.
Variants = Mapping[str, Mapping[str, Any]]
Report = Callable[[Plan, Store, Mapping[str, Any], Console], int]


def parse(
    arguments: list[str] | None, doc: str | None, gammas: tuple[float, ...], name: str
) -> argparse.Namespace:
    """Own options, and as `compare` those of the comparison.

    Args:
        doc: the command's docstring.
        gammas: default of `--gammas`.
        name: of the command, and of the folder of its results.
    """
    parser = make_parser(f"benchmarks.{name}", doc)
    parser.epilog, parser.allow_abbrev = SHARED, False
    add = parser.add_argument
    add("--gammas", type=_gammas, default=gammas, help="thresholds")
    add("--heads", metavar="FOLDER", help="of the heads, or hub id; else those beside the target")
    add("--drafts", type=positive, help="most drafts in one window, else the heads' own")
    add("--all-exits", action="store_true", help="also those that the heads' own setting turns off")
    add("--no-gates", action="store_true", help="evaluate all heads in use, as in the paper")
    add("--out", type=Path, default=Path("results", name), help="folder of the results")
    options, shared = parser.parse_known_args(arguments)
    refused = [given for given in shared if given.partition("=")[0] in NOT_PASSED_ON]
    if refused:
        parser.error(f"{refused[0].partition('=')[0]} is chosen by the experiment: drop it")
    options.shared = ["--concurrency", "1", *shared, "--out", str(options.out)]
    # Mistakes in these are to end the command before anything is read.
    options.compare = compare.parse(["--methods", "vanilla", *options.shared])
    return options


def _gammas(text: str) -> tuple[float, ...]:
    try:
        found = sorted({float(part) for part in text.split(",")})
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be numbers with commas, not {text}") from None
    if not all(0 <= gamma <= OFF for gamma in found):
        raise argparse.ArgumentTypeError(f"must lie in [0, 1], not {text}")
    return tuple(found)


def make_plan(options: argparse.Namespace, choose: Callable[[Settings], Variants]) -> Plan:
    """
    Raises:
        AdaDecodeError: target, heads or data can't be used.
    """
    heads = read_heads(options.compare.target, options.heads)
    settings = Settings(
        heads, options.heads, options.drafts, options.all_exits, not options.no_gates
    )
    variants = choose(settings)
    specs = [f"--spec={name}={json.dumps(config)}" for name, config in variants.items()]
    given = [*options.shared, "--temperature", "0", "--methods", ",".join(variants), *specs]
    return compare.make_plan(compare.parse(given))


def run(
    name: str, options: argparse.Namespace, choose: Callable[[Settings], Variants], report: Report
) -> int:
    """Measure what is missing, report, and return the exit code; the report's if all went well."""
    # Wide enough for the table where the output is a file.
    console = Console() if sys.stdout.isatty() else Console(width=150)
    stop_on_sigterm()
    try:
        plan = make_plan(options, choose)
        store = Store(options.out, compare.settings(plan))
        if not options.compare.report_only:
            compare.measure(plan, store, console, options.compare.retry)
        return report(plan, store, compare.about(plan), console)
    except AdaDecodeError as error:
        print(f"{name}: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{name}: stopped; the same command goes on", file=sys.stderr)
        return 130
