"""Serves the demo model with AdaDecode and without, and compares the two over HTTP.

    python -m benchmarks.demo [--prompts N] [--tokens N] [--out FILE]

Both servers are `vllm serve` with the same flags, alive at the same time; they get the same prompts
in turns. Prints a table and writes it as JSON. Exit code 1 if an output differs.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from benchmarks import pair
from benchmarks.arguments import make_parser, run
from benchmarks.server import FLAGS
from benchmarks.tables import figure, make_console
from benchmarks.workload import DEMO_MODEL, DEMO_TARGET, TITLES, load_demo_prompts
from vllm_adadecode.cli.arguments import positive
from vllm_adadecode.cli.progress import counting
from vllm_adadecode.files import write_json

ARGUMENTS = {"vanilla": [], "adadecode": ["--speculative-config", "adadecode"]}


def demo(options: argparse.Namespace) -> int:
    console = make_console()
    begin = time.monotonic()
    with counting(console) as progress:
        measured = pair.measure(
            options.model,
            ARGUMENTS,
            lambda method: options.out.with_name(f"demo-{method}.log"),
            load_demo_prompts(options.prompts),
            options.tokens,
            progress,
        )
    result = pair.build(*measured, TITLES)
    result["server"] = ["vllm", "serve", DEMO_TARGET, *FLAGS, *ARGUMENTS["adadecode"]]
    result["seconds"] = round(time.monotonic() - begin, 1)
    write_json(options.out, result)
    exits = [
        figure(f"exit {layer}: {title}", "{:.1%}", "exits", layer, name)
        for layer in result["exits"]
        for title, name in (
            ("confident when evaluated", "confident_rate"),
            ("draft acceptance rate", "draft_acceptance_rate"),
        )
    ]
    figures = [figure("prompts", "{}", "prompts"), *pair.TIMES, *pair.COUNTS, *exits]
    pair.print_report(console, "vLLM with AdaDecode and without", result, figures)
    where = result["machine"]
    console.print(f"{', '.join(where['gpus']) or where['cpu']}, {where['cores']} cores, float32")
    console.print(f"written to {options.out} after {result['seconds']:.0f} s")
    return 0 if result["identical"] else 1


def main() -> int:
    parser = make_parser("benchmarks.demo", __doc__)
    parser.add_argument("--model", type=Path, default=DEMO_MODEL, help="folder")
    parser.add_argument(
        "--prompts", type=positive, default=32, help="of each kind of files, at most 32"
    )
    parser.add_argument("--tokens", type=positive, default=128, help="generated for each prompt")
    parser.add_argument("--out", type=Path, default=Path("results/demo.json"), help="JSON file")
    options = parser.parse_args()
    return run("demo", lambda: demo(options))


if __name__ == "__main__":
    sys.exit(main())
