"""``python -m benchmarks.compare``: speculative methods side by side on one target.

Starts `vllm serve` for each method in turn and sends all of them the same prompts. A stopped run
goes on when the same command is given again; a method that does not start is reported, and the run
goes on without it.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import sys
from pathlib import Path
from typing import Any

from benchmarks import arguments
from benchmarks.arguments import list_of, make_parser
from benchmarks.compare import methods, report, run
from benchmarks.compare.run import Plan, Store
from benchmarks.costs import read_config
from benchmarks.machine import gpus, record
from benchmarks.tables import make_console
from benchmarks.workload import DEMO_TARGET, Part, load_parts
from vllm_adadecode.cli.arguments import json_object, positive
from vllm_adadecode.cli.progress import counting
from vllm_adadecode.training.records import RecordReader
from vllm_adadecode.training.target_model import load_tokenizer

ALL = ("vanilla", "adadecode", "medusa", "eagle3", "draft_model", "ngram", "suffix")
STOPPED = "servers stopped; the same command goes on"


def parse(given: list[str] | None = None) -> argparse.Namespace:
    parser = make_parser("benchmarks.compare", __doc__)
    add = parser.add_argument
    add("--target", default=DEMO_TARGET, help="folder or hub id of the model")
    known = ", ".join(methods.METHODS)
    add("--methods", type=list_of(_method), default=list(ALL), help=f"of {known}")
    add(
        "--data",
        nargs="+",
        default=["demo"],
        help="demo, offline, FILE.jsonl[:name], xsum, humaneval, gsm8k, or another data set of the "
        "hub",
    )
    add("--concurrency", type=list_of(positive), default=[1, 4, 16], help="requests at once")
    add("--temperature", type=list_of(float), default=[0.0, 0.7], help="of sampling")
    add("--repetitions", type=positive, default=3, help="servers of each method, one at a time")
    add("--prompts", type=positive, default=32, help="of each part of the data, at most")
    add(
        "--tokens", type=positive, help="generated for each prompt; the paper's sets: 512, else 128"
    )
    add("--chat", action="store_true", help="put prompts into the target's chat template")
    add("--draft-tokens", type=positive, default=5, metavar="K", help="of methods that do not say")
    add("--drafter", type=_named, action="append", default=[], metavar="METHOD=FOLDER",
        help="in place of the one beside the target")  # fmt: skip
    add("--spec", type=_options, action="append", default=[], metavar="METHOD=JSON",
        help="more of a method's --speculative-config")  # fmt: skip
    add("--dtype", help="of the servers; without a GPU float32, which keeps outputs the same")
    add("--serve-args", default="", help="more arguments of every `vllm serve`, in one string")
    add("--out", type=Path, default=Path("results/compare"), help="folder of the results")
    add("--report-only", action="store_true", help="of what there is; measure nothing")
    options = parser.parse_args(given)
    if "vanilla" not in options.methods:
        parser.error("--methods needs vanilla: all ratios are to it")
    return options


def _method(text: str) -> str:
    if methods.kind(text) not in methods.METHODS or not re.fullmatch(r"[\w@.+-]+", text):
        raise argparse.ArgumentTypeError(f"no method {text}: use {', '.join(methods.METHODS)}")
    return text


def _named(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals or not value:
        raise argparse.ArgumentTypeError(f"{text} is not METHOD=VALUE")
    return _method(name), value


def _options(text: str) -> tuple[str, dict[str, Any]]:
    name, value = _named(text)
    return name, json_object(value)


def make_plan(options: argparse.Namespace) -> Plan:
    """
    Raises:
        AdaDecodeError: target or data can't be used.
    """
    config = read_config(options.target)
    reader = RecordReader(load_tokenizer(options.target), options.target, chat=options.chat)
    context = getattr(config, "max_position_embeddings", None) or 1 << 20
    parts = load_parts(
        options.data, reader, context=context, count=options.prompts, tokens=options.tokens
    )
    drafters, specs = dict(options.drafter), dict(options.spec)
    how: dict[str, methods.Arguments | methods.NotReadyError] = {}
    for name in options.methods:
        try:
            how[name] = methods.arguments(
                name, options.target, options.draft_tokens, drafters.get(name), specs.get(name)
            )
        except methods.NotReadyError as error:
            how[name] = error
    return Plan(
        target=options.target,
        methods=how,
        parts=parts,
        temperatures=options.temperature,
        concurrencies=options.concurrency,
        repetitions=options.repetitions,
        flags=serve_flags(options, parts, context),
    )


def serve_flags(options: argparse.Namespace, parts: list[Part], context: int) -> tuple[str, ...]:
    """Arguments of every server. What `--serve-args` says comes last, and so holds."""
    # Room for the longest answer and its draft tokens; more would only cost memory.
    longest = max(len(p) + part.max_tokens for part in parts for p in part.prompts)
    length = min(context, -(-(longest + 32) // 64) * 64)
    dtype = options.dtype or ("auto" if gpus() else "float32")
    return (
        *("--dtype", dtype, "--max-model-len", str(length)),
        *("--max-num-seqs", str(max(options.concurrency))),
        # A prompt that is sent again must cost the same again.
        "--no-enable-prefix-caching",
        *shlex.split(options.serve_args),
    )


def environment() -> dict[str, str]:
    """What servers inherit that changes how fast they are."""
    names = ("OMP_NUM_THREADS", *sorted(name for name in os.environ if name.startswith("VLLM_")))
    return {name: os.environ[name] for name in names if name in os.environ}


def open_store(plan: Plan, folder: Path) -> Store:
    """The folder of results, for measurements that share all that they depend on.

    Raises:
        AdaDecodeError: it holds those of another comparison.
    """
    settings = {
        "target": plan.target,
        "flags": list(plan.flags),
        "environment": environment(),
        "parts": {part.name: part.digest for part in plan.parts},
        "methods": {
            name: list(how.flags)
            for name, how in plan.methods.items()
            if isinstance(how, methods.Arguments)
        },
    }
    return Store(folder, settings)


def about(plan: Plan) -> dict[str, Any]:
    """How it was made."""
    return {
        "target": plan.target,
        "prompts": {part.name: len(part.prompts) for part in plan.parts},
        "new tokens": {part.name: part.max_tokens for part in plan.parts},
        "left out": [note for part in plan.parts for note in part.notes],
        "repetitions": plan.repetitions,
        "environment": environment(),
        **record(),
    }


def compare(options: argparse.Namespace) -> int:
    console = make_console()
    plan = make_plan(options)
    store = open_store(plan, options.out)
    if not options.report_only:
        with counting(console, left=True) as progress:
            run.run(plan, store, progress)
    page = report.write(plan, store, about(plan), console)
    console.print(f"written to {page.parent}: compare.json, figures; open {page}")
    return 0


def main() -> int:
    options = parse()
    return arguments.run("compare", lambda: compare(options), STOPPED)


if __name__ == "__main__":
    sys.exit(main())
