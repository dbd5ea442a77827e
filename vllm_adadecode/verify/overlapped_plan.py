"""The verification of an overlapped round: what the host knows of windows that it has not seen.

Owns the batch's side of such a round. With async scheduling the next batch is prepared while the
device still drafts: as if every request had as many draft tokens as it may have. The device then
plans the verification (kernels/verification_plan.py); how many tokens there were is counted when
the round is resolved (engine/device_rounds.py).

Requests that have finished since draft no more. One that is left out of the batch keeps its window
for a later one. What is prefilled in the same batch, new requests or the next chunks of others, is
known to the host and goes through all spans beside the windows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from vllm.utils.torch_utils import async_tensor_h2d
from vllm.v1.worker.gpu.input_batch import InputBatch

from vllm_adadecode.draft.device_loop import DraftRun
from vllm_adadecode.draft.windows import PendingWindow
from vllm_adadecode.metrics.counters import Counters
from vllm_adadecode.spans.shapes import PrefillPart
from vllm_adadecode.verify.plan import count_step

# A batch that verifies an overlapped round runs LM head and sampler on every token slot that a
# draft token may take, padding or not. For about so many rows that is bound by the reading of
# weights on a large GPU; with more of them the host waits for the round, which costs less than
# arithmetic on what is not there.
MOST_TOKEN_SLOTS = 192


@dataclass(frozen=True)
class OverlappedPlan:
    """A batch that verifies an overlapped round.

    Attributes:
        run: the round's drafting.
        req_ids: requests of the batch.
        row_of: int32 ``[num_reqs]``, on the device, row of each request in the round; -1: it is
            prefilled.
        scheduled: ``[num_reqs]`` tokens of each request that are prepared for.
        prefill: what is prefilled beside the windows; None: nothing is.
    """

    run: DraftRun
    req_ids: list[str]
    row_of: torch.Tensor
    scheduled: np.ndarray
    prefill: PrefillPart | None = None

    @staticmethod
    def of(
        input_batch: InputBatch, run: DraftRun, rows: Mapping[str, int], device: torch.device
    ) -> OverlappedPlan:
        """For a batch as vLLM has prepared it.

        Args:
            rows: row of each request in the round whose window is verified.
        """
        row_of = np.array([rows.get(r, -1) for r in input_batch.req_ids], dtype=np.int32)
        prefilled = np.flatnonzero(row_of < 0)
        return OverlappedPlan(
            run,
            input_batch.req_ids,
            async_tensor_h2d(row_of, device=device),
            input_batch.num_scheduled_tokens,
            PrefillPart.of(input_batch, prefilled, device) if len(prefilled) else None,
        )

    @property
    def num_tokens(self) -> int:
        return int(self.scheduled.sum())

    @property
    def num_prefilled(self) -> int:
        return self.prefill.num_tokens if self.prefill is not None else 0

    @property
    def num_token_slots(self) -> int:
        """For tokens of windows, padding among them."""
        return self.num_tokens - self.num_prefilled

    def count(
        self,
        windows: Mapping[str, PendingWindow],
        spans: Sequence[tuple[int, int]],
        counters: Counters,
    ) -> None:
        """Count the verification step, once the windows are known.

        Args:
            windows: of all its requests but those that were prefilled.
            spans: as for `count_step`.
        """
        depths = [
            windows[req_id].depths[:count]
            for req_id, count in zip(self.req_ids, self.scheduled, strict=True)
            if req_id in windows
        ]
        counters.overlapped_steps += 1
        count_step(counters, spans, np.concatenate(depths), self.num_prefilled)
