"""The fused head on a GPU: beside torch, torch.compile, a matmul and a copy of the same bytes; and
the search for its block sizes.

Owns the shapes, what must be read there and what counts as fast enough.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import cycle, product
from typing import Any

import torch

HIDDEN_SIZES = (2048, 4096, 8192)
VOCAB_SIZES = (32000, 128256, 151936)
ROWS = (1, 2, 4, 8, 16, 64, 256)
THRESHOLD = 0.75

# Bytes of a weight, and of a row scale.
WEIGHT_BYTES = {"bfloat16": 2, "float16": 2, "int8": 1}
SCALE_BYTES = 4
# Rotating input sets together are larger than any GPU's cache by far.
ROTATED_BYTES = 1 << 30
# Up to here the head is bound by reading the weights; from the last on by multiplying.
FEW_ROWS, MANY_ROWS = 16, 256
COPY_GOAL, MATMUL_GOAL = 0.85, 0.80

# Weights of an LM head, and row scales beside int8 ones.
Weights = tuple[torch.Tensor, torch.Tensor | None]


@dataclass(frozen=True)
class HeadShape:
    """One measurement of the head.

    Attributes:
        rows, vocab_size, hidden_size: of the projection.
        dtype: of the weights; the rows are bfloat16 beside int8 weights.
    """

    rows: int
    vocab_size: int
    hidden_size: int
    dtype: str = "bfloat16"

    @property
    def weight_bytes(self) -> int:
        """Bytes of the LM head, with its row scales."""
        size = WEIGHT_BYTES[self.dtype]
        scales = SCALE_BYTES * self.vocab_size if size == 1 else 0
        return self.vocab_size * self.hidden_size * size + scales

    @property
    def bytes_read(self) -> int:
        """Bytes that any implementation must read: the weights and the rows, once."""
        return self.weight_bytes + self.rows * self.hidden_size * 2

    @property
    def flops(self) -> int:
        """Multiplications and additions of the projection."""
        return 2 * self.rows * self.vocab_size * self.hidden_size

    @property
    def num_input_sets(self) -> int:
        """Sets to take in turn, so that none is found in a cache."""
        return max(2, -(-ROTATED_BYTES // self.weight_bytes))


def summarise(shape: HeadShape, ms: dict[str, float]) -> dict[str, float | bool]:
    """Rates and goals of one shape.

    Args:
        ms: median milliseconds of ``fused``, ``torch``, ``compiled`` (torch.compile of it),
            ``copy`` (a device copy that reads and writes half of `bytes_read` each, so that it
            moves as many bytes) and ``matmul`` (the projection alone).

    Returns:
        ``of_copy``: the fused kernel's share of the copy's bandwidth; ``of_matmul``: of the
        matmul's rate; ``times_compiled``: torch.compile's time over ours; and of the goals those
        that hold for this number of rows: ``reads_fast_enough``, ``not_slower_than_compiled``,
        ``multiplies_fast_enough``.
    """
    found: dict[str, float | bool] = {
        "gb_per_s": shape.bytes_read / ms["fused"] / 1e6,
        "tflop_per_s": shape.flops / ms["fused"] / 1e9,
        "of_copy": ms["copy"] / ms["fused"],
        "of_matmul": ms["matmul"] / ms["fused"],
        "times_torch": ms["torch"] / ms["fused"],
        "times_compiled": ms["compiled"] / ms["fused"],
    }
    if shape.rows <= FEW_ROWS:
        found["reads_fast_enough"] = found["of_copy"] >= COPY_GOAL
        found["not_slower_than_compiled"] = found["times_compiled"] >= 1.0
    if shape.rows >= MANY_ROWS:
        found["multiplies_fast_enough"] = found["of_matmul"] >= MATMUL_GOAL
    return found


def median_ms(calls: Sequence[Callable[[], object]]) -> float:
    """Median milliseconds of a call; the calls, on different inputs, take turns."""
    import triton.testing

    turns = cycle(calls)
    milliseconds: float = triton.testing.do_bench(lambda: next(turns)(), return_mode="median")
    return milliseconds


def make_weights(shape: HeadShape) -> list[Weights]:
    """Input sets of an LM head."""
    from vllm_adadecode.model.lm_head_rows import quantize_rows

    sets: list[Weights] = []
    for seed in range(shape.num_input_sets):
        generator = torch.Generator("cuda").manual_seed(seed)
        size = shape.vocab_size, shape.hidden_size
        weight = torch.randn(size, generator=generator, device="cuda", dtype=torch.bfloat16)
        weight *= shape.hidden_size**-0.5
        if WEIGHT_BYTES[shape.dtype] == 1:
            sets.append(quantize_rows(weight))
        else:
            sets.append((weight.to(getattr(torch, shape.dtype)), None))
    return sets


def make_rows(shape: HeadShape) -> torch.Tensor:
    """The head's input ``[rows, hidden_size]``."""
    dtype = torch.float16 if shape.dtype == "float16" else torch.bfloat16
    return torch.randn(shape.rows, shape.hidden_size, device="cuda", dtype=dtype)


def plain_head(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor | None) -> Any:
    """Matmul, softmax, max and threshold, as one writes them in torch."""
    p, token = torch.softmax(project(x, weight, scale).float(), dim=-1).max(dim=-1)
    return token, p, p > THRESHOLD


def project(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor | None) -> torch.Tensor:
    """The projection alone; int8 weights are widened, as torch has no such product."""
    if scale is None:
        return torch.nn.functional.linear(x, weight)
    return torch.nn.functional.linear(x, weight.to(x.dtype)) * scale


def fused_ms(shape: HeadShape, weights: Sequence[Weights], **options: Any) -> float:
    """Median milliseconds of the fused head."""
    from vllm_adadecode.kernels.confidence import HeadWeight, head_confidence

    x, heads = make_rows(shape), [HeadWeight(weight, scale) for weight, scale in weights]
    return median_ms([partial(head_confidence, x, head, THRESHOLD, **options) for head in heads])


def measure(shape: HeadShape, weights: Sequence[Weights]) -> dict[str, float]:
    """Median milliseconds by implementation, see `summarise`."""
    x = make_rows(shape)
    compiled = torch.compile(plain_head, dynamic=False)
    # A copy reads and writes: half the bytes move as many as a read of all.
    half = shape.bytes_read // 2
    source = [torch.empty(half, dtype=torch.uint8, device="cuda") for _ in weights]
    target = torch.empty(half, dtype=torch.uint8, device="cuda")
    return {
        "fused": fused_ms(shape, weights),
        "torch": median_ms([partial(plain_head, x, *pair) for pair in weights]),
        "compiled": median_ms([partial(compiled, x, *pair) for pair in weights]),
        "matmul": median_ms([partial(project, x, *pair) for pair in weights]),
        "copy": median_ms([partial(target.copy_, part) for part in source]),
    }


# --- block sizes ---------------------------------------------------------------------------------

TUNED_ROWS = (16, 32, 64, 128, 256)
# BLOCK_V, BLOCK_K, num_warps, tiles_per_split: these decide in which order a row's numbers are
# added, and are chosen once for all numbers of rows.
Shared = tuple[int, int, int, int]
# BLOCK_R, num_stages
Rows = tuple[int, int]
SHARED: tuple[Shared, ...] = tuple(
    (v, k, warps, tiles)
    for v, k, warps, tiles in product((64, 128, 256), (32, 64, 128, 256), (4, 8), (1, 2, 4))
    if v * k <= 128 * 256
)
# Milliseconds by number of rows, then by choice for the rows.
ByRows = dict[int, dict[Rows, float]]


def row_candidates(num_rows: int) -> list[Rows]:
    """Tile widths that hold the rows, or half of them or a quarter; each with its stages."""
    widths = {w for w in (num_rows, num_rows // 2, num_rows // 4) if 16 <= w <= 128}
    return [(width, stages) for width, stages in product(sorted(widths), (2, 3, 4, 5))]


def time_blocks(shape: HeadShape, weights: Sequence[Weights], shared: Shared) -> ByRows:
    """Median milliseconds; infinite where a choice does not fit the GPU."""
    from triton.runtime.errors import OutOfResources

    from vllm_adadecode.kernels.tuning import HeadBlocks

    def time(num_rows: int, rows: Rows) -> float:
        (block_v, block_k, num_warps, tiles), (block_r, stages) = shared, rows
        blocks = HeadBlocks(block_v, block_k, block_r, tiles, num_warps, stages)
        try:
            return fused_ms(replace(shape, rows=num_rows), weights, blocks=blocks)
        except OutOfResources:
            return float("inf")

    return {n: {rows: time(n, rows) for rows in row_candidates(n)} for n in TUNED_ROWS}


def choose(measured: dict[Shared, ByRows]) -> dict[str, Any]:
    """The config (kernels/tuning.py): the shared choice with the least sum of slow-downs against
    each number of rows' own best, and its best rows.

    Raises:
        ValueError: nothing works for all numbers of rows.
    """
    best = {
        shared: {rows: min(times, key=lambda c: times[c]) for rows, times in by_rows.items()}
        for shared, by_rows in measured.items()
    }

    def ms(shared: Shared, rows: int) -> float:
        return measured[shared][rows][best[shared][rows]]

    def cost(shared: Shared) -> float:
        return sum(ms(shared, rows) / min(ms(s, rows) for s in best) for rows in best[shared])

    # The first of equals, so that a search gives the same answer again.
    shared = min(best, key=cost)
    if not cost(shared) < float("inf"):
        raise ValueError("no block sizes work for all numbers of rows")
    names = ("BLOCK_V", "BLOCK_K", "num_warps", "tiles_per_split")
    by_rows = {
        str(rows): {"BLOCK_R": width, "num_stages": stages}
        for rows, (width, stages) in sorted(best[shared].items())
    }
    return dict(zip(names, shared, strict=True)) | {"rows": by_rows}
