"""Search block sizes of the fused head on this GPU and write them to kernels/configs.

    python -m benchmarks.tune_kernels [--vocab 128256] [--hidden 4096] [--dtype bfloat16]

One file for each shape (see kernels/tuning.py). What decides in which order a row's numbers are
added is chosen once for all numbers of rows, as the one with the least sum of slow-downs against
each number's own best. Measurements are kept in results/tune_kernels.json: a search that was
stopped goes on. Ends with 1 and one line where there is no GPU.
"""

from __future__ import annotations

import json
import sys
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress

from benchmarks.arguments import make_parser
from benchmarks.gpu import make_rows, make_weights, median_ms, require_gpu
from benchmarks.kernel_shapes import HeadShape, add_shape_options
from vllm_adadecode.files import write_json

ROWS = (16, 32, 64, 128, 256)

# BLOCK_V, BLOCK_K, num_warps, tiles_per_split
Shared = tuple[int, int, int, int]
# BLOCK_R, num_stages
Rows = tuple[int, int]

SHARED = tuple(
    (v, k, warps, tiles)
    for v, k, warps, tiles in product((64, 128, 256), (32, 64, 128, 256), (4, 8), (1, 2, 4))
    if v * k <= 128 * 256
)

# Milliseconds by shared choice and number of rows, then by choice for the rows.
Measured = dict[Shared, dict[int, dict[Rows, float]]]


def row_candidates(num_rows: int) -> list[Rows]:
    """Tile widths that hold the rows, or half of them or a quarter; each with its stages."""
    widths = {w for w in (num_rows, num_rows // 2, num_rows // 4) if 16 <= w <= 128}
    return [(width, stages) for width, stages in product(sorted(widths), (2, 3, 4, 5))]


def choose(measured: Measured) -> dict[str, Any]:
    """The config: the shared choice that costs least over all numbers of rows, and its best rows.

    A choice that failed for a number of rows, as one that needs too much shared memory does, is
    infinitely slow there.

    Raises:
        ValueError: nothing works for all numbers of rows.
    """
    best_at = {
        rows: min(min(by_rows[rows].values()) for by_rows in measured.values())
        for rows in next(iter(measured.values()))
    }

    def cost(shared: Shared) -> float:
        return sum(min(measured[shared][rows].values()) / ms for rows, ms in best_at.items())

    # The first of equals, so that a search gives the same answer again.
    shared = min(measured, key=cost)
    if not cost(shared) < float("inf"):
        raise ValueError("no block sizes work for all numbers of rows")
    by_rows = measured[shared]
    picked = {rows: min(times, key=lambda choice: times[choice]) for rows, times in by_rows.items()}
    block_v, block_k, num_warps, tiles = shared
    return {
        "BLOCK_V": block_v,
        "BLOCK_K": block_k,
        "num_warps": num_warps,
        "tiles_per_split": tiles,
        "rows": {
            str(rows): {"BLOCK_R": width, "num_stages": stages}
            for rows, (width, stages) in sorted(picked.items())
        },
    }


class Measurements:
    """What has been measured, on disk after every choice."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.times: dict[str, float] = json.loads(path.read_text()) if path.exists() else {}

    def get(self, key: str) -> float | None:
        return self.times.get(key)

    def put(self, key: str, ms: float) -> None:
        self.times[key] = ms
        write_json(self.path, self.times)


def measure(
    shape: HeadShape,
    weights: list[tuple[torch.Tensor, torch.Tensor | None]],
    shared: Shared,
    rows: Rows,
) -> float:
    """Median milliseconds; infinite where the choice does not fit the GPU."""
    from triton.runtime.errors import OutOfResources

    from vllm_adadecode.kernels.confidence import HeadWeight, head_confidence
    from vllm_adadecode.kernels.tuning import HeadBlocks

    (block_v, block_k, num_warps, tiles), (block_r, stages) = shared, rows
    blocks = HeadBlocks(block_v, block_k, block_r, tiles, num_warps, stages)
    x = make_rows(shape)
    heads = [HeadWeight(weight, scale) for weight, scale in weights]
    try:
        return median_ms([partial(head_confidence, x, head, 0.5, blocks=blocks) for head in heads])
    except OutOfResources:
        return float("inf")


def tune(shape: HeadShape, device: str, kept: Measurements, progress: Progress) -> dict[str, Any]:
    """Measure every choice for an LM head, at every number of rows."""
    weights = make_weights(shape)
    work = [(s, n, r) for s in SHARED for n in ROWS for r in row_candidates(n)]
    bar = progress.add_task(f"V={shape.vocab_size} d={shape.hidden_size}", total=len(work))
    measured: Measured = {shared: {rows: {} for rows in ROWS} for shared in SHARED}
    for shared, num_rows, rows in work:
        at = HeadShape(num_rows, shape.vocab_size, shape.hidden_size, shape.dtype)
        key = f"{device} {at} {shared} {rows}"
        ms = kept.get(key)
        if ms is None:
            ms = measure(at, weights, shared, rows)
            kept.put(key, ms)
        measured[shared][num_rows][rows] = ms
        progress.advance(bar)
    return choose(measured)


def main() -> int:
    parser = make_parser("benchmarks.tune_kernels", __doc__)
    add_shape_options(parser)
    parser.add_argument("--out", type=Path, help="folder; default: kernels/configs")
    options = parser.parse_args()
    require_gpu("python -m benchmarks.tune_kernels")

    import triton

    from vllm_adadecode.kernels.tuning import CONFIGS, config_file_name

    kept = Measurements(Path("results/tune_kernels.json"))
    device = torch.cuda.get_device_name()
    console = Console(stderr=True)
    with Progress(console=console) as progress:
        for dtype, hidden, vocab in product(options.dtype, options.hidden, options.vocab):
            config = tune(HeadShape(1, vocab, hidden, dtype), device, kept, progress)
            config["triton_version"] = triton.__version__
            path = (options.out or CONFIGS) / config_file_name(vocab, hidden, dtype, device)
            write_json(path, config)
            console.print(f"written to {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
