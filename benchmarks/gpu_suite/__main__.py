"""Everything about AdaDecode that needs a GPU: correctness, then speed, in ten minutes.

    python -m benchmarks.gpu_suite [--device cpu] [--parts bit_identical,ties,host_syncs,speed]

Writes docs/gpu-results.json (results/gpu-suite-cpu.json on a CPU) after every part, so that what
was measured is there if it is stopped. Exit code 1 if outputs differ that may not, or a part
failed. See benchmarks/gpu_suite/__init__.py.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress

from benchmarks import arguments
from benchmarks.arguments import list_of, make_parser
from benchmarks.gpu_suite import parts, report
from benchmarks.gpu_suite.settings import Settings, on_cpu, on_gpu
from benchmarks.gpu_suite.suite import Suite, make_servers, read_costs
from benchmarks.kernels.__main__ import require_gpu
from benchmarks.machine import record
from benchmarks.tables import make_console
from benchmarks.widen.build import read_config, widen_shown
from benchmarks.widen.plan import Shape
from benchmarks.workload import DEMO_MODEL, DEMO_TARGET
from vllm_adadecode.cli.arguments import json_object
from vllm_adadecode.cli.progress import counting
from vllm_adadecode.errors import AdaDecodeError
from vllm_adadecode.files import write_json

GPU_OUT, CPU_OUT = Path("docs/gpu-results.json"), Path("results/gpu-suite-cpu.json")
LOGS = Path("results/gpu-suite")
PARTS = ("bit_identical", "ties", "host_syncs", "speed")


def build_target(settings: Settings, folder: Path, progress: Progress) -> dict[str, Any]:
    """The demo model in the wanted shape, unless the folder has it; what is written of it.

    Raises:
        AdaDecodeError: the folder holds something else.
    """
    if not (folder / "config.json").is_file():
        dtype: torch.dtype = getattr(torch, settings.dtype)
        widen_shown(progress, DEMO_MODEL, folder, settings.shape, dtype)
    elif Shape.of(read_config(folder)) != settings.shape:
        raise AdaDecodeError(f"{folder} holds a model of another shape: give another --target")
    weights = settings.shape.weights
    return {"shape": str(settings.shape), "weights": weights, "made_from": DEMO_TARGET}


def measure(options: argparse.Namespace, settings: Settings, out: Path) -> dict[str, Any]:
    """Run the parts; the result, which is written after each of them."""
    every = parts.all_parts(settings)
    found = {name: every[name] for name in options.parts}
    made = record()
    gpus = made["machine"]["gpus"]
    result: dict[str, Any] = {
        "what": report.WHAT,
        "gpu": gpus[0] if options.device == "cuda" and gpus else None,
        **made,
        "settings": asdict(settings) | {"speculative_config": options.speculative_config},
        "parts": {name: {"data": {}, "error": "not run"} for name in found},
    }

    def written(name: str, part: dict[str, Any]) -> None:
        result["parts"][name] = part
        result.update(report.summary(result["parts"]))
        write_json(out, result)

    with ExitStack() as stack:
        progress = stack.enter_context(counting(make_console()))
        target = options.target or Path(f".demo-build/gpu-suite-{options.device}")
        result["target"] = build_target(settings, target, progress)
        task = progress.add_task("measuring", total=sum(part.steps for part in found.values()))
        costs = read_costs(target)
        result["target"]["costs"] = costs.model_dump()
        servers = make_servers(settings, target, LOGS, options.speculative_config)
        suite = Suite(settings, servers, costs, lambda: progress.advance(task))
        stack.enter_context(suite)
        parts.run_all(suite, found, written)
    return result


def run(options: argparse.Namespace) -> int:
    settings = on_gpu() if options.device == "cuda" else on_cpu()
    out = options.out or (GPU_OUT if options.device == "cuda" else CPU_OUT)
    result = measure(options, settings, out)
    report.show(make_console(), result)
    print(f"written to {out}; logs of the servers: {LOGS}")
    return report.exit_code(result)


def main(argv: Sequence[str] | None = None) -> int:
    parser = make_parser("benchmarks.gpu_suite", __doc__)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: tiny")
    parser.add_argument(
        "--target",
        type=Path,
        metavar="FOLDER",
        help="where the target is, or is made; default: in .demo-build (2 GB on disk)",
    )
    parser.add_argument(
        "--speculative-config",
        type=json_object,
        default={},
        metavar="JSON",
        help="more options of the method, such as '{\"cost_aware\": true}'",
    )
    parser.add_argument("--out", type=Path, help=f"default: {GPU_OUT}, or {CPU_OUT}")
    parser.add_argument("--parts", type=list_of(_part), default=list(PARTS), help="to measure")
    options = parser.parse_args(argv)
    if options.device == "cuda":
        require_gpu("python -m benchmarks.gpu_suite (without --device cpu)")
    return arguments.run(
        "gpu-suite", lambda: run(options), "servers stopped; what was done is kept"
    )


def _part(text: str) -> str:
    if text not in PARTS:
        raise argparse.ArgumentTypeError(f"no part {text}: use {','.join(PARTS)}")
    return text


if __name__ == "__main__":
    sys.exit(main())
