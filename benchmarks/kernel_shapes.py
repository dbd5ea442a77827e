"""Which shapes the kernels are measured at, what they must read, and what counts as fast enough.

Owns arithmetic alone, so that it is tested without a GPU; `kernels.py` and `tune_kernels.py`
measure.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

from vllm_adadecode.cli.arguments import positive

HIDDEN_SIZES = (2048, 4096, 8192)
VOCAB_SIZES = (32000, 128256, 151936)
ROWS = (1, 2, 4, 8, 16, 64, 256)

# Bytes of a weight, and of a row scale.
WEIGHT_BYTES = {"bfloat16": 2, "float16": 2, "int8": 1}
SCALE_BYTES = 4

# Rotating input sets together are larger than any GPU's cache by far.
ROTATED_BYTES = 1 << 30
# Up to here the head is bound by reading the weights; from the last on by multiplying.
FEW_ROWS, MANY_ROWS = 16, 256
COPY_GOAL, MATMUL_GOAL = 0.85, 0.80


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


def head_shapes(
    rows: tuple[int, ...] = ROWS,
    vocab_sizes: tuple[int, ...] = VOCAB_SIZES,
    hidden_sizes: tuple[int, ...] = HIDDEN_SIZES,
    dtypes: tuple[str, ...] = ("bfloat16",),
) -> Iterator[HeadShape]:
    """All combinations; those that share an LM head follow each other."""
    for dtype, hidden_size, vocab_size, num_rows in product(
        dtypes, hidden_sizes, vocab_sizes, rows
    ):
        yield HeadShape(num_rows, vocab_size, hidden_size, dtype)


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


def add_shape_options(parser: argparse.ArgumentParser) -> None:
    """Which LM heads to measure: `--vocab`, `--hidden` and `--dtype`."""
    add = parser.add_argument
    add("--vocab", type=positive, nargs="+", default=list(VOCAB_SIZES), help="rows of an LM head")
    add("--hidden", type=positive, nargs="+", default=list(HIDDEN_SIZES), help="its columns")
    add(
        "--dtype",
        nargs="+",
        default=["bfloat16"],
        choices=list(WEIGHT_BYTES),
        metavar="DTYPE",
        help=f"of its weights, of {', '.join(WEIGHT_BYTES)}",
    )
