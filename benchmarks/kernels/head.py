"""The fused head on a GPU, beside torch, torch.compile, a matmul and a copy of the same bytes.

Owns the shapes, what must be read there and what counts as fast enough.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import cycle
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


def measure(shape: HeadShape, weights: Sequence[Weights]) -> dict[str, float]:
    """Median milliseconds by implementation, see `summarise`."""
    from vllm_adadecode.kernels.confidence import HeadWeight, head_confidence

    x, heads = make_rows(shape), [HeadWeight(weight, scale) for weight, scale in weights]
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
