"""Compiling kernels before the first request, through vLLM's warm-up registry.

Owns the meeting with that registry. What is run is the caller's: a function that launches, for a
number of rows, every kernel that a round with so many rows would launch.
"""

from collections.abc import Callable
from typing import Any

from vllm.model_executor.warmup.jit_warmup import VllmJitKernel
from vllm.triton_utils import HAS_TRITON

from vllm_adadecode.kernels.tuning import ROW_BUCKETS


class KernelWarmup(VllmJitKernel[int]):
    """Kernels of the draft loop, as one entry of vLLM's registry.

    A key is a number of rows: compiled in are the width of the head's row tile and the number of
    rows to order behind a gate, a power of two; nothing else depends on the batch.

    Args:
        run: launches all kernels on that many rows, with the real weights and no lasting effect.
    """

    CompileKey = int

    def __init__(self, run: Callable[[int], Any]) -> None:
        super().__init__()
        self.run = run

    def get_warmup_keys(self, *, max_num_rows: int) -> list[int]:
        """A number of rows for each kernel that up to ``max_num_rows`` rows need."""
        powers = [2**i for i in range(ROW_BUCKETS[0].bit_length() - 1, max_num_rows.bit_length())]
        return sorted({min(rows, max_num_rows) for rows in (*ROW_BUCKETS, *powers, max_num_rows)})

    def compile(self, compile_key: int) -> None:
        self.run(compile_key)


def register_warmup(run: Callable[[int], Any], max_num_rows: int) -> None:
    """Have ``run`` called at start, inside an active `JitWarmupRegistry`.

    Without Triton there is nothing to compile.
    """
    if HAS_TRITON:
        KernelWarmup(run).register_warmup(max_num_rows=max_num_rows)
