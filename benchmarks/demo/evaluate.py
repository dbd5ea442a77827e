"""``python -m benchmarks.demo.evaluate``: the demo target's heads, measured.

Generates greedily for the prompts in ``prompts.json`` and counts what AdaDecode would have saved.
It measures layer passes, not seconds, and needs transformers only: any machine gives these numbers.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer

from benchmarks.arguments import make_parser
from benchmarks.demo import prompts as demo_prompts
from benchmarks.demo.heads import NEW_TOKENS
from benchmarks.demo.measure import Report, report_sets
from vllm_adadecode.cli.arguments import positive
from vllm_adadecode.evaluation import report
from vllm_adadecode.evaluation.session import open_session
from vllm_adadecode.evaluation.simulate import Setting
from vllm_adadecode.files import write_json

HERE = Path(__file__).parent
NAMES = {"held_out": "held-out files", "second_stage": "trained files"}
GOALS = (
    "goals: mean acceptance length at least 3.0, at most 0.75 layers executed per token, "
    "under 10 % looping"
)


def rows(reports: Mapping[str, Report]) -> list[list[str]]:
    """One row per measure, one column per set of prompts."""
    measures: list[tuple[str, list[str]]] = []

    def add(name: str, values: list[float], form: str) -> None:
        measures.append((name, [format(v, form) for v in values]))

    all_of = list(reports.values())
    add("mean acceptance length", [r.mean_acceptance_length for r in all_of], ".2f")
    add(
        "layers executed per token (plain: 1)", [r.layers_executed_per_token for r in all_of], ".3f"
    )
    add("ideal speed-up, heads counted", [r.speedup for r in all_of], ".2f")
    add("heads evaluated per token", [r.heads_evaluated_per_token for r in all_of], ".2f")
    add("draft acceptance rate", [r.draft_acceptance_rate for r in all_of], ".1%")
    add("looping generations", [r.looping for r in all_of], ".1%")
    add("distinct 4-grams", [r.distinct_four_grams for r in all_of], ".2f")
    for i, first in enumerate(all_of[0].exits):
        for field in ("agreement", "coverage", "precision"):
            values = [_share(getattr(r.exits[i], field)) for r in all_of]
            add(f"exit {first.layer}: {field}", values, ".2f")
    return [[name, *values] for name, values in measures]


def _share(value: float | None) -> float:
    """Precision of a head that is never sure is taken as 1."""
    return 1.0 if value is None else value


def table(reports: Mapping[str, Report], title: str) -> Table:
    result = Table(title=title, caption=GOALS)
    result.add_column("")
    for name in reports:
        result.add_column(NAMES.get(name, name), justify="right")
    for row in rows(reports):
        result.add_row(*row)
    return result


def arguments() -> argparse.Namespace:
    parser = make_parser("benchmarks.demo.evaluate", __doc__)
    parser.add_argument("--model", type=Path, default=HERE / "model", help="the target's folder")
    parser.add_argument("--heads", type=Path, help="default: adadecode/ in the model's folder")
    parser.add_argument("--prompts", type=Path, default=HERE / "prompts.json", help="file")
    parser.add_argument("--new-tokens", type=positive, default=NEW_TOKENS, help="of a prompt")
    parser.add_argument("--threshold", type=float, help="of all exits; default: the heads' own")
    parser.add_argument(
        "--drafts", type=positive, help="before a verification; default: the heads' own"
    )
    parser.add_argument("--threads", type=positive, default=2, help="of PyTorch")
    parser.add_argument(
        "--output", type=Path, default=Path("results/demo-heads.json"), help="JSON file"
    )
    return parser.parse_args()


def main() -> None:
    args = arguments()
    torch.set_num_threads(args.threads)
    # The stored weights are bf16; computing in fp32 makes the numbers those of every machine.
    session = open_session(str(args.heads or args.model / "adadecode"), str(args.model), "float32")
    tokenizer = Tokenizer.from_file(str(args.model / "tokenizer.json"))
    setting, exits = session.setting, session.config.exit_layers
    if args.threshold is not None:
        setting = Setting.uniform(len(exits), args.threshold, setting.max_drafts)
    if args.drafts is not None:
        setting = replace(setting, max_drafts=args.drafts)
    prompts = demo_prompts.encoded_sets(demo_prompts.load(args.prompts), tokenizer)
    reports = report_sets(session, prompts, args.new_tokens, setting)
    Console().print(table(reports, report.setting_line(setting, exits)))
    found = {"setting": report.setting_json(setting, exits)}
    write_json(args.output, found | {name: r.as_dict() for name, r in reports.items()})
    print(f"written: {args.output}")


if __name__ == "__main__":
    main()
