"""The forward pass of a verification step, from the depth of each unverified token.

Owns which passes run. A token joins at its depth: a span below the deepest one runs for those
tokens alone that have not been through it, among them whatever is prefilled in the same batch; from
the deepest one on, all tokens run together. vLLM's rejection sampler does the rest. Batches without
any deferred state are vLLM's own. Where there are captured graphs (graphs.py), they run the same
passes.
"""

import numpy as np
import torch
from vllm.v1.utils import record_function_or_nullcontext

from vllm_adadecode.kernels.deferred import DeferredStates
from vllm_adadecode.model.target import StagedTarget
from vllm_adadecode.spans.ragged import RaggedSpans, find_moe_layers_by_name
from vllm_adadecode.spans.shapes import PrefillPart
from vllm_adadecode.verify.graphs import VerificationGraphs
from vllm_adadecode.verify.overlapped_plan import OverlappedPlan
from vllm_adadecode.verify.passes import VerificationPasses
from vllm_adadecode.verify.plan import VerificationPlan


class VerificationForward:
    """Runs planned verifications in place of the target's forward pass.

    Args:
        passes: for overlapped rounds; None: there are none.
    """

    def __init__(
        self,
        staged: StagedTarget,
        spans: RaggedSpans,
        deferred: DeferredStates,
        passes: VerificationPasses | None,
    ) -> None:
        self.staged, self.spans = staged, spans
        self.deferred, self.passes = deferred, passes

    def forward(
        self,
        plan: VerificationPlan,
        # [num_tokens] int32
        input_ids: torch.Tensor,
        # [num_tokens] int64
        positions: torch.Tensor,
        graphs: VerificationGraphs | None,
    ) -> torch.Tensor:
        """Final hidden states of all tokens, ``[num_tokens, hidden_size]``, as the target's own.

        Called inside the forward context of the whole batch, which is that of the spans that all
        tokens run together.

        Args:
            graphs: captured passes; None where there are none.
        """
        if graphs is not None and (passes := graphs.descriptors(plan)) is not None:
            return graphs.replay_plan(plan, passes)
        find_moe_layers_by_name()
        hidden, residual = self._deferred_states(plan, positions.device)
        joined = int(plan.depths.max())
        for span in range(joined):
            # Depths never increase along a window: these are the ends of the windows.
            tokens = np.flatnonzero(plan.depths <= span)
            if tokens.size == 0:
                continue
            index = torch.from_numpy(tokens).to(positions.device)
            if span == 0:
                inputs = self.staged.embed(input_ids[index]), None
            else:
                inputs = hidden[index], residual[index]
            outputs = self._run_early(plan, span, tokens, positions[index], *inputs)
            hidden[index], residual[index] = outputs
        for span in range(joined, len(self.staged.spans)):
            with record_function_or_nullcontext(f"adadecode: span {span}"):
                hidden, residual = self.staged.run_span(span, positions, hidden, residual)
        return self.staged.finish(hidden, residual)

    def forward_overlapped(
        self, plan: OverlappedPlan, graphs: VerificationGraphs | None
    ) -> torch.Tensor:
        """Final hidden states of an overlapped round's tokens, ``[num_tokens, hidden_size]``.

        Those of padding have no meaning; `VerificationPasses.padding` says which they are. The
        round's loop must have been queued to its end.
        """
        passes = self.passes
        assert passes is not None
        num_reqs, num_tokens = len(plan.req_ids), plan.num_tokens
        size = None
        if graphs is not None and plan.prefill is None:
            size = graphs.size(num_tokens, num_reqs)
        passes.load_overlapped(plan, size or plan.num_token_slots)
        pending = plan.run.pending()
        if plan.prefill is not None:
            return self._beside(plan.prefill, plan, passes, pending)
        # Requests that have left since are in the numbers, and a window may be scheduled in part.
        counts = {span: min(n, num_tokens) for span, n in enumerate(pending) if n}
        if graphs is not None and size is not None:
            for span, count in counts.items():
                graphs.replay(span, graphs.size(count, num_reqs) or size)
            return graphs.output[:num_tokens]
        output = passes.new_output(num_tokens)
        for span, count in counts.items():
            passes.run_span(span, max(count, num_reqs), num_reqs, output)
        return output[:num_tokens]

    @staticmethod
    def _beside(
        prefill: PrefillPart, plan: OverlappedPlan, passes: VerificationPasses, pending: list[int]
    ) -> torch.Tensor:
        """All spans for what is prefilled, with the windows of an overlapped round."""
        output = None
        for span, count in enumerate(pending):
            if span + 1 == passes.num_spans:
                output = passes.new_output(plan.num_tokens)
            count = min(count, plan.num_token_slots)
            passes.run_span(span, count, len(plan.req_ids), output, prefill)
        assert output is not None
        return output[: plan.num_tokens]

    def _deferred_states(
        self, plan: VerificationPlan, device: torch.device
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(hidden, residual) of all tokens, undefined for those at depth 0."""
        slots = np.where(plan.depths > 0, plan.slots[plan.rows].astype(np.int64), -1)
        return self.deferred.gather(
            torch.from_numpy(slots).to(device), torch.from_numpy(plan.offsets).to(device)
        )

    def _run_early(
        self,
        plan: VerificationPlan,
        span: int,
        # [n] tokens of the batch, in order
        tokens: np.ndarray,
        # [n] int64
        positions: torch.Tensor,
        # [n, hidden_size]
        hidden: torch.Tensor,
        # [n, hidden_size], None for span 0
        residual: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Run a span on some of the tokens, with attention metadata of their own."""
        rows, counts = np.unique(plan.rows[tokens], return_counts=True)
        return self.spans.run_span(
            span,
            slots=plan.slots[rows],
            num_tokens=counts,
            seq_lens_upper=plan.seq_lens_upper[rows],
            positions=positions,
            hidden=hidden,
            residual=residual,
            is_prefilling=plan.is_prefilling[rows],
        )
