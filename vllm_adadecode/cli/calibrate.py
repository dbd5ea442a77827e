"""``adadecode calibrate``: exits, thresholds and K that pay best, as a heads folder of its own.

Owns the command line and what is written; the choice is `vllm_adadecode.evaluation.calibrate`'s.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from vllm_adadecode.cli.evaluate import add_data_arguments, disk_errors, run_heads

DESCRIPTION = (
    "Choose exit layers, thresholds, gate thresholds and K that give the most tokens a unit of "
    "cost, on sequences that the heads were not trained on. One half of each set chooses, the "
    "other half predicts. No set gets slower than plain decoding: if nothing pays, drafting is "
    "turned off. Writes a heads folder with the choice, and calibration.json."
)


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "calibrate", help="choose exits, thresholds and K by cost", description=DESCRIPTION
    )
    add_data_arguments(parser, costs="measured")
    parser.add_argument(
        "--output", type=Path, required=True, metavar="DIR", help="heads folder to write"
    )
    parser.add_argument(
        "--least-acceptance",
        type=float,
        default=0.0,
        metavar="SHARE",
        help="smallest draft acceptance rate, on every set (default 0: speed alone)",
    )
    parser.add_argument(
        "--most-drafts",
        type=int,
        metavar="K",
        help="largest K (default: any); K tokens of every request are reserved in each step",
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="replace heads that --output holds already"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from rich.console import Console

    from vllm_adadecode.evaluation import report
    from vllm_adadecode.evaluation.calibrate import calibrate
    from vllm_adadecode.evaluation.costs import choose_costs
    from vllm_adadecode.evaluation.publish import publish
    from vllm_adadecode.heads.checkpoint import check_output
    from vllm_adadecode.training.provenance import provenance, public

    check_output(args.output, args.overwrite)
    session, traces, notes = run_heads(args)
    costs = choose_costs(args.costs, session.config, session.target, session.readout)
    errors = Console(stderr=True)
    with errors.status("choosing settings"):
        found = calibrate(
            traces,
            costs,
            session.setting,
            session.readout.has_gate,
            args.least_acceptance,
            args.most_drafts,
        )
    exits = session.config.exit_layers
    result = report.calibration_json(found, exits)
    result |= {"data": list(map(public, args.data)), "made_with": provenance()}
    with disk_errors():
        publish(session, found.setting, args.output, result)
    if args.json:
        print(json.dumps(result | {"notes": notes}, indent=2))
        return 0
    console = Console(highlight=False)
    console.print(report.calibration_table(found))
    console.print(report.setting_line(found.setting, exits), markup=False)
    if not found.pays:
        console.print("nothing pays at these costs: drafting is turned off", markup=False)
    console.print(report.costs_line(costs), markup=False)
    for line in (*notes, f"written: {args.output}"):
        console.print(line, markup=False)
    return 0
