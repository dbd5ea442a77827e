"""What runs before the first request: every shape and kernel of a round, changing nothing.

Owns the draft model's part of vLLM's profiling run, which measures memory and has spans compiled,
the launches by which vLLM's warm-up has kernels compiled, and their entry in its registry.
"""

from collections.abc import Callable
from typing import Any

import torch
from vllm.model_executor.warmup.jit_warmup import VllmJitKernel
from vllm.triton_utils import HAS_TRITON
from vllm.v1.worker.gpu.input_batch import InputBuffers

from vllm_adadecode.draft.device_loop import DeviceLoop
from vllm_adadecode.draft.head_evaluation import Heads
from vllm_adadecode.engine.context import DraftContext
from vllm_adadecode.errors import first_line
from vllm_adadecode.kernels.tuning import ROW_BUCKETS
from vllm_adadecode.model.fused_head import FusedHeads
from vllm_adadecode.spans.ragged import run_span
from vllm_adadecode.verify.passes import VerificationPasses


def run_everything(
    context: DraftContext, buffers: InputBuffers, num_reqs: int, num_tokens: int
) -> None:
    """Every span on so many tokens, and every head on every request.

    vLLM compiles a span for all sizes, with the first that it sees, which must not be 1.
    """
    target, thresholds = context.target, context.ledger.thresholds
    used = thresholds.num_used_exits
    if used == 0:
        return
    heads = context.device_heads()
    tokens = buffers.input_ids[:num_tokens].zero_()
    positions = buffers.positions[:num_tokens].zero_()
    hidden, residual = target.embed(tokens), None
    for span in range(len(target.spans)):
        hidden, residual = run_span(context.vllm_config, target, span, positions, hidden, residual)
        if span < used:
            states = hidden[:num_reqs], residual[:num_reqs]
            _evaluate(context, heads, span, *states, thresholds.gate[span])
    assert residual is not None
    target.finish(hidden, residual)


@torch.inference_mode()
def launch_kernels(
    context: DraftContext,
    num_rows: int,
    loop: DeviceLoop | None,
    passes: VerificationPasses | None,
) -> None:
    """Every kernel of ours that a round with that many rows launches."""
    deferred, thresholds = context.deferred, context.ledger.thresholds
    zeros = deferred.hidden.new_zeros(num_rows, deferred.hidden.shape[2])
    heads = context.device_heads()
    if isinstance(heads, FusedHeads):
        for exit_index in range(thresholds.num_used_exits):
            _evaluate(context, heads, exit_index, zeros, zeros, thresholds.gate[exit_index])
    padding = torch.full((num_rows,), -1, dtype=torch.int64, device=zeros.device)
    deferred.store(padding, padding, zeros, zeros)
    deferred.gather(padding, padding)
    if loop is not None:
        loop.warm_up()
    if passes is not None:
        passes.warm_up()


def _evaluate(
    context: DraftContext,
    heads: Heads,
    exit_index: int,
    # [num_rows, hidden_size]
    hidden: torch.Tensor,
    # [num_rows, hidden_size]
    residual: torch.Tensor,
    gate_threshold: float | None,
) -> None:
    """Gate and head for rows that belong to no request; no logits are cached.

    Fused kernels that do not compile for this device, or do not run, are given up.
    """
    padding = torch.full((len(hidden),), -1, dtype=torch.int64, device=hidden.device)
    try:
        heads.check(
            exit_index,
            hidden,
            residual,
            slots=padding,
            positions=torch.zeros_like(padding),
            draft=0,
            gate_threshold=gate_threshold,
        )
    except Exception as error:
        projection = context.target.projection
        if not projection.use_kernels:
            raise
        projection.use_kernels = False
        context.fall_back(f"heads run in torch, for the fused kernels failed: {first_line(error)}")


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
