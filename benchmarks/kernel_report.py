"""Equality and compilation of every kernel, without a GPU.

Each kernel runs under Triton's interpreter against its torch reference, over the cases of
tests/kernels, and is compiled for sm_80 and sm_90 at real shapes.

    python -m benchmarks.kernel_report [--kernel PART OF A NAME]

Writes results/kernels.json: ``kernels``, a list with ``name``, ``equal`` (in every case that
launches it), ``cases``, ``compiled`` (architectures for which every variant compiled), and
``registers`` and ``shared_memory`` by architecture, the most of any variant, with the variants
under ``launches``. Ends with 1 if a kernel is not equal or does not compile.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import triton
from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks.arguments import make_parser
from benchmarks.kernel_launches import (
    ARCHITECTURES,
    compile_launch,
    record,
    use_triton_without_device,
)
from benchmarks.machine import command, git_revision, machine, versions
from tests.kernels.cpu.running import compare_apart
from vllm_adadecode.files import write_json


def describe(
    name: str, comparison: dict[str, Any], launches: list[dict[str, Any]]
) -> dict[str, Any]:
    """One kernel's entry.

    Args:
        comparison: what tests/kernels/compare.py prints.
        launches: from `kernel_launches.compile_launch`, or with ``error``.
    """
    cases = [case for case, kernels in comparison["kernels"].items() if name in kernels]
    by_architecture = {
        architecture: [entry for entry in launches if entry["architecture"] == architecture]
        for architecture in ARCHITECTURES
    }
    compiled = [
        architecture
        for architecture, entries in by_architecture.items()
        if entries and not any("error" in entry for entry in entries)
    ]

    def most(key: str) -> dict[str, int]:
        return {a: max(entry[key] for entry in by_architecture[a]) for a in compiled}

    return {
        "name": name,
        "equal": bool(cases) and not any(comparison["differences"][case] for case in cases),
        "cases": cases,
        "compiled": compiled,
        "registers": most("registers"),
        "shared_memory": most("shared_memory"),
        "spilled": most("spilled"),
        "launches": launches,
    }


def show(kernels: list[dict[str, Any]], console: Console) -> None:
    table = Table("kernel", "equal", "cases", "compiled", "registers", "shared memory", "spilled")
    for kernel in kernels:
        table.add_row(
            kernel["name"].partition("._")[2].removesuffix("_kernel"),
            "yes" if kernel["equal"] else "NO",
            str(len(kernel["cases"])),
            ", ".join(kernel["compiled"]) or "NO",
            *(
                " / ".join(str(value) for value in kernel[key].values())
                for key in ("registers", "shared_memory", "spilled")
            ),
        )
    console.print(table)


def main() -> int:
    parser = make_parser("benchmarks.kernel_report", __doc__)
    parser.add_argument("--kernel", default="", help="only kernels with this in their name")
    parser.add_argument("--no-compare", action="store_true", help="compile alone; equal is false")
    parser.add_argument("--quick", action="store_true", help="one variant of each kernel")
    parser.add_argument("--out", type=Path, default=Path("results/kernels.json"), help="JSON file")
    options = parser.parse_args()
    console = Console(stderr=True)

    use_triton_without_device()
    launches = [launch for launch in record() if options.kernel in launch.kernel]
    if options.quick:
        first = {launch.kernel: launch for launch in reversed(launches)}
        launches = [launch for launch in launches if first[launch.kernel] is launch]
    work = [(launch, arch) for launch in launches for arch in launch.architectures]
    compiled: dict[str, list[dict[str, Any]]] = {launch.kernel: [] for launch in launches}
    for launch, architecture in track(work, "compiling", console=console):
        try:
            entry = compile_launch(launch, architecture)
        except Exception as error:
            entry = {
                "architecture": architecture,
                "variant": launch.variant,
                "error": f"{type(error).__name__}: {error}",
            }
        compiled[launch.kernel].append(entry)

    comparison: dict[str, Any] = {"differences": {}, "kernels": {}, "checks": {}}
    if not options.no_compare:
        console.print("comparing under Triton's interpreter (about two minutes)")
        try:
            comparison = compare_apart("tests.kernels.compare")
        except RuntimeError as error:
            sys.exit(str(error))
    kernels = [describe(name, comparison, entries) for name, entries in compiled.items()]
    show(kernels, console)
    result = {
        "what": "kernels against their references in the interpreter, and compiled; no GPU",
        "command": command(),
        "machine": machine(),
        "versions": {**versions(), "triton": triton.__version__},
        "revision": git_revision(),
        "kernels": kernels,
        "checks": {name: text or "holds" for name, text in comparison["checks"].items()},
    }
    write_json(options.out, result)
    console.print(f"written to {options.out}")
    done = all(
        (kernel["equal"] or options.no_compare) and kernel["compiled"] == list(ARCHITECTURES)
        for kernel in kernels
    )
    return 0 if done and not any(comparison["checks"].values()) else 1


if __name__ == "__main__":
    sys.exit(main())
