"""The scorer: verification that starts each pending token at its depth (DESIGN, step 3).

Owns the forward pass of a batch that has deferred states. A token joins at its depth: a span below
the deepest one runs for those tokens alone that have not been through it, among them whatever is
prefilled in the same batch; from the deepest one on, all tokens run together. vLLM's rejection
sampler does the rest. Batches without any deferred state run all spans on all tokens. Where there
are captured graphs (verification_graphs.py), they run the same passes. A round that is still open
(open_round.py) is planned on the device.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from vllm.v1.utils import record_function_or_nullcontext
from vllm.v1.worker.gpu.input_batch import InputBatch

from vllm_adadecode.draft.windows import PendingWindow
from vllm_adadecode.kernels.deferred import DeferredStates
from vllm_adadecode.metrics.counters import Counters
from vllm_adadecode.model.target import StagedTarget
from vllm_adadecode.spans.ragged import RaggedSpans, find_moe_layers_by_name

if TYPE_CHECKING:
    from vllm_adadecode.verify.graphs import VerificationGraphs
    from vllm_adadecode.verify.overlapped_plan import OpenPlan, PrefillPart
    from vllm_adadecode.verify.passes import VerificationPasses


@dataclass
class VerificationPlan:
    """Where each token of a batch stands.

    Attributes:
        slots: ``[num_reqs]`` request slots.
        is_prefilling: bool ``[num_reqs]``; such a request has no deferred state.
        rows: ``[num_tokens]`` batch row of each token.
        offsets: ``[num_tokens]`` place of each token among its request's; for a pending token that
            is its window offset.
        depths: ``[num_tokens]`` spans each token has been through.
        seq_lens_upper: ``[num_reqs]`` upper bound of the lengths.
    """

    slots: np.ndarray
    is_prefilling: np.ndarray
    rows: np.ndarray
    offsets: np.ndarray
    depths: np.ndarray
    seq_lens_upper: np.ndarray

    @property
    def is_mixed(self) -> bool:
        return bool(self.is_prefilling.any())


def make_plan(
    input_batch: InputBatch, windows: dict[str, PendingWindow]
) -> VerificationPlan | None:
    """Plan a verification, or None where all tokens have all spans before them."""
    if not windows:
        return None
    counts = input_batch.num_scheduled_tokens
    rows = np.repeat(np.arange(input_batch.num_reqs), counts)
    offsets = np.arange(input_batch.num_tokens) - input_batch.query_start_loc_np[rows]
    depths = np.zeros(input_batch.num_tokens, dtype=np.int64)
    for row, req_id in enumerate(input_batch.req_ids):
        window = windows.get(req_id)
        # A request that is new, resumed or still prefilling starts at depth 0. The scheduler may
        # verify fewer tokens than are pending, never more.
        if window is None or input_batch.is_prefilling_np[row] or counts[row] > len(window.depths):
            continue
        start = input_batch.query_start_loc_np[row]
        depths[start : start + counts[row]] = window.depths[: counts[row]]
    if not depths.any():
        return None
    return VerificationPlan(
        slots=input_batch.idx_mapping_np,
        is_prefilling=input_batch.is_prefilling_np,
        rows=rows,
        offsets=offsets,
        depths=depths,
        seq_lens_upper=input_batch.seq_lens_cpu_upper_bound.numpy()[: input_batch.num_reqs],
    )


class VerificationForward:
    """Runs planned verifications in place of the target's forward pass.

    Args:
        graphs: gives captured passes, None where there are none. Asked each time: vLLM's memory
            profiling drops those that it had captured.
        passes: for open rounds; None: there are none.
    """

    def __init__(
        self,
        staged: StagedTarget,
        spans: RaggedSpans,
        deferred: DeferredStates,
        counters: Counters,
        graphs: "Callable[[], VerificationGraphs | None]",
        passes: "VerificationPasses | None" = None,
    ) -> None:
        self.graphs, self.passes = graphs, passes
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

        Called inside the forward context of the whole batch, which is that of the spans that all
        tokens run together.
        """
        graphs = self.graphs()
        if graphs is not None and (passes := graphs.descriptors(plan)) is not None:
            for desc in passes:
                self._count(plan, desc.span, plan.rows[plan.depths <= desc.span])
            return graphs.run(plan, passes)
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
            self._count(plan, span, plan.rows)
            with record_function_or_nullcontext(f"adadecode: span {span}"):
                hidden, residual = self.staged.run_span(span, positions, hidden, residual)
        return self.staged.finish(hidden, residual)

    def forward_open(self, plan: "OpenPlan") -> torch.Tensor:
        """Final hidden states of an open round's tokens, ``[num_tokens, hidden_size]``.

        Those of vacant places are anything; `VerificationPasses.vacant` says which they are. The
        round's loop must have been queued to its end.
        """
        passes, graphs = self.passes, self.graphs()
        assert passes is not None
        num_reqs, num_tokens, prefill = len(plan.req_ids), plan.num_tokens, plan.prefill
        size = None
        if graphs is not None and prefill is None:
            size = graphs.size(num_tokens, num_reqs)
        passes.load_open(plan, size or plan.num_places)
        pending = plan.drafting.pending()
        if prefill is not None:
            return self._beside(prefill, plan, passes, pending)
        # Requests that have left since are in the numbers, and a window may be scheduled in part.
        counts = {span: min(n, num_tokens) for span, n in enumerate(pending) if n}
        if graphs is not None and size is not None:
            for span, count in counts.items():
                graphs.replay(span, graphs.size(count, num_reqs) or size)
            return graphs.output[:num_tokens]
        output = passes.new_output(num_tokens)
        for span, count in counts.items():
            passes.run(span, max(count, num_reqs), num_reqs, output)
        return output[:num_tokens]

    def _beside(
        self,
        prefill: "PrefillPart",
        plan: "OpenPlan",
        passes: "VerificationPasses",
        pending: list[int],
    ) -> torch.Tensor:
        """All spans for what is prefilled, with the windows of an open round."""
        output = None
        for span, count in enumerate(pending):
            if span + 1 == passes.num_spans:
                output = passes.new_output(plan.num_tokens)
            passes.run(span, min(count, plan.num_places), len(plan.req_ids), output, prefill)
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
        self._count(plan, span, plan.rows[tokens])
        rows, counts = np.unique(plan.rows[tokens], return_counts=True)
        return self.spans.run(
            span,
            slots=plan.slots[rows],
            num_tokens=counts,
            seq_lens_upper=plan.seq_lens_upper[rows],
            positions=positions,
            hidden=hidden,
            residual=residual,
            is_prefilling=plan.is_prefilling[rows],
        )

    def _count(
        self,
        plan: VerificationPlan,
        span: int,
        # [n] batch row of each token that runs
        rows: np.ndarray,
    ) -> None:
        start, stop = self.staged.spans[span]
        num_layers, counters = stop - start, self.counters
        if not plan.is_mixed:
            counters.verification_layers += num_layers
            counters.verify_token_layers += num_layers * len(rows)
            return
        prefill = int(plan.is_prefilling[rows].sum())
        counters.mixed_layers += num_layers
        counters.mixed_prefill_token_layers += num_layers * prefill
        counters.mixed_verify_token_layers += num_layers * (len(rows) - prefill)
