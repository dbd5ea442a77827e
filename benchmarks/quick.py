"""Is AdaDecode still as fast as it was? Under ten minutes on two cores; `make bench-quick`.

    python -m benchmarks.quick [--compare OLD.json] [--prompts N] [--tokens N] [--repeats N]

Widens the demo target until decoding is bound by memory, serves it with AdaDecode and without, and
sends both the same prompts in turns, several times. Writes results/bench-quick.json. Exit code 1 if
outputs differ (in float32 they may not), or if a count is worse than in OLD.json: these do not
depend on what else the machine does. Times are reported as ratios within the run.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks import quick_report
from benchmarks.arguments import make_parser
from benchmarks.demo import compare, prompts
from benchmarks.demo.__main__ import ARGUMENTS, HERE
from benchmarks.demo.server import ENVIRONMENT, Server, ServerError, stop_on_sigterm
from benchmarks.served import load_heads, load_target
from benchmarks.widening.build import total_bytes, widen
from benchmarks.widening.shape import PRESETS
from vllm_adadecode.cli.arguments import positive
from vllm_adadecode.cli.progress import counting
from vllm_adadecode.errors import AdaDecodeError
from vllm_adadecode.files import write_json

# The number of drafts that pays depends on the machine, and on what else it does: what is counted
# here must not.
COUNTED_ARGUMENTS = ARGUMENTS | {
    "adadecode": ["--speculative-config", '{"method": "adadecode", "cost_aware": false}']
}
DTYPES = ("float32", "bfloat16")


def measure(options: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Build the target, ask both servers, and put together what is written."""
    import torch

    dtype: torch.dtype = getattr(torch, options.dtype)
    shape = PRESETS[options.shape]
    chosen = choose(prompts.load(HERE / "prompts.json"), options.prompts)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-quick-")))
        progress = stack.enter_context(counting(console))
        size = total_bytes(shape, dtype)
        widening = progress.add_task("widening the target (MB)", total=size // 10**6)
        widen(
            options.model,
            folder / "target",
            shape,
            dtype,
            lambda done: progress.advance(widening, done / 10**6),
            # A head check must cost its share of the LM head, as in the source.
            grow_draft_vocab=True,
            other_drafters=False,
        )
        servers = {
            method: stack.enter_context(
                Server(
                    folder / "target",
                    [*arguments, "--dtype", options.dtype],
                    options.out.with_name(f"bench-quick-{method}.log"),
                    environment=ENVIRONMENT | {"OMP_NUM_THREADS": str(options.threads)},
                )
            )
            for method, arguments in COUNTED_ARGUMENTS.items()
        }
        starting = progress.add_task("starting two servers", total=len(servers))
        for server in servers.values():
            server.wait_until_ready()
            progress.advance(starting)
        repeated = chosen * options.repeats
        asking = progress.add_task("asking both in turns", total=2 * len(repeated))
        groups = compare.compare(
            servers, repeated, options.tokens, lambda: progress.advance(asking)
        )
        differences = compare.find_differences(groups, servers["vanilla"])
        target = load_target(folder / "target", options.dtype)
        heads = load_heads(folder / "target", target, {})
    settings = {
        "shape": vars(shape),
        "dtype": options.dtype,
        "step_megabytes": round(shape.step_weights * dtype.itemsize / 10**6),
        "prompts": quick_report.digest(chosen),
        "new_tokens": options.tokens,
        "threads": options.threads,
        "repeats": options.repeats,
    }
    return quick_report.build(groups, differences, options.repeats, settings, target, heads)


def choose(known: Sequence[prompts.Prompt], count: int) -> list[prompts.Prompt]:
    """``count`` prompts of each kind of files, of all lengths."""
    chosen = []
    for files in quick_report.TITLES:
        of_kind = [p for p in known if p.files == files]
        chosen += of_kind[:: max(1, len(of_kind) // count)][:count]
    return chosen


def build_parser() -> argparse.ArgumentParser:
    parser = make_parser("benchmarks.quick", __doc__)
    parser.add_argument("--compare", type=Path, metavar="OLD.json", help="an earlier result")
    parser.add_argument("--model", type=Path, default=HERE / "model", help="small model to widen")
    parser.add_argument("--shape", choices=PRESETS, default="cpu", help="to widen it to")
    parser.add_argument("--dtype", choices=DTYPES, default=DTYPES[0], help="of the target")
    parser.add_argument("--prompts", type=positive, default=8, help="of each kind, at most 32")
    parser.add_argument("--tokens", type=positive, default=64, help="generated for each prompt")
    parser.add_argument("--repeats", type=positive, default=3, help="of every prompt")
    cores = len(os.sched_getaffinity(0))
    parser.add_argument("--threads", type=positive, default=cores, help="of each server")
    parser.add_argument(
        "--out", type=Path, default=Path("results/bench-quick.json"), help="JSON file"
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    options = build_parser().parse_args(argv)
    console = Console()
    stop_on_sigterm()
    begin = time.monotonic()
    try:
        old = quick_report.load(options.compare) if options.compare else None
        result = measure(options, console)
        result["seconds"] = round(time.monotonic() - begin, 1)
        write_json(options.out, result)
        quick_report.print_report(console, result, old)
        console.print(f"written to {options.out} after {result['seconds']:.0f} s")
        worse = quick_report.regressions(result, old) if old is not None else []
    except (ServerError, AdaDecodeError, OSError) as error:
        print(f"bench-quick: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("bench-quick: interrupted, servers stopped", file=sys.stderr)
        return 130
    if options.dtype == "float32" and not result["identical"]:
        worse.insert(0, f"{result['divergences']} of {result['outputs']} outputs differ")
    for line in worse:
        print(f"bench-quick: worse: {line}", file=sys.stderr)
    return 1 if worse else 0


if __name__ == "__main__":
    sys.exit(main())
