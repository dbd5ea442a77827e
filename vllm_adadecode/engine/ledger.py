"""What a round may draft, and what is recorded of it: the same whichever loop drafts.

Owns thresholds and adaptive draft length as far as they limit a round, the windows that wait for
verification, the draft tokens of the last round, and all counting.
"""

from collections.abc import Mapping, Sequence
from itertools import pairwise

import numpy as np
from vllm.config import VllmConfig
from vllm.v1.worker.gpu.input_batch import InputBatch
from vllm.v1.worker.gpu.states import RequestState

from vllm_adadecode.adaptive.draft_length import AdaptiveDraftLength
from vllm_adadecode.draft.result import DraftResult
from vllm_adadecode.draft.windows import PendingWindow, PendingWindows
from vllm_adadecode.heads.thresholds import ExitThresholds
from vllm_adadecode.metrics.counters import Counters


class RoundLedger:
    """Limits and records of a worker's rounds.

    Attributes:
        thresholds: by which heads are evaluated and predictions accepted; may be replaced between
            rounds.
        draft_length: set once steps have been measured; None: always as many as there may be.
        seeded: requests whose samples must not depend on measured times: their user gave a seed,
            and what is drawn depends on which draft tokens there were.
        windows: that wait for verification.
        in_verification: windows that the batch under way verifies, if the host knows them.
        last_req_ids, last_drafts: draft tokens of the last round, by batch row.
        spans: first layer and end of each.
    """

    def __init__(self, vllm_config: VllmConfig, req_states: RequestState) -> None:
        spec, self._model_config = vllm_config.speculative_config, vllm_config.model_config
        self._req_states = req_states
        self.max_drafts: int = spec.num_speculative_tokens
        self.thresholds = ExitThresholds.of(spec.confidence_threshold, spec.gate_threshold)
        self.draft_length: AdaptiveDraftLength | None = None
        self.seeded: set[str] = set()
        # Whether all requests of the round do as adaptive draft length says.
        self._as_chosen = True
        self.windows = PendingWindows()
        self.in_verification: dict[str, PendingWindow] = {}
        self.last_req_ids: list[str] = []
        self.last_drafts: list[list[int]] = []
        num_layers = self._model_config.get_total_num_hidden_layers()
        self.counters = Counters.create(num_layers, tuple(spec.exit_layers))
        self.spans = tuple(pairwise((0, *spec.exit_layers, num_layers)))

    # --- limits --------------------------------------------------------------------------------

    def allowed(
        self,
        req_ids: Sequence[str],
        # [num_reqs] bool
        may_draft: np.ndarray,
        max_drafts: int,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Most draft tokens of each request, by thresholds and adaptive draft length.

        Returns:
            most draft tokens, and exits that may give them, from the first. For requests that may
            not draft anyway they have no meaning.
        """
        caps = np.full(len(req_ids), max_drafts if self.thresholds.num_used_exits else 0)
        used_exits = np.full(len(req_ids), self.thresholds.num_used_exits)
        if self.draft_length is None or not caps.any():
            return caps, used_exits
        free = may_draft
        if self.seeded:
            free = free & [req_id not in self.seeded for req_id in req_ids]
        self._as_chosen = bool((free == may_draft).all())
        if free.any():
            # The others are in the round as well, and their user's seed has them draft in any case.
            choice = self.draft_length.choose(int(np.count_nonzero(may_draft)))
            caps[free] = np.minimum(max_drafts, choice.drafts)
            used_exits[free] = choice.exits
        return caps, used_exits

    def last_starts(
        self,
        # [num_reqs] request slots
        slots: np.ndarray,
    ) -> np.ndarray:
        """Positions that a draft token must come after, ``[num_reqs]``, to be of use.

        It is followed by at least the token sampled after it, so neither may pass the end of the
        request (its `max_tokens`) or of the model's context: a request whose last sampled token is
        at ``p`` has room for this minus ``p``.
        """
        end = np.minimum(self._req_states.max_seq_len[slots], self._model_config.max_model_len)
        return end - 2

    # --- records -------------------------------------------------------------------------------

    def count_verified(
        self,
        input_batch: InputBatch,
        # [num_reqs]
        num_sampled: np.ndarray,
        windows: Mapping[str, PendingWindow],
    ) -> None:
        """Count what the verification of ``windows`` accepted."""
        counters, exits = self.counters, list(self.counters.exits.values())
        scheduled = input_batch.num_draft_tokens_per_req
        counters.sampled_tokens += int((num_sampled > 0).sum())
        for row, req_id in enumerate(input_batch.req_ids):
            if input_batch.is_prefilling_np[row] or num_sampled[row] == 0:
                continue
            accepted = int(num_sampled[row]) - 1
            verified = int(scheduled[row]) if scheduled is not None else 0
            if not input_batch.has_prefill:
                counters.verification_steps += 1
                counters.generated_tokens += accepted + 1
            window = windows.get(req_id)
            if window is None:
                continue
            if self.draft_length is not None:
                kept = min(accepted, window.num_drafts)
                self.draft_length.statistics.add_window(
                    window.limit, window.used_exits, window.exits, kept
                )
            for i, exit_index in enumerate(window.exits[:verified]):
                exits[exit_index].accepted_tokens += i < accepted
                exits[exit_index].rejected_tokens += i >= accepted

    def count_drafted(self, result: DraftResult) -> None:
        """Count a round's drafting, for adaptive draft length as well."""
        result.count(self.counters, self.spans, self.thresholds)
        if self.draft_length is not None:
            statistics, state = self.draft_length.statistics, result.state
            evaluated = np.zeros(statistics.num_exits, dtype=np.int64)
            evaluated[: len(result.exits.heads_evaluated)] = result.exits.heads_evaluated
            statistics.add_round(
                result.limits, result.used_exits, state.num_drafts, state.exits, evaluated
            )

    def windows_of(
        self,
        input_batch: InputBatch,
        # [num_reqs]
        num_sampled: np.ndarray,
        result: DraftResult,
    ) -> dict[str, PendingWindow]:
        """One window for each request that sampled a token."""
        state = result.state
        return {
            req_id: PendingWindow(
                depths=state.depths[row, : state.num_drafts[row] + 1].copy(),
                exits=state.exits[row, : state.num_drafts[row]].copy(),
                limit=int(result.limits[row]),
                used_exits=int(result.used_exits[row]),
            )
            for row, req_id in enumerate(input_batch.req_ids)
            if num_sampled[row] > 0
        }

    def keep_windows(
        self,
        input_batch: InputBatch,
        # [num_reqs]
        num_sampled: np.ndarray,
        result: DraftResult,
    ) -> None:
        """Record what waits for verification, and the draft tokens for the scheduler."""
        drafts = result.state.tokens[:, 1:].cpu().tolist()
        self.last_req_ids = list(input_batch.req_ids)
        self.last_drafts = [
            row[:count] for row, count in zip(drafts, result.state.num_drafts, strict=True)
        ]
        found = self.windows_of(input_batch, num_sampled, result)
        for req_id, window in found.items():
            self.windows.put(req_id, window)

    def keep_nothing(self, input_batch: InputBatch) -> None:
        """As `keep_windows`, of a round that drafts nothing."""
        self.last_req_ids = list(input_batch.req_ids)
        self.last_drafts = [[]] * input_batch.num_reqs

    def round_ended(
        self, input_batch: InputBatch, timed: bool = True, overlapped: bool = False
    ) -> None:
        """Tell adaptive draft length that all of a round's drafting is queued.

        Args:
            timed: whether nothing else was in the round's time.
            overlapped: as for `AdaptiveDraftLength.round_ended`.
        """
        if self.draft_length is not None:
            timed &= self._as_chosen and not input_batch.has_prefill
            requests = input_batch.req_ids if timed else None
            self.draft_length.round_ended(requests, overlapped)
