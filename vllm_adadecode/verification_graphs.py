"""Verification from a depth as captured CUDA graphs, one for each span and number of tokens.

Owns the passes of a planned verification as graphs: how a plan is laid out for them, in one copy to
the device, and their replay in place of the scorer's own passes. vLLM's manager captures them: in
its pool, counted by its memory profiling, before the first request.

A pass reads the batch where vLLM's runner has prepared it (ids, positions, lengths, KV slots, block
tables), all at addresses that stay, and the states of pending tokens where the draft loop left
them; the plan says which tokens run. States of tokens on their way through the spans are kept there
as well, so that nothing else goes from one graph to the next.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from vllm.config import VllmConfig
from vllm.config.compilation import CUDAGraphMode
from vllm.utils.torch_utils import async_tensor_h2d
from vllm.v1.worker.gpu.block_table import BlockTables
from vllm.v1.worker.gpu.cudagraph_utils import BatchExecutionDescriptor, CudaGraphManager
from vllm.v1.worker.gpu.input_batch import InputBuffers

from vllm_adadecode.kernels.deferred import DeferredStates
from vllm_adadecode.scorer import VerificationPlan
from vllm_adadecode.staged import StagedTarget
from vllm_adadecode.static_spans import StaticSpans

# From one number of tokens that has a graph to the next, at least.
STEP = 1.25


@dataclass(frozen=True)
class PassDescriptor(BatchExecutionDescriptor):
    """A pass of ``span`` over ``num_tokens`` tokens of at most ``num_reqs`` requests."""

    span: int = 0


@dataclass(frozen=True)
class _Layout:
    """Where a span's pass is in the row of the plan that is its own.

    Attributes:
        tokens: ``[num_tokens]`` place in the batch; -1: padding.
        slots: ``[num_tokens]`` request slot; -1: padding.
        offsets: ``[num_tokens]`` window offset.
        starts: ``[num_rows + 1]`` first token of each row of the batch, then the total.
    """

    tokens: slice
    slots: slice
    offsets: slice
    starts: slice

    @staticmethod
    def of(most_tokens: int, most_rows: int) -> _Layout:
        ends = np.cumsum([0, most_tokens, most_tokens, most_tokens, most_rows + 1]).tolist()
        return _Layout(*(slice(a, b) for a, b in pairwise(ends)))


def graph_sizes(capture_sizes: Sequence[int], most_tokens: int) -> list[int]:
    """Numbers of tokens that get a graph: of vLLM's, those that are well apart, and the largest."""
    fitting = sorted({size for size in capture_sizes if size <= most_tokens})
    found: list[int] = []
    for size in fitting:
        if not found or size >= STEP * found[-1] or size == fitting[-1]:
            found.append(size)
    return found


class VerificationGraphs(CudaGraphManager):
    """Captured passes of the scorer.

    Args:
        staged: the target.
        static: runs a span on a padded batch.
        deferred: states of pending tokens.
        buffers, block_tables: vLLM's, of the verification batch.
        window: most tokens of a request, 1 + K.
    """

    def __init__(
        self,
        vllm_config: VllmConfig,
        device: torch.device,
        staged: StagedTarget,
        static: StaticSpans,
        deferred: DeferredStates,
        buffers: InputBuffers,
        block_tables: BlockTables,
        window: int,
    ) -> None:
        self.staged, self.static, self.deferred = staged, static, deferred
        self.buffers, self.block_tables, self.window = buffers, block_tables, window
        scheduler = vllm_config.scheduler_config
        most = min(scheduler.max_num_seqs * window, scheduler.max_num_batched_tokens)
        sizes = graph_sizes(vllm_config.compilation_config.cudagraph_capture_sizes or (), most)
        self.sizes = np.array(sizes, dtype=np.int64)
        most_tokens, most_rows = max(sizes, default=0), scheduler.max_num_seqs
        self.layout = _Layout.of(most_tokens, most_rows)
        # [spans, ...] int64; see `_Layout`.
        self.plan = torch.from_numpy(self._empty_plan(len(staged.spans))).to(device)
        self.output = deferred.hidden.new_zeros(most_tokens, deferred.hidden.shape[2])
        super().__init__(
            vllm_config, device, CUDAGraphMode.FULL_DECODE_ONLY, decode_query_len=window
        )

    def _init_candidates(self) -> None:
        descs: list[BatchExecutionDescriptor] = [
            self._descriptor(span, int(size))
            for size in reversed(self.sizes)
            for span in range(len(self.staged.spans))
        ]
        if descs:
            self._capture_descs[CUDAGraphMode.FULL] = descs

    def _descriptor(self, span: int, num_tokens: int) -> PassDescriptor:
        num_reqs = min(num_tokens, self.max_num_reqs)
        return PassDescriptor(CUDAGraphMode.FULL, num_tokens, num_reqs, span=span)

    def capture_passes(self) -> None:
        """Capture all of them; between rounds only."""

        def create_forward(
            desc: BatchExecutionDescriptor, warmup: bool
        ) -> Callable[[CUDAGraphMode], None]:
            assert isinstance(desc, PassDescriptor)
            return lambda _: self._pass(desc)

        # No token runs.
        self.plan.copy_(torch.from_numpy(self._empty_plan(len(self.plan))))
        self.capture(create_forward, "Capturing verification")

    def descriptors(self, plan: VerificationPlan) -> list[PassDescriptor] | None:
        """The passes of a verification, shallow ones first; None if not all are captured."""
        if not self._graphs_captured or plan.is_mixed:
            return None
        num_spans = len(self.staged.spans)
        # Tokens that have not been through each span; every row of the batch has a place.
        counts = np.searchsorted(np.sort(plan.depths), np.arange(num_spans), side="right")
        found = []
        for span in np.flatnonzero(counts):
            size = np.searchsorted(self.sizes, max(counts[span], len(plan.slots)))
            if size == len(self.sizes):
                return None
            found.append(self._descriptor(int(span), int(self.sizes[size])))
        return found

    def run(self, plan: VerificationPlan, passes: Sequence[PassDescriptor]) -> torch.Tensor:
        """Final hidden states of all tokens, ``[num_tokens, hidden_size]``; see `Scorer.forward`.

        Args:
            passes: from `descriptors`.
        """
        rows = self._lay_out(plan, passes)
        self.plan.copy_(async_tensor_h2d(rows, device=self.plan.device))
        for desc in passes:
            self.run_fullgraph(desc)
        return self.output[: len(plan.depths)]

    def _empty_plan(self, num_spans: int) -> np.ndarray:
        """Passes without tokens."""
        rows = np.zeros((num_spans, self.layout.starts.stop), dtype=np.int64)
        rows[:, : self.layout.slots.stop] = -1
        return rows

    def _lay_out(self, plan: VerificationPlan, passes: Sequence[PassDescriptor]) -> np.ndarray:
        layout = self.layout
        rows = self._empty_plan(len(self.plan))
        slots = plan.slots[plan.rows]
        for desc in passes:
            row = rows[desc.span]
            tokens = np.flatnonzero(plan.depths <= desc.span)
            row[layout.tokens][: len(tokens)] = tokens
            row[layout.slots][: len(tokens)] = slots[tokens]
            row[layout.offsets][: len(tokens)] = plan.offsets[tokens]
            counts = np.bincount(plan.rows[tokens], minlength=len(plan.slots))
            starts = row[layout.starts]
            starts[1:] = len(tokens)
            np.cumsum(counts, out=starts[1 : 1 + len(counts)])
        return rows

    def _pass(self, desc: PassDescriptor) -> None:
        """What is captured: a span for the tokens that the plan names."""
        assert desc.num_reqs is not None
        layout, plan, n = self.layout, self.plan[desc.span], desc.num_tokens
        tokens, slots, offsets = (
            plan[part][:n] for part in (layout.tokens, layout.slots, layout.offsets)
        )
        starts = plan[layout.starts][: desc.num_reqs + 1].to(torch.int32)
        there = tokens >= 0
        places = tokens.clamp(min=0)
        if desc.span == 0:
            hidden = self.staged.embed(self.buffers.input_ids[places])
            residual = None
        else:
            # Of padding, zeros: a scale that is taken over all rows must not see anything else.
            shape = n, self.deferred.hidden.shape[2]
            states = self.deferred.hidden.new_zeros(shape), self.deferred.residual.new_zeros(shape)
            hidden, residual = self.deferred.gather(slots, offsets, out=states)
        lengths = self.buffers.seq_lens[: desc.num_reqs]
        hidden, residual = self.static.run_rows(
            desc.span,
            positions=self.buffers.positions[places],
            slot_mappings=torch.where(there, self.block_tables.slot_mappings[:, places], -1),
            query_start_loc=starts,
            seq_lens=torch.where(starts[1:] > starts[:-1], lengths, 0),
            block_tables=[t[: desc.num_reqs] for t in self.block_tables.input_block_tables],
            row_tokens=min(self.window, n),
            is_padding=~there,
            hidden=hidden,
            residual=residual,
        )
        if desc.span + 1 < len(self.staged.spans):
            self.deferred.store(slots, offsets, hidden, residual)
        else:
            self.output[:n] = self.staged.finish(hidden, residual)
