"""The passes of a verification with fixed shapes: what each runs is in a plan on the device.

Owns the plan's buffers, how a plan of the host's gets there, and one pass: a span over the tokens
that the plan names. A pass reads the batch where vLLM's runner has prepared it (ids, positions,
lengths, KV slots, block tables), all at addresses that stay, and the states of pending tokens where
the draft loop left them. States of tokens on their way through the spans are kept there as well, so
that nothing else goes from one pass to the next, and each may be a captured graph
(graphs.py). What is prefilled beside an overlapped round is in the host's hands, in passes
that are never captured.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from vllm.config import VllmConfig
from vllm.utils.torch_utils import async_tensor_h2d
from vllm.v1.worker.gpu.block_table import BlockTables
from vllm.v1.worker.gpu.input_batch import InputBuffers

from vllm_adadecode.kernels.deferred import DeferredStates
from vllm_adadecode.kernels.draft_state import DraftRows
from vllm_adadecode.kernels.verification_plan import PassPlans, plan_verification
from vllm_adadecode.model.target import StagedTarget
from vllm_adadecode.spans.padded import PaddedSpans
from vllm_adadecode.spans.shapes import PrefillPart
from vllm_adadecode.verify.overlapped_plan import MOST_TOKEN_SLOTS, OverlappedPlan
from vllm_adadecode.verify.plan import VerificationPlan


class VerificationPasses:
    """Runs spans of verifications on padded batches.

    Args:
        staged: the target.
        padded: runs a span on a padded batch.
        deferred: states of pending tokens.
        buffers, block_tables: vLLM's, of the verification batch.
        window: most tokens of a request, 1 + K.

    Attributes:
        most_tokens, most_rows: of a pass, without what is prefilled.
        is_padding: bool ``[max_num_batched_tokens]``, token slots of the last overlapped batch that
            hold no token.
    """

    def __init__(
        self,
        vllm_config: VllmConfig,
        staged: StagedTarget,
        padded: PaddedSpans,
        deferred: DeferredStates,
        buffers: InputBuffers,
        block_tables: BlockTables,
        window: int,
    ) -> None:
        self.staged, self.padded, self.deferred = staged, padded, deferred
        self.buffers, self.block_tables, self.window = buffers, block_tables, window
        scheduler = vllm_config.scheduler_config
        self.most_rows = scheduler.max_num_seqs
        self.most_tokens = min(self.most_rows * window, scheduler.max_num_batched_tokens)
        if captured := vllm_config.compilation_config.cudagraph_capture_sizes:
            # No graph and no overlapped round has more, and a plan of the host's is copied whole.
            self.most_tokens = min(self.most_tokens, max(*captured, MOST_TOKEN_SLOTS))
        sizes = self.num_spans, self.most_tokens, self.most_rows
        self.plans = PassPlans.empty(*sizes, deferred.hidden.device)
        self._empty = PassPlans.empty(*sizes, torch.device("cpu"))
        self.is_padding = torch.zeros_like(buffers.input_ids, dtype=torch.bool)

    @property
    def num_spans(self) -> int:
        return len(self.staged.spans)

    def new_output(self, num_tokens: int) -> torch.Tensor:
        """For `run_span`, of a batch of so many tokens."""
        hidden = self.deferred.hidden
        return hidden.new_zeros(num_tokens + 1, hidden.shape[2])

    def load(self, plan: VerificationPlan, spans: Iterable[int]) -> None:
        """Plan these passes as the host says; the others have no tokens."""
        data = self._empty.data.numpy().copy()
        # The columns' places are the same in both.
        rows = PassPlans.of(torch.from_numpy(data), self.most_tokens)
        slots = plan.slots[plan.rows]
        for span in spans:
            tokens = np.flatnonzero(plan.depths <= span)
            rows.tokens.numpy()[span, : len(tokens)] = tokens
            rows.slots.numpy()[span, : len(tokens)] = slots[tokens]
            rows.offsets.numpy()[span, : len(tokens)] = plan.offsets[tokens]
            counts = np.bincount(plan.rows[tokens], minlength=len(plan.slots))
            starts = rows.starts.numpy()[span]
            starts[1:] = len(tokens)
            np.cumsum(counts, out=starts[1 : 1 + len(counts)])
        self.plans.data.copy_(async_tensor_h2d(data, device=self.plans.data.device))

    def load_overlapped(self, plan: OverlappedPlan, num_token_slots: int) -> None:
        """Plan all passes as the device knows, and put the batch right: draft tokens, lengths.

        Args:
            num_token_slots: tokens of the largest pass, padding among them.
        """
        if plan.prefill is not None:
            self.is_padding[: plan.num_tokens].zero_()
        plan_verification(
            self.plans,
            plan.run.buffers.rows,
            row_of=plan.row_of,
            query_start_loc=self.buffers.query_start_loc,
            input_ids=self.buffers.input_ids,
            seq_lens=self.buffers.seq_lens,
            is_padding=self.is_padding,
            num_token_slots=num_token_slots,
        )

    def warm_up(self) -> None:
        """Compile the planning kernel for every batch size; between rounds only."""
        starts = torch.zeros_like(self.buffers.query_start_loc)
        rows = DraftRows.empty(1, self.window - 1, self.num_spans - 1, starts.device)
        # One more than a power of two is planned as the next one is.
        sizes = {min(1 << n, self.most_rows) for n in range(self.most_rows.bit_length() + 1)}
        for num_reqs in sorted(sizes):
            # No token is scheduled, so that nothing is written but the plan.
            plan_verification(
                self.plans,
                rows,
                row_of=torch.zeros(num_reqs, dtype=torch.int32, device=starts.device),
                query_start_loc=starts,
                input_ids=self.buffers.input_ids,
                seq_lens=torch.zeros_like(self.buffers.seq_lens),
                is_padding=self.is_padding,
                num_token_slots=1,
            )

    def run_span(
        self,
        span: int,
        num_tokens: int,
        num_reqs: int,
        output: torch.Tensor | None = None,
        prefill: PrefillPart | None = None,
    ) -> None:
        """A span for the tokens that the plan names: what may be captured.

        Args:
            num_tokens: of the pass, padding among them.
            num_reqs: rows of the batch at least; each may have up to a window of tokens.
            output: for the last span, ``[> tokens of the batch, hidden_size]``: final hidden states
                are written to each token's place in the batch, and to the last row those of
                padding.
            prefill: runs as well, before these tokens, with rows of its own; not to be captured.
        """
        tokens, slots, offsets = (
            part[span, :num_tokens]
            for part in (self.plans.tokens, self.plans.slots, self.plans.offsets)
        )
        starts = self.plans.starts[span, : num_reqs + 1].to(torch.int32)
        lengths = self.buffers.seq_lens[:num_reqs]
        lengths = torch.where(starts[1:] > starts[:-1], lengths, 0)
        block_tables = [table[:num_reqs] for table in self.block_tables.input_block_tables]
        num_rows = num_reqs - (prefill.num_reqs if prefill is not None else 0)
        shape = self.padded.shape(num_rows, min(self.window, num_tokens), num_tokens)
        if prefill is not None:
            tokens = torch.cat([prefill.tokens, tokens])
            rows, others = prefill.order.tensor_split((prefill.num_reqs,))
            # Of prefilled requests there is nothing in the plan, so that others' ends stay.
            of_others = prefill.num_tokens + torch.cat([starts[others], starts[-1:]])
            starts = torch.cat([prefill.starts.to(torch.int32), of_others])
            lengths = torch.cat([self.buffers.seq_lens[rows], lengths[others]])
            block_tables = [table[prefill.order] for table in block_tables]
            shape = shape.after(prefill)
        there = tokens >= 0
        places = tokens.clamp(min=0)
        if span == 0:
            hidden = self.staged.embed(self.buffers.input_ids[places])
            residual = None
        else:
            hidden, residual = self._pending(slots, offsets)
            if prefill is not None:
                assert prefill.states is not None
                hidden = torch.cat([prefill.states[0], hidden])
                residual = torch.cat([prefill.states[1], residual])
                prefill.states = None  # as large as a prompt
        hidden, residual = self.padded.run_rows(
            span,
            shape,
            positions=self.buffers.positions[places],
            slot_mappings=torch.where(there, self.block_tables.slot_mappings[:, places], -1),
            query_start_loc=starts,
            seq_lens=lengths,
            block_tables=block_tables,
            is_padding=~there,
            hidden=hidden,
            residual=residual,
        )
        if span + 1 < self.num_spans:
            first = len(tokens) - num_tokens
            self.deferred.store(slots, offsets, hidden[first:], residual[first:])
            if prefill is not None:
                prefill.states = hidden[:first], residual[:first]
            return
        assert output is not None
        output[torch.where(there, tokens, len(output) - 1)] = self.staged.finish(hidden, residual)

    def _pending(
        self,
        # [num_tokens] int64, -1: padding
        slots: torch.Tensor,
        # [num_tokens] int64
        offsets: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(hidden, residual) of pending tokens as they are now."""
        # Of padding, zeros: a scale that is taken over all rows must not see anything else.
        shape = len(slots), self.deferred.hidden.shape[2]
        states = self.deferred.hidden.new_zeros(shape), self.deferred.residual.new_zeros(shape)
        return self.deferred.gather(slots, offsets, out=states)
