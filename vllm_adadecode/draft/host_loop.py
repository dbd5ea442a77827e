"""The draft loop on the host: the reference that the device's loop is tested against.

Owns the order of passes: span 0 for the newest token of every drafting request, then head by head.
A request whose head is confident takes its prediction as the next draft token and waits for the
others; one whose head is not goes through the next span together with its shallower tokens
(fill-in).
"""

from dataclasses import dataclass

import numpy as np
import torch
from vllm.v1.utils import record_function_or_nullcontext

from vllm_adadecode.draft.heads import Heads
from vllm_adadecode.draft.result import DraftResult, DraftState, ExitCounts
from vllm_adadecode.heads.thresholds import ExitThresholds
from vllm_adadecode.kernels.deferred import DeferredStates
from vllm_adadecode.model.target import StagedTarget
from vllm_adadecode.spans.ragged import RaggedSpans


@dataclass
class HostLoop:
    """One round's drafting."""

    staged: StagedTarget
    spans: RaggedSpans
    deferred: DeferredStates
    thresholds: ExitThresholds
    heads: Heads

    def run(
        self,
        # [num_reqs] request slots
        slots: np.ndarray,
        # [num_reqs] int64, position of the last sampled token
        first_pos: torch.Tensor,
        # [num_reqs] int64
        last_sampled: torch.Tensor,
        # [num_reqs] most draft tokens of each request; 0: none
        limits: np.ndarray,
        # [num_reqs] exits that may give them, from the first
        used_exits: np.ndarray,
        max_drafts: int,
        # [num_reqs] upper bound of the verified length
        seq_lens_upper: np.ndarray,
    ) -> DraftResult:
        """Draft until every request has stopped or reached its limit.

        The newest token of a request that reached its limit is left at depth 0: nothing was
        predicted from it, so verification gives it its first pass at the same cost.
        """
        num_reqs = len(slots)
        self._slots, self._first_pos = slots, first_pos
        self._slots_device = torch.from_numpy(slots.astype(np.int64)).to(first_pos.device)
        self._upper = seq_lens_upper
        state = DraftState(
            tokens=last_sampled.new_zeros((num_reqs, 1 + max_drafts)),
            num_drafts=np.zeros(num_reqs, dtype=np.int64),
            depths=np.zeros((num_reqs, 1 + max_drafts), dtype=np.int64),
            exits=np.zeros((num_reqs, max_drafts), dtype=np.int64),
        )
        state.tokens[:, 0] = last_sampled
        counts = ExitCounts.zeros(self.thresholds.num_used_exits)
        result = DraftResult(state, counts, limits, used_exits)
        for offset in range(max_drafts):
            rows = np.flatnonzero((limits > offset) & (state.num_drafts == offset))
            if rows.size == 0:
                break
            self._draft_next(result, rows, offset)
        return result

    def _draft_next(self, result: DraftResult, rows: np.ndarray, offset: int) -> None:
        """Try to predict the token after window offset ``offset`` for ``rows``."""
        counts = result.exits
        for exit_index in range(self.thresholds.num_used_exits):
            rows = rows[result.used_exits[rows] > exit_index]
            if rows.size == 0:
                return
            newest = self._run_span(result.state, exit_index, rows, offset)
            counts.span_passes[exit_index] += 1
            counts.rows[exit_index] += len(rows)
            if not self.thresholds.uses(exit_index):
                continue
            with record_function_or_nullcontext(f"adadecode: head {exit_index + 1}"):
                evaluated, confident, tokens = self._evaluate(exit_index, offset, *newest)
            counts.heads_evaluated[exit_index] += int(evaluated.sum())
            counts.head_batches[exit_index] += bool(evaluated.any())
            counts.draft_tokens[exit_index] += int(confident.sum())
            self._extend(result.state, exit_index, rows, offset, confident, tokens)
            # The others, skipped by the gate or not, go deeper, or stop behind their last exit.
            rows = rows[~confident]

    def _evaluate(
        self,
        exit_index: int,
        offset: int,
        # [num_rows, hidden_size]
        hidden: torch.Tensor,
        # [num_rows, hidden_size]
        residual: torch.Tensor,
        # [num_rows] request slots
        slots: torch.Tensor,
        # [num_rows] int64
        positions: torch.Tensor,
    ) -> tuple[np.ndarray, np.ndarray, torch.Tensor]:
        """Gate and head of every row, from its newest token.

        Returns:
            bool ``[num_rows]`` each, whether a row's head was evaluated and whether its prediction
            is accepted, and int64 ``[num_rows]`` tokens, of no meaning where it was not evaluated.
        """
        check = self.heads.check(
            exit_index,
            hidden,
            residual,
            slots=slots,
            positions=positions,
            draft=offset,
            gate_threshold=self.thresholds.gate[exit_index],
        )
        confident = self._confident(exit_index, check.p)
        # The one host synchronisation of a head.
        if check.live is None:
            return np.ones(len(slots), dtype=bool), confident.cpu().numpy(), check.token
        evaluated, accepted = torch.stack([check.live, confident & check.live]).cpu().numpy()
        return evaluated, accepted, check.token

    def _confident(
        self,
        exit_index: int,
        # [num_rows] float32
        p: torch.Tensor,
    ) -> torch.Tensor:
        """Rows whose prediction is accepted, bool ``[num_rows]``."""
        threshold = self.thresholds.confidence[exit_index]
        assert threshold is not None, "the exit is turned off"
        return p > threshold

    def _extend(
        self,
        state: DraftState,
        exit_index: int,
        rows: np.ndarray,
        offset: int,
        # [len(rows)] bool
        confident: np.ndarray,
        # [len(rows)] int64
        tokens: torch.Tensor,
    ) -> None:
        """Give the confident ones of ``rows`` their next draft token."""
        if not confident.any():
            return
        chosen = torch.from_numpy(np.flatnonzero(confident)).to(tokens.device)
        rows = rows[confident]
        state.tokens[torch.from_numpy(rows).to(tokens.device), offset + 1] = tokens[chosen]
        state.num_drafts[rows] += 1
        state.exits[rows, offset] = exit_index

    def _run_span(
        self, state: DraftState, span: int, rows: np.ndarray, offset: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Take each row's tokens at depth ``span``, up to its newest, one span deeper.

        Returns:
            (hidden, residual) of the newest tokens, ``[len(rows), hidden_size]`` each, their
            request slots and positions, ``[len(rows)]`` each.
        """
        device = self._first_pos.device
        # Depths never increase along a window, so tokens at this depth are its end.
        begin = (state.depths[rows, : offset + 1] > span).sum(axis=1)
        counts = offset + 1 - begin
        ends = np.cumsum(counts)
        token_rows = np.repeat(rows, counts)
        offsets = np.arange(ends[-1]) - np.repeat(ends - counts, counts) + np.repeat(begin, counts)

        rows_device = torch.from_numpy(token_rows).to(device)
        offsets_device = torch.from_numpy(offsets).to(device)
        slots_device = self._slots_device[rows_device]
        positions = self._first_pos[rows_device] + offsets_device
        if span == 0:
            hidden = self.staged.embed(state.tokens[rows_device, offsets_device].to(torch.int32))
            residual = None
        else:
            hidden, residual = self.deferred.gather(slots_device, offsets_device)
        hidden, residual = self.spans.run_span(
            span,
            slots=self._slots[rows],
            num_tokens=counts,
            seq_lens_upper=self._upper[rows] + offset + 1,
            positions=positions,
            hidden=hidden,
            residual=residual,
        )
        self.deferred.store(slots_device, offsets_device, hidden, residual)
        state.depths[token_rows, offsets] = span + 1
        newest = torch.from_numpy(ends - 1).to(device)
        return hidden[newest], residual[newest], slots_device[newest], positions[newest]
