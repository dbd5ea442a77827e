"""Rounds whose draft loop is on the host: drafted, recorded and known within one call.

Owns one call of `propose` with that loop.
"""

import numpy as np
import torch
from vllm.v1.utils import record_function_or_nullcontext
from vllm.v1.worker.gpu.input_batch import InputBatch

from vllm_adadecode.draft.host_loop import HostLoop
from vllm_adadecode.engine.context import DraftContext
from vllm_adadecode.spans.ragged import RaggedSpans


class HostRounds:
    """The speculator's rounds with the loop on the host."""

    def __init__(self, context: DraftContext, spans: RaggedSpans) -> None:
        self.context, self.spans = context, spans

    def propose(
        self,
        input_batch: InputBatch,
        # [>= num_reqs]
        num_sampled: torch.Tensor,
        # [max_num_reqs, 1]
        last_sampled: torch.Tensor,
        # [max_num_reqs]
        temperature: torch.Tensor,
        # [max_num_reqs]
        seeds: torch.Tensor,
        max_drafts: int,
    ) -> torch.Tensor:
        """Draft for every request that sampled a token; see `AdaDecodeSpeculator.propose`."""
        context, ledger, num_reqs = self.context, self.context.ledger, input_batch.num_reqs
        slots, slots_np = input_batch.idx_mapping, input_batch.idx_mapping_np
        sampled_np = num_sampled[:num_reqs].cpu().numpy()
        windows, ledger.in_verification = ledger.in_verification, {}
        ledger.count_verified(input_batch, sampled_np, windows)
        # Position of the last sampled token: the first whose KV is not complete.
        first_pos = context.req_states.num_computed_tokens.gpu[slots].to(torch.int64)
        room = ledger.last_starts(slots_np) - first_pos.cpu().numpy()
        limits = np.clip(room, 0, max_drafts)
        limits[sampled_np == 0] = 0  # in the midst of its prompt
        caps, used_exits = ledger.allowed(input_batch.req_ids, limits > 0, max_drafts)
        limits = np.minimum(limits, caps)
        if not limits.any():
            # As quick as can be: this is every round where drafting does not pay.
            ledger.keep_nothing(input_batch)
            ledger.round_ended(input_batch)
            return context.no_drafts(num_reqs)
        loop = HostLoop(
            staged=context.target,
            spans=self.spans,
            deferred=context.deferred,
            thresholds=ledger.thresholds,
            heads=context.host_heads(temperature, seeds),
        )
        with record_function_or_nullcontext("adadecode: draft loop"):
            result = loop.run(
                slots=slots_np,
                first_pos=first_pos,
                last_sampled=last_sampled[slots].view(-1),
                limits=limits,
                used_exits=used_exits,
                max_drafts=ledger.max_drafts,
                seq_lens_upper=input_batch.seq_lens_cpu_upper_bound.numpy()[:num_reqs],
            )
        ledger.count_drafted(result)
        ledger.keep_windows(input_batch, sampled_np, result)
        ledger.round_ended(input_batch)
        # A copy: vLLM may write to it.
        return result.state.tokens[:, 1:].clone()
