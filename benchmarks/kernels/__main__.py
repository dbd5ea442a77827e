"""Are the kernels right, and are they fast?

    python -m benchmarks.kernels check [--kernel PART OF A NAME]
    python -m benchmarks.kernels times [--rows 1 16] [--vocab 128256] [--hidden 4096]

`check` needs no GPU: every kernel under Triton's interpreter against its torch reference, over the
cases of tests/kernels, and compiled for sm_80 and sm_90 at real shapes. results/kernels.json says
of each whether it is equal in every case that launches it, for which architectures all of its
launches compile, and the most registers, shared memory and spilled bytes of any. Exit code 1 if one
is not equal or does not compile.

`times` needs one: the fused head beside torch, torch.compile, a matmul and a copy of the same
bytes, medians over rotating input sets, into results/kernels_gpu.json, which is whole after every
shape; what it has is not measured again.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from itertools import product
from pathlib import Path
from typing import Any

from rich.progress import track

from benchmarks.arguments import make_parser, run
from benchmarks.kernels import head
from benchmarks.kernels.head import HeadShape
from benchmarks.machine import record
from benchmarks.tables import Figure, figure, make_console, table
from vllm_adadecode.cli.arguments import positive
from vllm_adadecode.files import write_json


def require_gpu(command: str) -> None:
    """End the process in one line, with status 1, where no CUDA device answers."""
    import torch

    if not torch.cuda.is_available():
        sys.exit(f"{command} measures on a GPU, and no CUDA device answers here")


# --- check ---------------------------------------------------------------------------------------


def describe(
    name: str, comparison: dict[str, Any], launches: list[dict[str, Any]]
) -> dict[str, Any]:
    """One kernel's entry.

    Args:
        comparison: what tests/kernels/compare.py prints.
        launches: from `launches.compile_launch`, or with ``error``.
    """
    from benchmarks.kernels.launches import ARCHITECTURES

    cases = [case for case, kernels in comparison["kernels"].items() if name in kernels]
    by_architecture = {a: [e for e in launches if e["architecture"] == a] for a in ARCHITECTURES}
    compiled = [
        architecture
        for architecture, entries in by_architecture.items()
        if entries and not any("error" in entry for entry in entries)
    ]
    return {
        "name": name,
        "equal": bool(cases) and not any(comparison["differences"][case] for case in cases),
        "cases": cases,
        "compiled": compiled,
        **{
            key: {a: max(entry[key] for entry in by_architecture[a]) for a in compiled}
            for key in ("registers", "shared_memory", "spilled")
        },
        "launches": launches,
    }


def check(options: argparse.Namespace) -> int:
    # Before vLLM is imported.
    from benchmarks.kernels import launches as of

    of.use_triton_without_device()
    console = make_console()
    launches = [launch for launch in of.record() if options.kernel in launch.kernel]
    if options.quick:
        launches = list({launch.kernel: launch for launch in reversed(launches)}.values())
    compiled: dict[str, list[dict[str, Any]]] = {launch.kernel: [] for launch in launches}
    work = list(product(launches, of.ARCHITECTURES))
    for launch, architecture in track(work, "compiling", console=console):
        entry = {"architecture": architecture, "variant": launch.variant}
        try:
            entry |= of.compile_launch(launch, architecture)
        except Exception as error:
            entry["error"] = f"{type(error).__name__}: {error}"
        compiled[launch.kernel].append(entry)
    comparison: dict[str, Any] = {"differences": {}, "kernels": {}, "checks": {}}
    if not options.no_compare:
        from tests.kernels.cpu.running import compare_apart

        console.print("comparing under Triton's interpreter (about two minutes)")
        try:
            comparison = compare_apart("tests.kernels.compare")
        except RuntimeError as error:
            sys.exit(str(error))
    kernels = [describe(name, comparison, entries) for name, entries in compiled.items()]

    def by_architecture(title: str, key: str) -> Figure:
        return Figure(title, lambda kernel: " / ".join(map(str, kernel[key].values())))

    columns = (
        figure("kernel", "{}", "name"),
        figure("equal", "{}", "equal"),
        Figure("cases", lambda kernel: str(len(kernel["cases"]))),
        Figure("compiled", lambda kernel: ", ".join(kernel["compiled"])),
        by_architecture("registers", "registers"),
        by_architecture("shared memory", "shared_memory"),
        by_architecture("spilled", "spilled"),
    )
    console.print(table("Kernels, without a GPU", columns, kernels))
    result = {
        "what": "kernels against their references in the interpreter, and compiled; no GPU",
        **record(),
        "kernels": kernels,
        "checks": {name: text or "holds" for name, text in comparison["checks"].items()},
    }
    out = options.out or Path("results/kernels.json")
    write_json(out, result)
    console.print(f"written to {out}")
    done = all(
        (kernel["equal"] or options.no_compare) and kernel["compiled"] == list(of.ARCHITECTURES)
        for kernel in kernels
    )
    return 0 if done and not any(comparison["checks"].values()) else 1


# --- on a GPU ------------------------------------------------------------------------------------


def times(options: argparse.Namespace) -> int:
    require_gpu("python -m benchmarks.kernels times")
    out = options.out or Path("results/kernels_gpu.json")
    result: dict[str, Any] = {
        "what": "the fused head on a GPU; medians in milliseconds over rotating input sets",
        **record(),
        "entries": json.loads(out.read_text())["entries"] if out.exists() else [],
    }
    done = [entry["shape"] for entry in result["entries"]]
    console = make_console()
    for dtype, hidden, vocab in product(options.dtype, options.hidden, options.vocab):
        shapes = [HeadShape(rows, vocab, hidden, dtype) for rows in options.rows]
        missing = [shape for shape in shapes if asdict(shape) not in done]
        weights = head.make_weights(missing[0]) if missing else []
        for shape in track(missing, f"{dtype}, V={vocab}, d={hidden}", console=console):
            ms = head.measure(shape, weights)
            entry = {"shape": asdict(shape), "ms": ms, **head.summarise(shape, ms)}
            result["entries"].append(entry)
            write_json(out, result)
    shown = ("dtype", "hidden_size", "vocab_size", "rows")
    columns = (
        *(figure(name.replace("_", " "), "{}", "shape", name) for name in shown),
        figure("fused ms", "{:.4f}", "ms", "fused"),
        figure("of copy", "{:.2f}", "of_copy"),
        figure("of matmul", "{:.2f}", "of_matmul"),
        figure("x compiled", "{:.2f}", "times_compiled"),
    )
    console.print(table("The fused head", columns, result["entries"]))
    console.print(f"written to {out}")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    parser = make_parser("benchmarks.kernels", __doc__)
    add = parser.add_argument
    work = {"check": check, "times": times}
    add("what", choices=work, help="to do")
    add("--kernel", default="", help="check: only kernels with this in their name")
    add("--no-compare", action="store_true", help="check: compile alone; equal is false")
    add("--quick", action="store_true", help="check: one launch of each kernel")
    add("--rows", type=positive, nargs="+", default=head.ROWS, help="times: of the head's input")
    add("--vocab", type=positive, nargs="+", default=head.VOCAB_SIZES, help="rows of an LM head")
    add("--hidden", type=positive, nargs="+", default=head.HIDDEN_SIZES, help="its columns")
    dtypes = list(head.WEIGHT_BYTES)
    add("--dtype", nargs="+", default=["bfloat16"], choices=dtypes, help="of its weights")
    add("--out", type=Path, help="default: results/kernels.json, results/kernels_gpu.json")
    options = parser.parse_args(argv)
    return run("kernels", lambda: work[options.what](options), "what was measured is kept")


if __name__ == "__main__":
    sys.exit(main())
