"""What runs before the first request: every shape and kernel of a round, changing nothing.

Owns the draft model's part of vLLM's profiling run, which measures memory and has spans compiled,
the launches by which vLLM's warm-up has kernels compiled, and their entry in its registry.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from vllm.model_executor.warmup.jit_warmup import VllmJitKernel
from vllm.triton_utils import HAS_TRITON

from vllm_adadecode.kernels.confidence import top1_confidence
from vllm_adadecode.kernels.tuning import ROW_BUCKETS
from vllm_adadecode.spans.ragged import run_span

if TYPE_CHECKING:
    from vllm_adadecode.engine.speculator import AdaDecodeSpeculator


def run_everything(
    speculator: "AdaDecodeSpeculator", num_reqs: int, is_profile: bool = False
) -> None:
    """Every span on every window, and every head on every request.

    Args:
        is_profile: memory is measured, but on a CPU: spans run on as many tokens as they may ever,
            prompts beside windows.
    """
    model, used = speculator.model, speculator.thresholds.num_used_exits
    if used == 0:
        return
    # vLLM compiles a span for all sizes, with the first that it sees, which must not be 1.
    num_tokens = speculator.max_num_tokens
    if not is_profile or speculator.device.type == "cpu":
        num_tokens = min(num_tokens, num_reqs * (1 + speculator.num_speculative_steps))
    tokens = speculator.input_buffers.input_ids[:num_tokens].zero_()
    positions = speculator.input_buffers.positions[:num_tokens].zero_()
    hidden, residual = model.embed(tokens), None
    for span in range(len(model.spans)):
        hidden, residual = run_span(
            speculator.vllm_config, model, span, positions, hidden, residual
        )
        if span < used:
            _check_head(speculator, span, hidden[:num_reqs], residual[:num_reqs])
    assert residual is not None
    model.finish(hidden, residual)


def _check_head(
    speculator: "AdaDecodeSpeculator",
    exit_index: int,
    # [num_reqs, hidden_size]
    hidden: torch.Tensor,
    # [num_reqs, hidden_size]
    residual: torch.Tensor,
) -> None:
    model, gate_threshold = speculator.model, speculator.thresholds.gate[exit_index]
    sampler, fused = speculator.heads(speculator.temperature, speculator.seeds)
    if fused is not None:
        fused.warm_up(exit_index, hidden, residual, gate_threshold)
        return
    if gate_threshold is not None:
        model.gate_probability(exit_index, hidden, residual)
    if sampler is None:
        model.head_top1(exit_index, hidden, residual)
    else:
        logits, other = model.head_logits(exit_index, hidden, residual)
        top1_confidence(logits, other)
        model.projection.over_all_tokens(logits)


@torch.inference_mode()
def launch_kernels(speculator: "AdaDecodeSpeculator", num_rows: int) -> None:
    """Every kernel of ours that a round with that many rows launches."""
    shape = (num_rows, speculator.hidden_size)
    zeros = torch.zeros(shape, dtype=speculator.dtype, device=speculator.device)
    _, fused = speculator.heads(speculator.temperature, speculator.seeds)
    if fused is not None:
        for exit_index in range(speculator.thresholds.num_used_exits):
            fused.warm_up(exit_index, zeros, zeros, speculator.thresholds.gate[exit_index])
    padding = torch.full((num_rows,), -1, dtype=torch.int64, device=speculator.device)
    speculator.deferred.store(padding, padding, zeros, zeros)
    speculator.deferred.gather(padding, padding)
    if speculator.device_rounds is not None:
        speculator.device_rounds.loop.rehearse()
    if speculator.verification_passes is not None:
        speculator.verification_passes.rehearse()


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
