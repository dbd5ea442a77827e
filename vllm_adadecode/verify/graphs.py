"""Verification from a depth as captured CUDA graphs, one for each span and number of tokens.

Owns the capture and the replay of the passes of verification_passes.py. vLLM's manager captures
them: in its pool, counted by its memory profiling, before the first request. Where drafting is
captured whole, so is the verification of a round that nobody has asked about: all spans in one
graph, in which the device skips those that it does not need.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from vllm.config import VllmConfig
from vllm.config.compilation import CUDAGraphMode
from vllm.v1.worker.gpu.cudagraph_utils import BatchExecutionDescriptor, CudaGraphManager

from vllm_adadecode.draft.conditional_graph import IfNode
from vllm_adadecode.draft.step_guard import RunAlways, StepGuard
from vllm_adadecode.kernels.draft_state import RoundStatus
from vllm_adadecode.verify.forward import VerificationPlan
from vllm_adadecode.verify.passes import VerificationPasses

# From one number of tokens that has a graph to the next, at least.
STEP = 1.25


@dataclass(frozen=True)
class PassDescriptor(BatchExecutionDescriptor):
    """A pass of ``span`` over ``num_tokens`` tokens of at most ``num_reqs`` requests."""

    span: int = 0


@dataclass(frozen=True)
class AllPassesDescriptor(BatchExecutionDescriptor):
    """The passes of all spans over ``num_tokens`` tokens of at most ``num_reqs`` requests."""


def graph_sizes(capture_sizes: Sequence[int], most_tokens: int) -> list[int]:
    """Numbers of tokens that get a graph: of vLLM's, those that are well apart, and the largest."""
    fitting = sorted({size for size in capture_sizes if size <= most_tokens})
    found: list[int] = []
    for size in fitting:
        if not found or size >= STEP * found[-1] or size == fitting[-1]:
            found.append(size)
    return found


def whole_sizes(sizes: Sequence[int], most_tokens: int) -> list[int]:
    """Of increasing sizes, those that batches of up to ``most_tokens`` are padded to."""
    return list(sizes[: 1 + bisect_left(sizes, most_tokens)])


class VerificationGraphs(CudaGraphManager):
    """Captured passes of the scorer.

    Args:
        passes: what is captured.
        status: of the rounds that are verified; None: no verification is captured whole.
        most_whole: most tokens of one that is.
    """

    def __init__(
        self,
        vllm_config: VllmConfig,
        device: torch.device,
        passes: VerificationPasses,
        status: RoundStatus | None = None,
        most_whole: int = 0,
    ) -> None:
        self.passes, self.status, self.most_whole = passes, status, most_whole
        captured = vllm_config.compilation_config.cudagraph_capture_sizes or ()
        sizes = graph_sizes(captured, passes.most_tokens)
        self.sizes = np.array(sizes, dtype=np.int64)
        self.output = passes.new_output(max(sizes, default=0))
        super().__init__(
            vllm_config, device, CUDAGraphMode.FULL_DECODE_ONLY, decode_query_len=passes.window
        )

    def _init_candidates(self) -> None:
        descs: list[BatchExecutionDescriptor] = []
        sizes = self.sizes.tolist()
        whole = whole_sizes(sizes, self.most_whole) if self.status is not None else []
        for size in reversed(sizes):
            if size in whole:
                descs.append(self._all_passes(size))
            descs += [self._pass(span, size) for span in range(self.passes.num_spans)]
        if descs:
            self._capture_descs[CUDAGraphMode.FULL] = descs

    def _rows(self, num_tokens: int) -> int:
        return min(num_tokens, self.max_num_reqs)

    def _pass(self, span: int, num_tokens: int) -> PassDescriptor:
        return PassDescriptor(CUDAGraphMode.FULL, num_tokens, self._rows(num_tokens), span=span)

    def _all_passes(self, num_tokens: int) -> AllPassesDescriptor:
        return AllPassesDescriptor(CUDAGraphMode.FULL, num_tokens, self._rows(num_tokens))

    def capture_passes(self) -> None:
        """Capture all of them; between rounds only."""

        def create_forward(
            desc: BatchExecutionDescriptor, warmup: bool
        ) -> Callable[[CUDAGraphMode], None]:
            assert desc.num_reqs is not None
            shape = desc.num_tokens, desc.num_reqs
            if isinstance(desc, AllPassesDescriptor):
                guard: StepGuard = RunAlways() if warmup else IfNode()
                return lambda _: self._run_all(guard, *shape)
            assert isinstance(desc, PassDescriptor)
            return lambda _: self.passes.run(desc.span, *shape, self.output)

        # No token runs.
        self.passes.plans.clear()
        self.capture(create_forward, "Capturing verification")

    def _run_all(self, guard: StepGuard, num_tokens: int, num_reqs: int) -> None:
        """What is captured whole: each early span if some token needs it, then the last one."""
        assert self.status is not None
        last = self.passes.num_spans - 1
        for span in range(last):
            step = partial(self.passes.run, span, num_tokens, num_reqs)
            guard.when(self.status.missing[span], step)
        self.passes.run(last, num_tokens, num_reqs, self.output)

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

    def run(self, plan: VerificationPlan, passes: Sequence[PassDescriptor]) -> torch.Tensor:
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

    def replay_all(self, size: int) -> bool:
        """All passes that the device finds some token for; False if that is not captured.

        Args:
            size: from `size`.
        """
        desc = self._all_passes(size)
        if desc not in self.graphs:
            return False
        self.run_fullgraph(desc)
        return True
