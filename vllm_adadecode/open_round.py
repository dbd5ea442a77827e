"""Open rounds: what the host knows of a batch that verifies windows which it has not seen.

Owns the batch's side of such a round. With async scheduling the next batch is prepared while the
device still drafts: as if every request had as many drafts as it may have. The device then plans
the verification (kernels/verification_plan.py); how many tokens there were is counted when the
round's windows have come (device_round.py).

This holds for the batches of steady decoding: requests of the round, but for those that have
finished since, and no other.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from vllm.utils.torch_utils import async_tensor_h2d
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.worker.gpu.input_batch import InputBatch

from vllm_adadecode.counters import Counters

if TYPE_CHECKING:
    from vllm_adadecode.device_loop import Drafting
    from vllm_adadecode.staged import StagedTarget
    from vllm_adadecode.windows import PendingWindow


# A batch that verifies an open round runs LM head and sampler on every place for a draft, vacant or
# not. For about so many rows that is bound by the reading of weights on a large GPU; for more of
# them, waiting for the round may cost less than arithmetic on what is not there. Not measured.
MOST_PLACES = 192


@dataclass(frozen=True)
class OpenPlan:
    """A batch that verifies an open round.

    Attributes:
        drafting: the round.
        req_ids: requests of the batch.
        row_of: int32 ``[num_reqs]``, on the device, row of each request in the round.
        scheduled: ``[num_reqs]`` tokens of each request that are prepared for.
    """

    drafting: Drafting
    req_ids: list[str]
    row_of: torch.Tensor
    scheduled: np.ndarray

    @staticmethod
    def of(
        input_batch: InputBatch, drafting: Drafting, rows: Mapping[str, int], device: torch.device
    ) -> OpenPlan:
        """For a batch as vLLM has prepared it.

        Args:
            rows: row of each request in the round.
        """
        row_of = np.array([rows[req_id] for req_id in input_batch.req_ids], dtype=np.int32)
        return OpenPlan(
            drafting,
            input_batch.req_ids,
            async_tensor_h2d(row_of, device=device),
            input_batch.num_scheduled_tokens,
        )

    @property
    def num_tokens(self) -> int:
        return int(self.scheduled.sum())

    def count(
        self, windows: Mapping[str, PendingWindow], staged: StagedTarget, counters: Counters
    ) -> None:
        """Book the passes of the verification, once the windows are known.

        Args:
            windows: of all its requests.
        """
        found = [
            windows[req_id].depths[:count]
            for req_id, count in zip(self.req_ids, self.scheduled, strict=True)
        ]
        depths = np.concatenate(found)
        counters.open_batches += 1
        counters.deferred_tokens += int((depths > 0).sum())
        if depths.any():
            counters.deferred_batches += 1
        else:
            counters.plain_batches += 1
        for span, (start, stop) in enumerate(staged.spans):
            if tokens := int((depths <= span).sum()):
                counters.verify_layer_passes += stop - start
                counters.verify_token_layers += (stop - start) * tokens


def continues(scheduler_output: SchedulerOutput, req_ids: list[str]) -> bool:
    """Whether a batch is one of decoding, of just these requests, and may verify drafts unseen.

    Grammars are asked about drafts before they are verified.
    """
    tokens = scheduler_output.num_scheduled_tokens
    drafts = scheduler_output.scheduled_spec_decode_tokens
    return (
        len(tokens) == len(req_ids)
        and all(tokens.get(r) == 1 + len(drafts.get(r, ())) for r in req_ids)
        and not scheduler_output.scheduled_new_reqs
        and not scheduler_output.scheduled_cached_reqs.resumed_req_ids
        and not scheduler_output.preempted_req_ids
        and not scheduler_output.has_structured_output_requests
    )
