"""``python -m benchmarks.demo.evaluate``: the demo target's heads, measured.

Generates greedily for the prompts in ``prompts.json`` and counts what AdaDecode would have saved.
It measures layer passes, not seconds, and needs transformers only: any machine gives these numbers.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM

from benchmarks.demo import prompts as demo_prompts
from benchmarks.demo.heads import load_heads
from benchmarks.demo.measure import NEW_TOKENS, Report, report_sets

HERE = Path(__file__).parent
NAMES = {"held_out": "held-out files", "second_stage": "trained files"}
GOALS = "goals: at least 3.0 tokens a verification, at most 0.75 layer passes, under 10 % looping"


def rows(reports: Mapping[str, Report]) -> list[list[str]]:
    """One row per measure, one column per set of prompts."""
    measures: list[tuple[str, list[str]]] = []

    def add(name: str, values: list[float], form: str) -> None:
        measures.append((name, [format(v, form) for v in values]))

    all_of = list(reports.values())
    add("tokens a verification", [r.tokens_per_verification for r in all_of], ".2f")
    add("layer passes a token (plain: 1)", [r.layer_passes_per_token for r in all_of], ".3f")
    add("head checks a token", [r.head_checks_per_token for r in all_of], ".2f")
    add("drafts accepted", [r.drafts_accepted for r in all_of], ".1%")
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
    parser = argparse.ArgumentParser(prog="python -m benchmarks.demo.evaluate", description=__doc__)
    parser.add_argument("--model", type=Path, default=HERE / "model")
    parser.add_argument("--heads", type=Path, help="default: adadecode/ in the model's folder")
    parser.add_argument("--prompts", type=Path, default=HERE / "prompts.json")
    parser.add_argument("--new-tokens", type=int, default=NEW_TOKENS)
    parser.add_argument("--threshold", type=float, default=0.75)
    parser.add_argument("--drafts", type=int, default=5, help="at most, before a verification")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path, default=Path("results/demo-heads.json"))
    return parser.parse_args()


def main() -> None:
    args = arguments()
    torch.set_num_threads(args.threads)
    # The stored weights are bf16; computing in fp32 makes the numbers those of every machine.
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    tokenizer = Tokenizer.from_file(str(args.model / "tokenizer.json"))
    heads = load_heads(args.heads or args.model / "adadecode")
    prompts = demo_prompts.encoded_sets(demo_prompts.load(args.prompts), tokenizer)
    reports = report_sets(model, heads, prompts, args.new_tokens, args.threshold, args.drafts)
    title = f"{heads.name} heads, threshold {args.threshold}, at most {args.drafts} drafts"
    Console().print(table(reports, title))
    args.output.parent.mkdir(parents=True, exist_ok=True)
    settings = {"threshold": args.threshold, "drafts": args.drafts, "heads": heads.name}
    found = {"settings": settings} | {name: r.as_dict() for name, r in reports.items()}
    args.output.write_text(json.dumps(found, indent=2) + "\n")
    print(f"written: {args.output}")


if __name__ == "__main__":
    main()
