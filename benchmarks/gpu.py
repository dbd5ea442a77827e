"""What the GPU benchmarks share: whether there is one, and the median time of a function on it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from itertools import cycle

import torch

from benchmarks.kernel_shapes import HeadShape


def require_gpu(command: str) -> None:
    """End the process in one line, with status 1, where no CUDA device answers."""
    if not torch.cuda.is_available():
        sys.exit(f"{command} measures on a GPU, and no CUDA device answers here")


def median_ms(calls: Sequence[Callable[[], object]]) -> float:
    """Median milliseconds of a call; the calls, on different inputs, take turns."""
    import triton.testing

    turns = cycle(calls)
    milliseconds: float = triton.testing.do_bench(lambda: next(turns)(), return_mode="median")
    return milliseconds


def make_weights(shape: HeadShape) -> list[tuple[torch.Tensor, torch.Tensor | None]]:
    """Input sets of an LM head: weights, and row scales beside int8 ones."""
    from vllm_adadecode.model.lm_head_rows import quantize_rows

    sets: list[tuple[torch.Tensor, torch.Tensor | None]] = []
    for seed in range(shape.num_input_sets):
        generator = torch.Generator("cuda").manual_seed(seed)
        size = shape.vocab_size, shape.hidden_size
        weight = torch.randn(size, generator=generator, device="cuda", dtype=torch.bfloat16)
        weight *= shape.hidden_size**-0.5
        if shape.dtype == "int8":
            sets.append(quantize_rows(weight))
        else:
            sets.append((weight.to(getattr(torch, shape.dtype)), None))
    return sets


def make_rows(shape: HeadShape) -> torch.Tensor:
    """The head's input ``[rows, hidden_size]``."""
    dtype = torch.float16 if shape.dtype == "float16" else torch.bfloat16
    return torch.randn(shape.rows, shape.hidden_size, device="cuda", dtype=dtype)
