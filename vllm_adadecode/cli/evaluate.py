"""``adadecode eval``: what heads are worth on given data.

Owns the command line; the work is `vllm_adadecode.evaluation`'s.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from vllm_adadecode.cli.arguments import positive
from vllm_adadecode.errors import AdaDecodeError

if TYPE_CHECKING:
    from vllm_adadecode.evaluation.metrics import Metrics
    from vllm_adadecode.evaluation.session import Session

DESCRIPTION = (
    "Measure heads on data, simulating the engine's decode steps at batch 1, greedy: for each exit "
    "layer agreement with the last layer, coverage, precision and calibration error; draft "
    "acceptance rate, mean acceptance length, and the ideal speed-up with and without the cost of "
    "heads."
)


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser("eval", help="measure heads on data", description=DESCRIPTION)
    add_data_arguments(parser, costs="bytes")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=run)


def add_data_arguments(parser: argparse.ArgumentParser, costs: str) -> None:
    """Arguments of every command that runs heads on data; ``costs`` is the default."""
    parser.add_argument("heads", metavar="HEADS", help="folder or hub id of heads")
    parser.add_argument(
        "--target", metavar="MODEL", help="the target, if not the one that the heads name"
    )
    parser.add_argument(
        "--data",
        metavar="FILE[:NAME]",
        action="extend",
        nargs="+",
        required=True,
        help="JSON lines with prompt_ids and output_ids that the target generated greedily, or "
        "prompts (.jsonl, .txt) that it is to continue; NAME is the set's in reports, such as "
        "in-domain",
    )
    parser.add_argument(
        "--max-tokens", type=positive, default=256, help="new tokens of a prompt (default 256)"
    )
    parser.add_argument(
        "--max-sequences", type=positive, help="at most so many of each file, drawn at random"
    )
    parser.add_argument(
        "--skip-malformed", action="store_true", help="leave malformed lines out, not refuse them"
    )
    parser.add_argument(
        "--chat", action="store_true", help="put plain prompts into the target's chat template"
    )
    parser.add_argument(
        "--costs",
        default=costs,
        metavar="measured|bytes|FILE",
        help="cost of a head, a gate and the LM head in layers: timed on this machine, from the "
        f"bytes that the target's shape makes them read, or a JSON file (default {costs})",
    )
    parser.add_argument(
        "--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto"
    )
    parser.add_argument(
        "--device-map", help="of transformers, such as auto to spread a large target over GPUs"
    )


def run(args: argparse.Namespace) -> int:
    from vllm_adadecode.evaluation.costs import choose_costs
    from vllm_adadecode.evaluation.metrics import measure
    from vllm_adadecode.evaluation.report import setting_json
    from vllm_adadecode.training.provenance import provenance

    session, traces, notes = run_heads(args)
    costs = choose_costs(args.costs, session.config, session.target, session.readout)
    metrics = {name: measure(found, session.setting, costs) for name, found in traces.items()}
    if args.json:
        result = {
            "heads": str(session.folder),
            "target": session.target.name,
            "setting": setting_json(session.setting, session.config.exit_layers),
            "costs": costs.model_dump(),
            "sets": {name: m.as_dict() for name, m in metrics.items()},
            "notes": notes,
            "made_with": provenance(),
        }
        print(json.dumps(result, indent=2))
    else:
        _print(session, metrics, costs, notes)
    return 0


def run_heads(args: argparse.Namespace) -> tuple[Session, dict[str, Any], list[str]]:
    """Load heads and target, continue prompts, and make traces by set, with progress on stderr.

    Returns:
        The session, traces by name of set, and notes on data that was left out.
    """
    from rich.console import Console

    from vllm_adadecode.cli.progress import counting
    from vllm_adadecode.evaluation.data import load_sets
    from vllm_adadecode.evaluation.session import open_session

    session = open_session(args.heads, args.target, args.dtype, args.device_map)
    with counting(Console(stderr=True), transient=True) as show:
        generating = show.add_task("continuing prompts", total=None)
        sets = load_sets(
            args.data,
            session.target,
            max_tokens=args.max_tokens,
            max_sequences=args.max_sequences,
            skip_malformed=args.skip_malformed,
            chat=args.chat,
            advance=lambda count: show.advance(generating, count),
        )
        show.remove_task(generating)
        running = show.add_task("heads", total=sum(len(s.sequences) for s in sets))
        traces = session.traces(sets, lambda: show.advance(running))
    return session, traces, [note for s in sets for note in s.notes]


@contextmanager
def disk_errors() -> Iterator[None]:
    """Say in one line that the disk has refused."""
    try:
        yield
    except OSError as error:
        where = f" {error.filename}" if error.filename else ""
        reason = error.strerror or type(error).__name__
        raise AdaDecodeError(
            f"can't write{where}: {reason}; nothing half-written is left"
        ) from None


def _print(session: Session, metrics: dict[str, Metrics], costs: Any, notes: list[str]) -> None:
    from rich.console import Console

    from vllm_adadecode.evaluation import report
    from vllm_adadecode.evaluation.metrics import OWN_TEXT

    console = Console(highlight=False)
    title = report.setting_line(session.setting, session.config.exit_layers)
    console.print(report.sets_table(metrics, title))
    for name, m in metrics.items():
        console.print(report.exits_table(name, m))
    console.print(report.costs_line(costs), markup=False)
    for name, m in metrics.items():
        if m.own_text < OWN_TEXT:
            console.print(
                f"{name}: {1 - m.own_text:.0%} of the text is not what the target would have "
                "written; draft tokens are compared with the text, so acceptance is underrated",
                markup=False,
            )
    for line in notes:
        console.print(line, markup=False)
