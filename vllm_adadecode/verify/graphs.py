"""Verification from a depth as captured CUDA graphs, one for each span and number of tokens.

Owns the capture and the replay of the passes of passes.py. vLLM's manager captures them: in its
pool, counted by its memory profiling, before the first request.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from vllm.config import VllmConfig
from vllm.config.compilation import CUDAGraphMode
from vllm.v1.worker.gpu.cudagraph_utils import BatchExecutionDescriptor, CudaGraphManager

from vllm_adadecode.verify.passes import VerificationPasses
from vllm_adadecode.verify.plan import VerificationPlan

# From one number of tokens that has a graph to the next, at least.
STEP = 1.25


@dataclass(frozen=True)
class PassDescriptor(BatchExecutionDescriptor):
    """A pass of ``span`` over ``num_tokens`` tokens of at most ``num_reqs`` requests."""

    span: int = 0


def graph_sizes(capture_sizes: Sequence[int], most_tokens: int) -> list[int]:
    """Numbers of tokens that get a graph: of vLLM's, those that are well apart, and the largest."""
    fitting = sorted({size for size in capture_sizes if size <= most_tokens})
    found: list[int] = []
    for size in fitting:
        if not found or size >= STEP * found[-1] or size == fitting[-1]:
            found.append(size)
    return found


class VerificationGraphs(CudaGraphManager):
    """Captured ``passes`` of verification steps."""

    def __init__(
        self, vllm_config: VllmConfig, device: torch.device, passes: VerificationPasses
    ) -> None:
        self.passes = passes
        captured = vllm_config.compilation_config.cudagraph_capture_sizes or ()
        sizes = graph_sizes(captured, passes.most_tokens)
        self.sizes = np.array(sizes, dtype=np.int64)
        self.output = passes.new_output(max(sizes, default=0))
        super().__init__(
            vllm_config, device, CUDAGraphMode.FULL_DECODE_ONLY, decode_query_len=passes.window
        )

    def _init_candidates(self) -> None:
        descs: list[BatchExecutionDescriptor] = [
            self._pass(span, size)
            for size in reversed(self.sizes.tolist())
            for span in range(self.passes.num_spans)
        ]
        if descs:
            self._capture_descs[CUDAGraphMode.FULL] = descs

    def _pass(self, span: int, num_tokens: int) -> PassDescriptor:
        num_reqs = min(num_tokens, self.max_num_reqs)
        return PassDescriptor(CUDAGraphMode.FULL, num_tokens, num_reqs, span=span)

    def capture_all(self) -> None:
        """Capture all of them; between rounds only."""

        def create_forward(
            desc: BatchExecutionDescriptor, warmup: bool
        ) -> Callable[[CUDAGraphMode], None]:
            assert isinstance(desc, PassDescriptor)
            assert desc.num_reqs is not None
            shape = desc.num_tokens, desc.num_reqs
            return lambda _: self.passes.run_span(desc.span, *shape, self.output)

        # No token runs.
        self.passes.plans.clear()
        self.capture(create_forward, "Capturing verification")

    def size(self, num_tokens: int, num_reqs: int) -> int | None:
        """Tokens of the smallest captured pass for so many; None if there is none."""
        index = np.searchsorted(self.sizes, max(num_tokens, num_reqs))
        if not self._graphs_captured or index == len(self.sizes):
            return None
        return int(self.sizes[index])

    def descriptors(self, plan: VerificationPlan) -> list[PassDescriptor] | None:
        """The passes of a verification, shallow ones first; None if not all are captured."""
        if plan.is_mixed:
            return None
        # Tokens that have not been through each span; every row of the batch has a place.
        spans = np.arange(self.passes.num_spans)
        counts = np.searchsorted(np.sort(plan.depths), spans, side="right")
        found = []
        for span in np.flatnonzero(counts).tolist():
            size = self.size(int(counts[span]), len(plan.slots))
            if size is None:
                return None
            found.append(self._pass(span, size))
        return found

    def replay_plan(self, plan: VerificationPlan, passes: Sequence[PassDescriptor]) -> torch.Tensor:
        """Final hidden states, ``[num_tokens, hidden_size]``; see `VerificationForward.forward`.

        Args:
            passes: from `descriptors`.
        """
        self.passes.load(plan, [desc.span for desc in passes])
        for desc in passes:
            self.run_fullgraph(desc)
        return self.output[: len(plan.depths)]

    def replay(self, span: int, size: int) -> None:
        """One pass, as planned before.

        Args:
            size: from `size`.
        """
        self.run_fullgraph(self._pass(span, size))
