"""The scorer: verification that starts each pending token at its depth (DESIGN, step 3).

Owns the forward pass of a batch that has deferred states: the spans a token has been through are
not run again, the last span runs on all tokens at once, and vLLM's rejection sampler does the rest.
Batches with prefill, and batches without any deferred state, run all spans on all tokens, which
rewrites the same KV.
"""

from dataclasses import dataclass

import numpy as np
import torch
from vllm.v1.utils import record_function_or_nullcontext
from vllm.v1.worker.gpu.input_batch import InputBatch

from vllm_adadecode.counters import Counters
from vllm_adadecode.kernels.deferred import DeferredStates
from vllm_adadecode.span_runner import SpanRunner, find_moe_layers_by_name
from vllm_adadecode.staged import StagedTarget
from vllm_adadecode.windows import PendingWindow


@dataclass
class VerificationPlan:
    """Where each token of a decode batch stands.

    Attributes:
        slots: ``[num_reqs]`` request slots.
        rows: ``[num_tokens]`` batch row of each token.
        offsets: ``[num_tokens]`` window offset of each token.
        depths: ``[num_tokens]`` spans each token has been through.
        seq_lens_upper: ``[num_reqs]`` upper bound of the lengths.
    """

    slots: np.ndarray
    rows: np.ndarray
    offsets: np.ndarray
    depths: np.ndarray
    seq_lens_upper: np.ndarray


def make_plan(
    input_batch: InputBatch, windows: dict[str, PendingWindow]
) -> VerificationPlan | None:
    """Plan a verification, or None where all spans must or may as well run on all tokens."""
    if input_batch.has_prefill or not windows:
        return None
    counts = input_batch.num_scheduled_tokens
    rows = np.repeat(np.arange(input_batch.num_reqs), counts)
    offsets = np.arange(input_batch.num_tokens) - input_batch.query_start_loc_np[rows]
    depths = np.zeros(input_batch.num_tokens, dtype=np.int64)
    for row, req_id in enumerate(input_batch.req_ids):
        window = windows.get(req_id)
        # The scheduler may verify fewer tokens than are pending, never more. A request without a
        # window starts at depth 0.
        if window is not None and counts[row] <= len(window.depths):
            start = input_batch.query_start_loc_np[row]
            depths[start : start + counts[row]] = window.depths[: counts[row]]
    if not depths.any():
        return None
    return VerificationPlan(
        slots=input_batch.idx_mapping_np,
        rows=rows,
        offsets=offsets,
        depths=depths,
        seq_lens_upper=input_batch.seq_lens_cpu_upper_bound.numpy()[: input_batch.num_reqs],
    )


class Scorer:
    """Runs planned verifications in place of the target's forward pass."""

    def __init__(
        self,
        staged: StagedTarget,
        spans: SpanRunner,
        deferred: DeferredStates,
        counters: Counters,
    ) -> None:
        self.staged = staged
        self.spans = spans
        self.deferred = deferred
        self.counters = counters

    def forward(
        self,
        plan: VerificationPlan,
        # [num_tokens] int32
        input_ids: torch.Tensor,
        # [num_tokens] int64
        positions: torch.Tensor,
    ) -> torch.Tensor:
        """Final hidden states of all tokens, ``[num_tokens, hidden_size]``, as the target's own.

        Called inside the forward context of the whole batch, which is the last span's.
        """
        device = positions.device
        slots = torch.from_numpy(plan.slots[plan.rows].astype(np.int64)).to(device)
        offsets = torch.from_numpy(plan.offsets).to(device)
        for span in range(self.staged.num_exits):
            # Depths never increase along a window: these are the ends of the windows.
            tokens = np.flatnonzero(plan.depths <= span)
            if tokens.size == 0:
                continue
            self._run_early(plan, span, tokens, input_ids, positions, slots, offsets)
        hidden, residual = self.deferred.gather(slots, offsets)
        find_moe_layers_by_name()
        self._count(self.staged.num_exits, len(plan.rows))
        with record_function_or_nullcontext(f"adadecode: span {self.staged.num_exits}"):
            hidden, residual = self.staged.run_span(
                self.staged.num_exits, positions, hidden, residual
            )
        return self.staged.finish(hidden, residual)

    def _run_early(
        self,
        plan: VerificationPlan,
        span: int,
        tokens: np.ndarray,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        slots: torch.Tensor,
        offsets: torch.Tensor,
    ) -> None:
        """Run a span below the last on the tokens that have not been through it."""
        index = torch.from_numpy(tokens).to(positions.device)
        hidden: torch.Tensor
        residual: torch.Tensor | None
        if span == 0:
            hidden, residual = self.staged.embed(input_ids[index]), None
        else:
            hidden, residual = self.deferred.gather(slots[index], offsets[index])
        rows, counts = np.unique(plan.rows[tokens], return_counts=True)
        hidden, residual = self.spans.run(
            span,
            slots=plan.slots[rows],
            num_tokens=counts,
            seq_lens_upper=plan.seq_lens_upper[rows],
            positions=positions[index],
            hidden=hidden,
            residual=residual,
        )
        self.deferred.store(slots[index], offsets[index], hidden, residual)
        self._count(span, len(tokens))

    def _count(self, span: int, num_tokens: int) -> None:
        start, stop = self.staged.spans[span]
        self.counters.verify_layer_passes += stop - start
        self.counters.verify_token_layers += (stop - start) * num_tokens
