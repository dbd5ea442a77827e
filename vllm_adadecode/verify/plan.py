"""What a verification step runs, planned on the host, and how every such step is counted.

Owns the plan of a batch whose unverified tokens the host knows; overlapped_plan.py has that of one
whose tokens it does not know yet. Both are counted here, by the depths of their tokens.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from vllm.v1.worker.gpu.input_batch import InputBatch

from vllm_adadecode.draft.windows import PendingWindow
from vllm_adadecode.metrics.counters import Counters


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
    input_batch: InputBatch, windows: Mapping[str, PendingWindow]
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


def count_step(
    counters: Counters,
    spans: Sequence[tuple[int, int]],
    # [num_tokens] spans that each token has been through, without those that are prefilled
    depths: np.ndarray,
    num_prefilled: int,
) -> None:
    """Count a verification step: its kind, and the layers that it executes.

    Args:
        spans: first layer and end of each.
        num_prefilled: tokens that are prefilled beside them.
    """
    is_deferred = bool(depths.any())
    counters.deferred_tokens += int((depths > 0).sum())
    if num_prefilled:
        counters.prefill_steps += 1
        counters.mixed_steps += is_deferred
    elif is_deferred:
        counters.deferred_steps += 1
    else:
        counters.plain_steps += 1
        # Most steps where drafting does not pay: as little as can be.
        counters.verification_layers += spans[-1][1] * bool(len(depths))
        counters.verify_token_layers += spans[-1][1] * len(depths)
        return
    for span, (start, stop) in enumerate(spans):
        num_layers, tokens = stop - start, int((depths <= span).sum())
        if not num_prefilled:
            counters.verification_layers += num_layers * (tokens > 0)
            counters.verify_token_layers += num_layers * tokens
        elif is_deferred:
            counters.mixed_layers += num_layers
            counters.mixed_prefill_token_layers += num_layers * num_prefilled
            counters.mixed_verify_token_layers += num_layers * tokens
