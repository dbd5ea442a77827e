"""Open rounds: what the host knows of a batch that verifies windows which it has not seen.

Owns the batch's side of such a round. With async scheduling the next batch is prepared while the
device still drafts: as if every request had as many drafts as it may have. The device then plans
the verification (kernels/verification_plan.py); how many tokens there were is counted when the
round's windows have come (device_round.py).

Requests that have finished since draft no more. One that is left out of the batch keeps its window
for a later one. What is prefilled in the same batch, new requests or the next chunks of others, is
known to the host and goes through all spans beside the windows.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from vllm.utils.torch_utils import async_tensor_h2d
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.worker.gpu.input_batch import InputBatch

from vllm_adadecode.metrics.counters import Counters

if TYPE_CHECKING:
    from vllm_adadecode.draft.device_loop import Drafting
    from vllm_adadecode.draft.windows import PendingWindow
    from vllm_adadecode.model.target import StagedTarget


# A batch that verifies an open round runs LM head and sampler on every place for a draft, vacant or
# not. For about so many rows that is bound by the reading of weights on a large GPU; with more of
# them the host waits for the round, which costs less than arithmetic on what is not there.
MOST_PLACES = 192


@dataclass(frozen=True)
class NextBatch:
    """What a batch does that may verify an open round unseen.

    Attributes:
        decoding: requests whose windows it verifies, at least one.
        left_out: requests whose windows it does not verify, though they go on.
        gone: requests of the round that have finished.
        prefills: whether something is prefilled in it as well.
    """

    decoding: list[str]
    left_out: list[str]
    gone: list[str]
    prefills: bool

    @staticmethod
    def of(
        scheduler_output: SchedulerOutput, decoding: Collection[str], prefilling: Collection[str]
    ) -> NextBatch | None:
        """None for a batch that needs to know the round's drafts when it is prepared.

        Grammars are asked about drafts before they are verified. A request that decodes, but is not
        of the round, was left out of an earlier one: its window has to be known.

        Args:
            decoding: requests of the round that sampled a token.
            prefilling: its other requests, in the midst of their prompts.
        """
        tokens = scheduler_output.num_scheduled_tokens
        drafts = scheduler_output.scheduled_spec_decode_tokens
        new = {request.req_id for request in scheduler_output.scheduled_new_reqs}
        if (
            scheduler_output.has_structured_output_requests
            or scheduler_output.scheduled_cached_reqs.resumed_req_ids
            or scheduler_output.preempted_req_ids
            or not new.isdisjoint(decoding)
            or any(r not in decoding and r not in prefilling and r not in new for r in tokens)
        ):
            return None
        finished = scheduler_output.finished_req_ids
        found = NextBatch(
            decoding=[r for r in decoding if r in tokens],
            left_out=[r for r in decoding if r not in tokens and r not in finished],
            gone=[r for r in (*decoding, *prefilling) if r in finished],
            prefills=any(r not in decoding for r in tokens),
        )
        if not found.decoding or any(
            tokens[r] != 1 + len(drafts.get(r, ())) for r in found.decoding
        ):
            return None
        return found


@dataclass
class PrefillPart:
    """What is prefilled in a batch that verifies an open round, on its way through the spans.

    Attributes:
        num_reqs, num_tokens: of this part.
        most_tokens: of a request.
        order: int64 ``[requests of the batch]``, on the device as all that follow, batch rows: of
            these requests, then of the others.
        tokens: int64 ``[num_tokens]`` place of each token in the batch, request by request.
        starts: int64 ``[num_reqs]`` first token of each request in ``tokens``.
        starts_cpu: int32 ``[num_reqs]``, on the host, the same.
        lengths_cpu: int32 ``[num_reqs]``, on the host, each request's tokens up to its last here.
        states: (hidden, residual), ``[num_tokens, hidden_size]`` each, after the last span that
            ran; None before the first.
    """

    num_reqs: int
    num_tokens: int
    most_tokens: int
    order: torch.Tensor
    tokens: torch.Tensor
    starts: torch.Tensor
    starts_cpu: torch.Tensor
    lengths_cpu: torch.Tensor
    states: tuple[torch.Tensor, torch.Tensor] | None = None

    @staticmethod
    def of(
        input_batch: InputBatch,
        # [num_reqs] batch rows
        rows: np.ndarray,
        device: torch.device,
    ) -> PrefillPart:
        counts = input_batch.num_scheduled_tokens[rows].astype(np.int64)
        starts = np.cumsum(counts) - counts
        first = input_batch.query_start_loc_np[rows] - starts
        tokens = np.repeat(first, counts) + np.arange(counts.sum())
        order = np.append(rows, np.setdiff1d(np.arange(input_batch.num_reqs), rows))
        parts = order, starts, tokens
        on_device = async_tensor_h2d(np.concatenate(parts).astype(np.int64), device=device)
        on_order, on_starts, on_tokens = on_device.split([len(part) for part in parts])
        return PrefillPart(
            num_reqs=len(rows),
            num_tokens=len(tokens),
            most_tokens=int(counts.max()),
            order=on_order,
            starts=on_starts,
            tokens=on_tokens,
            starts_cpu=torch.from_numpy(starts.astype(np.int32)),
            lengths_cpu=input_batch.seq_lens_cpu_upper_bound[torch.from_numpy(rows)],
        )


@dataclass(frozen=True)
class OpenPlan:
    """A batch that verifies an open round.

    Attributes:
        drafting: the round.
        req_ids: requests of the batch.
        row_of: int32 ``[num_reqs]``, on the device, row of each request in the round; -1: it is
            prefilled.
        scheduled: ``[num_reqs]`` tokens of each request that are prepared for.
        prefill: what is prefilled beside the windows; None: nothing is.
    """

    drafting: Drafting
    req_ids: list[str]
    row_of: torch.Tensor
    scheduled: np.ndarray
    prefill: PrefillPart | None = None

    @staticmethod
    def of(
        input_batch: InputBatch, drafting: Drafting, rows: Mapping[str, int], device: torch.device
    ) -> OpenPlan:
        """For a batch as vLLM has prepared it.

        Args:
            rows: row of each request in the round whose window is verified.
        """
        row_of = np.array([rows.get(r, -1) for r in input_batch.req_ids], dtype=np.int32)
        prefilled = np.flatnonzero(row_of < 0)
        return OpenPlan(
            drafting,
            input_batch.req_ids,
            async_tensor_h2d(row_of, device=device),
            input_batch.num_scheduled_tokens,
            PrefillPart.of(input_batch, prefilled, device) if len(prefilled) else None,
        )

    @property
    def num_tokens(self) -> int:
        return int(self.scheduled.sum())

    @property
    def num_places(self) -> int:
        """Of tokens of windows, vacant ones among them."""
        return self.num_tokens - (self.prefill.num_tokens if self.prefill is not None else 0)

    def count(
        self, windows: Mapping[str, PendingWindow], staged: StagedTarget, counters: Counters
    ) -> None:
        """Book the passes of the verification, once the windows are known.

        Args:
            windows: of all its requests but those that were prefilled.
        """
        depths = np.concatenate(
            [
                windows[req_id].depths[:count]
                for req_id, count in zip(self.req_ids, self.scheduled, strict=True)
                if req_id in windows
            ]
        )
        counters.overlapped_steps += 1
        counters.deferred_tokens += int((depths > 0).sum())
        if self.prefill is not None:
            counters.prefill_steps += 1
            counters.mixed_steps += bool(depths.any())
        elif depths.any():
            counters.deferred_steps += 1
        else:
            counters.plain_steps += 1
        for span, (start, stop) in enumerate(staged.spans):
            num_layers, tokens = stop - start, int((depths <= span).sum())
            if self.prefill is None:
                counters.verification_layers += num_layers * (tokens > 0)
                counters.verify_token_layers += num_layers * tokens
            elif depths.any():
                counters.mixed_layers += num_layers
                counters.mixed_prefill_token_layers += num_layers * self.prefill.num_tokens
                counters.mixed_verify_token_layers += num_layers * tokens
