"""vLLM's rejection sampler with the log-probabilities of the tokens that requests name.

Owns `logprob_token_ids` in a verification, which vLLM's rejection sampler leaves out. Which tokens
are accepted is all vLLM's.
"""

from typing import Any

import numpy as np
import torch
from vllm.v1.outputs import LogprobsTensors
from vllm.v1.worker.gpu.input_batch import InputBatch
from vllm.v1.worker.gpu.sample.logprob import compute_topk_scores
from vllm.v1.worker.gpu.sample.output import SamplerOutput
from vllm.v1.worker.gpu.spec_decode.rejection_sampler import RejectionSampler


class NamedLogprobsRejectionSampler(RejectionSampler):
    """For each verified token what vLLM's `Sampler` gives for a token without drafts."""

    def __call__(
        self, logits: torch.Tensor, input_batch: InputBatch, *args: Any, **kwargs: Any
    ) -> SamplerOutput:
        # vLLM may go through a batch in chunks of requests, and puts together what they give: as
        # wide for each as for the widest.
        state = self.sampler.logprob_token_ids_state
        self._most_named = state.max_num_token_ids(input_batch.idx_mapping_np)
        # [num_logits] of the chunks to come
        self._request_slots = input_batch.expanded_idx_mapping
        return super().__call__(logits, input_batch, *args, **kwargs)

    def _get_logprobs_tensors(
        self,
        sampled: torch.Tensor,
        num_sampled: torch.Tensor,
        logits: torch.Tensor,
        cu_num_logits: torch.Tensor,
        cu_num_logits_np: np.ndarray,
        max_num_logprobs: int,
    ) -> LogprobsTensors | None:
        given = (sampled, num_sampled, logits, cu_num_logits, cu_num_logits_np)
        if not self._most_named:
            return super()._get_logprobs_tensors(*given, max_num_logprobs)
        request_slots, self._request_slots = self._request_slots.tensor_split([len(logits)])
        of_sampled = super()._get_logprobs_tensors(*given, 0)
        assert of_sampled is not None
        return compute_topk_scores(
            logits,
            # -1 is for none.
            max(max_num_logprobs, 0),
            of_sampled.logprob_token_ids[:, 0],
            of_sampled.cu_num_generated_tokens,
            self.sampler.logprob_token_ids_state,
            request_slots,
            self._most_named,
            logits_mode=self.sampler.logprobs_mode in ("raw_logits", "processed_logits"),
        )
