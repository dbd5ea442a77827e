"""Serves the demo model with AdaDecode and without, and compares the two over HTTP.

    python -m benchmarks.demo [--prompts N] [--tokens N] [--out FILE]

Both servers are `vllm serve` with the same flags, alive at the same time; they get the same prompts
in turns. Prints a table and writes it as JSON. Exit code 1 if an output differs.
"""

from __future__ import annotations

import argparse
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.arguments import make_parser
from benchmarks.demo import DEMO_TARGET, compare, prompts, report
from benchmarks.demo.server import FLAGS, Server, ServerError, stop_on_sigterm
from vllm_adadecode.cli.arguments import positive
from vllm_adadecode.cli.progress import counting
from vllm_adadecode.files import write_json

HERE = Path(__file__).parent
ARGUMENTS = {"vanilla": [], "adadecode": ["--speculative-config", "adadecode"]}


def measure(options: argparse.Namespace, console: Console) -> dict[str, Any]:
    chosen = prompts.load(HERE / "prompts.json", options.prompts)
    with ExitStack() as stack:
        servers = {
            method: stack.enter_context(
                Server(options.model, arguments, options.out.with_name(f"demo-{method}.log"))
            )
            for method, arguments in ARGUMENTS.items()
        }
        progress = stack.enter_context(counting(console))
        starting = progress.add_task("starting two servers", total=len(servers))
        for server in servers.values():
            server.wait_until_ready()
            progress.advance(starting)
        asking = progress.add_task("asking both in turns", total=2 * len(chosen))
        groups = compare.compare(servers, chosen, options.tokens, lambda: progress.advance(asking))
        differences = compare.find_differences(groups, servers["vanilla"])
    server_command = ["vllm", "serve", DEMO_TARGET, *FLAGS, *ARGUMENTS["adadecode"]]
    return report.build(groups, differences, server_command)


def main() -> int:
    parser = make_parser("benchmarks.demo", __doc__)
    parser.add_argument("--model", type=Path, default=HERE / "model", help="folder")
    parser.add_argument(
        "--prompts", type=positive, default=32, help="of each kind of files, at most 32"
    )
    parser.add_argument("--tokens", type=positive, default=128, help="generated for each prompt")
    parser.add_argument("--out", type=Path, default=Path("results/demo.json"), help="JSON file")
    options = parser.parse_args()
    console = Console()
    stop_on_sigterm()
    begin = time.monotonic()
    try:
        result = measure(options, console)
    except ServerError as error:
        print(f"demo: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("demo: interrupted, servers stopped", file=sys.stderr)
        return 130
    result["seconds"] = round(time.monotonic() - begin, 1)
    write_json(options.out, result)
    report.print_report(console, result)
    console.print(f"written to {options.out} after {result['seconds']:.0f} s")
    return 0 if result["identical"] else 1


if __name__ == "__main__":
    sys.exit(main())
