"""The fused head on a GPU, beside torch, torch.compile, a matmul and a copy of the same bytes.

    python -m benchmarks.kernels [--rows 1 16] [--vocab 128256] [--hidden 4096] [--dtype bfloat16]

Medians over rotating input sets. Writes results/kernels_gpu.json after every shape and goes on
where it stopped (`--again` starts over). Ends with 1 and one line where there is no GPU.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks.arguments import make_parser
from benchmarks.gpu import make_rows, make_weights, median_ms, require_gpu
from benchmarks.kernel_shapes import (
    ROWS,
    HeadShape,
    add_shape_options,
    head_shapes,
    summarise,
)
from benchmarks.machine import command, git_revision, machine, versions
from vllm_adadecode.cli.arguments import positive
from vllm_adadecode.files import write_json

THRESHOLD = 0.75


def plain_head(
    x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Matmul, softmax, max and threshold, as one writes them in torch."""
    logits = project(x, weight, scale)
    p, token = torch.softmax(logits.float(), dim=-1).max(dim=-1)
    return token, p, p > THRESHOLD


def project(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor | None) -> torch.Tensor:
    """The projection alone; int8 weights are widened, as torch has no such product."""
    if scale is None:
        return torch.nn.functional.linear(x, weight)
    return torch.nn.functional.linear(x, weight.to(x.dtype)) * scale


def measure(
    shape: HeadShape, weights: list[tuple[torch.Tensor, torch.Tensor | None]]
) -> dict[str, float]:
    """Median milliseconds by implementation, see `kernel_shapes.summarise`."""
    from vllm_adadecode.kernels.confidence import HeadWeight, head_confidence

    x = make_rows(shape)
    heads = [HeadWeight(weight, scale) for weight, scale in weights]
    compiled = torch.compile(plain_head, dynamic=False)
    # A copy reads and writes: half the bytes move as many as a read of all.
    half = shape.bytes_read // 2
    source = [torch.empty(half, dtype=torch.uint8, device="cuda") for _ in weights]
    target = torch.empty(half, dtype=torch.uint8, device="cuda")
    return {
        "fused": median_ms([partial(head_confidence, x, head, THRESHOLD) for head in heads]),
        "torch": median_ms([partial(plain_head, x, *pair) for pair in weights]),
        "compiled": median_ms([partial(compiled, x, *pair) for pair in weights]),
        "matmul": median_ms([partial(project, x, *pair) for pair in weights]),
        "copy": median_ms([partial(target.copy_, part) for part in source]),
    }


def show(entries: list[dict[str, Any]], console: Console) -> None:
    table = Table("dtype", "d", "V", "rows", "fused ms", "of copy", "of matmul", "x compiled")
    for entry in entries:
        names = ("dtype", "hidden_size", "vocab_size", "rows")
        shape = [str(entry["shape"][name]) for name in names]
        rates = [f"{entry[name]:.2f}" for name in ("of_copy", "of_matmul", "times_compiled")]
        table.add_row(*shape, f"{entry['ms']['fused']:.4f}", *rates)
    console.print(table)


def main() -> int:
    parser = make_parser("benchmarks.kernels", __doc__)
    parser.add_argument("--rows", type=positive, nargs="+", default=list(ROWS), help="of its input")
    add_shape_options(parser)
    parser.add_argument(
        "--out", type=Path, default=Path("results/kernels_gpu.json"), help="JSON file"
    )
    parser.add_argument("--again", action="store_true", help="measure what is measured already")
    options = parser.parse_args()
    require_gpu("python -m benchmarks.kernels")

    console = Console(stderr=True)
    result: dict[str, Any] = {
        "what": "the fused head on a GPU; medians in milliseconds over rotating input sets",
        "command": command(),
        "machine": machine(),
        "versions": versions(),
        "revision": git_revision(),
        "entries": [],
    }
    if options.out.exists() and not options.again:
        result["entries"] = json.loads(options.out.read_text())["entries"]
    done = [entry["shape"] for entry in result["entries"]]
    shapes = list(
        head_shapes(
            tuple(options.rows),
            tuple(options.vocab),
            tuple(options.hidden),
            tuple(options.dtype),
        )
    )
    weights: list[tuple[torch.Tensor, torch.Tensor | None]] = []
    made_for: object = None
    for shape in track([s for s in shapes if asdict(s) not in done], console=console):
        key = shape.dtype, shape.vocab_size, shape.hidden_size
        if made_for != key:
            weights.clear()
            weights.extend(make_weights(shape))
            made_for = key
        ms = measure(shape, weights)
        entry = {"shape": asdict(shape), "ms": ms, **summarise(shape, ms)}
        result["entries"].append(entry)
        write_json(options.out, result)
    show(result["entries"], console)
    console.print(f"written to {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
