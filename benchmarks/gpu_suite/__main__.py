"""Everything about AdaDecode that needs a GPU: correctness, then speed, in ten minutes.

    python -m benchmarks.gpu_suite [--quick] [--device cpu] [--target FOLDER] [--minutes 10]

Writes docs/gpu-results.json after every part (results/gpu-suite-quick.json with --quick or on a
CPU), and goes on with what is missing when it is started again. Exit code 1 if outputs differ that
may not, or a part failed; 3 if time ran out. See benchmarks/gpu_suite/__init__.py.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress

from benchmarks.demo.__main__ import HERE
from benchmarks.demo.server import stop_on_sigterm
from benchmarks.gpu import require_gpu
from benchmarks.gpu_suite import parts, table
from benchmarks.gpu_suite.ideal import Reading
from benchmarks.gpu_suite.prompts import load
from benchmarks.gpu_suite.result import FAILED, Result
from benchmarks.gpu_suite.settings import Settings, full, quick
from benchmarks.gpu_suite.suite import Clock, Suite, make_engines
from benchmarks.machine import command, git_revision, machine, versions
from benchmarks.widening.build import read_config, total_bytes, widen
from benchmarks.widening.shape import Shape
from vllm_adadecode.cli.progress import counting
from vllm_adadecode.errors import AdaDecodeError

FULL_OUT, QUICK_OUT = Path("docs/gpu-results.json"), Path("results/gpu-suite-quick.json")
LOGS = Path("results/gpu-suite")
# Kept back of the time for stopping engines.
STOPPING_S = 15.0


def build_target(settings: Settings, folder: Path, progress: Progress) -> dict[str, Any]:
    """The demo model in the wanted shape, unless the folder has it; what is written of it.

    Raises:
        AdaDecodeError: the folder holds something else.
    """
    dtype: torch.dtype = getattr(torch, settings.dtype)
    begin = time.monotonic()
    if (folder / "config.json").is_file():
        if Shape.of(read_config(folder)) != settings.shape:
            raise AdaDecodeError(f"{folder} holds a model of another shape: give another --target")
    else:
        size = total_bytes(settings.shape, dtype)
        task = progress.add_task("widening the target (MB)", total=size // 10**6)

        def advance(done: int) -> None:
            progress.advance(task, done / 10**6)

        # A head check must cost its share of the LM head: half of the tokens, as in the source.
        widen(
            HERE / "model",
            folder,
            settings.shape,
            dtype,
            advance,
            grow_draft_vocab=True,
            other_drafters=False,
        )
    return {
        "shape": str(settings.shape),
        "weights": settings.shape.weights,
        "made_from": "benchmarks/demo/model",
        "seconds": round(time.monotonic() - begin, 1),
    }


def measure(
    options: argparse.Namespace, settings: Settings, result: Result, console: Console
) -> None:
    """Run the parts that the result does not have yet."""
    every = parts.all_parts(settings)
    result.expected = ("bandwidth", *(part.name for part in every))
    todo = [part for part in every if not result.is_done(part.name)]
    if result.is_done("bandwidth") and not todo:
        return
    clock = Clock(60 * options.minutes - STOPPING_S)
    result.about["command"] = command()
    with ExitStack() as stack:
        progress = stack.enter_context(counting(console))
        if not result.is_done("bandwidth"):
            parts.measure_bandwidth(settings.device, clock, result)
        target = options.target
        if target is None:
            scratch = tempfile.TemporaryDirectory(prefix="gpu-suite-")
            target = Path(stack.enter_context(scratch)) / "target"
        result.about["target"] = build_target(settings, target, progress)
        reading = Reading.of(target, getattr(torch, settings.dtype).itemsize)
        result.about["target"] |= {"reads": reading.as_dict()}
        task = progress.add_task("measuring", total=sum(part.steps for part in todo))
        suite = Suite(
            settings,
            result,
            clock,
            make_engines(settings, target, LOGS),
            load(HERE / "model"),
            reading,
            lambda: progress.advance(task),
        )
        stack.callback(suite.close)
        parts.run_all(suite, todo, lambda name: progress.update(task, description=name))


def identity(settings: Settings) -> dict[str, Any]:
    """What parts of one result have in common."""
    found = machine()
    return {
        "gpu": found["gpus"][0] if settings.device == "cuda" and found["gpus"] else None,
        "versions": versions(),
        "git": git_revision(),
        "machine": found,
        "settings": settings.as_dict(),
    }


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_suite",
        description=__doc__.splitlines()[0] if __doc__ else None,
    )
    parser.add_argument("--quick", action="store_true", help="tiny: shows that everything runs")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: as --quick")
    parser.add_argument("--minutes", type=_minutes, default=10.0, help="for everything")
    parser.add_argument(
        "--target",
        type=Path,
        metavar="FOLDER",
        help="where the target is kept or made; default: a temporary folder (2 GB on disk)",
    )
    parser.add_argument(
        "--speculative-config",
        type=_options,
        default={},
        metavar="JSON",
        help="more options of the method, such as '{\"cost_aware\": true}'",
    )
    parser.add_argument("--out", type=Path, help=f"default: {FULL_OUT}, quick: {QUICK_OUT}")
    parser.add_argument("--again", action="store_true", help="measure what is measured already")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    options = build_parser().parse_args(argv)
    if options.device == "cuda":
        require_gpu("python -m benchmarks.gpu_suite (without --device cpu)")
    tiny = options.quick or options.device == "cpu"
    settings = quick(options.device) if tiny else full()
    settings = replace(settings, speculative_config=options.speculative_config)
    console = Console(stderr=True)
    # Ended from outside, the engines are to be stopped as after Ctrl-C.
    stop_on_sigterm()
    try:
        out = options.out or (QUICK_OUT if tiny else FULL_OUT)
        result = Result.open(out, identity(settings), options.again)
        if out.exists() and not result.parts:
            console.print(f"{out} is measured anew: --again, or other settings, code or machine")
        measure(options, settings, result, console)
    except (AdaDecodeError, OSError) as error:
        print(f"gpu-suite: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("gpu-suite: interrupted, engines stopped; what was done is kept", file=sys.stderr)
        return 130
    written = result.as_dict()
    table.show(Console(), written)
    print(f"written to {out}; logs of the engines: {LOGS}")
    return exit_code(written)


def exit_code(written: dict[str, Any]) -> int:
    """0: all done and correct."""
    ties = written["ties"] or {}
    failed = any(part["status"] == FAILED for part in written["parts"].values())
    if failed or written["bit_identical"] is False or ties.get("beyond_bound"):
        return 1
    return 3 if written["missing"] else 0


def _minutes(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError("must be above 0")
    return value


def _options(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError("must be a JSON object")
    return value


if __name__ == "__main__":
    sys.exit(main())
