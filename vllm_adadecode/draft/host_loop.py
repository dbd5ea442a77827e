"""The draft loop of one round on the host, for all drafting requests in step.

Owns the order of passes: span 0 for the newest token of every drafting request, then head by head;
a request that is confident takes the head's token as its next draft and waits for the others, one
that is not goes through the next span together with its shallower tokens (fill-in).
"""

from dataclasses import dataclass

import numpy as np
import torch
from vllm.v1.utils import record_function_or_nullcontext

from vllm_adadecode.heads.thresholds import ExitThresholds
from vllm_adadecode.kernels.confidence import top1_confidence
from vllm_adadecode.kernels.deferred import DeferredStates
from vllm_adadecode.metrics.counters import Counters, ExitCounters
from vllm_adadecode.model.draft_sampler import DraftSampler
from vllm_adadecode.model.fused_head import FusedHeads
from vllm_adadecode.model.target import StagedTarget
from vllm_adadecode.spans.ragged import RaggedSpans


@dataclass
class DraftState:
    """Windows under construction, by batch row.

    Attributes:
        tokens: int64 ``[num_reqs, 1 + max_drafts]`` on the device: last sampled token, drafts,
            zeros.
        num_drafts: ``[num_reqs]``.
        depths: ``[num_reqs, 1 + max_drafts]`` spans each token has been through.
        exits: ``[num_reqs, max_drafts]`` exit index whose head gave each draft.
    """

    tokens: torch.Tensor
    num_drafts: np.ndarray
    depths: np.ndarray
    exits: np.ndarray


@dataclass
class HostLoop:
    """One round's drafting; all collaborators are the speculator's.

    Attributes:
        sampler: draws draft tokens; None: the most likely ones.
        fused: heads by the fused kernels, which draw themselves; None: from stored logits.
    """

    staged: StagedTarget
    spans: RaggedSpans
    deferred: DeferredStates
    thresholds: ExitThresholds
    counters: Counters
    sampler: DraftSampler | None
    fused: FusedHeads | None = None

    def run(
        self,
        # [num_reqs] request slots
        slots: np.ndarray,
        # [num_reqs] int64, position of the last sampled token
        first_pos: torch.Tensor,
        # [num_reqs] int64
        last_sampled: torch.Tensor,
        # [num_reqs] most drafts for each request; 0: none
        limits: np.ndarray,
        # [num_reqs] exits that may give them, from the first
        used_exits: np.ndarray,
        max_drafts: int,
        # [num_reqs] upper bound of the verified length
        seq_lens_upper: np.ndarray,
    ) -> DraftState:
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
        for offset in range(max_drafts):
            rows = np.flatnonzero((limits > offset) & (state.num_drafts == offset))
            if rows.size == 0:
                break
            self._draft_next(state, rows, offset, used_exits)
        return state

    def _draft_next(
        self, state: DraftState, rows: np.ndarray, offset: int, used_exits: np.ndarray
    ) -> None:
        """Try to predict the token after window offset ``offset`` for ``rows``."""
        for exit_index in range(self.thresholds.num_used_exits):
            rows = rows[used_exits[rows] > exit_index]
            if rows.size == 0:
                return
            hidden, residual = self._run_span(state, exit_index, rows, offset)
            if not self.thresholds.uses(exit_index):
                continue
            if self.thresholds.uses_gate(exit_index):
                self._exit_counters(exit_index).gates_evaluated += len(rows)
            evaluate = self._head_stored if self.fused is None else self._head_fused
            with record_function_or_nullcontext(f"adadecode: head {exit_index + 1}"):
                evaluated, confident, tokens = evaluate(exit_index, rows, offset, hidden, residual)
            self._extend(state, exit_index, rows, offset, evaluated, confident, tokens)
            # The others, skipped by the gate or not, go deeper, or stop behind their last exit.
            rows = rows[~confident]
            rows = rows[used_exits[rows] > exit_index + 1]
            if rows.size == 0:
                return
            if exit_index + 1 < self.thresholds.num_used_exits:
                self._exit_counters(exit_index).next_exit += len(rows)

    def _head_fused(
        self,
        exit_index: int,
        rows: np.ndarray,
        offset: int,
        # [len(rows), hidden_size]
        hidden: torch.Tensor,
        # [len(rows), hidden_size]
        residual: torch.Tensor,
    ) -> tuple[np.ndarray, np.ndarray, torch.Tensor]:
        """Gate and head of every row, by the fused kernels.

        Returns:
            bool ``[len(rows)]`` each, whether a row's head was evaluated and whether its prediction
            is accepted, and int64 ``[len(rows)]`` tokens, of no meaning where it was not evaluated.
        """
        assert self.fused is not None
        rows_device = torch.from_numpy(rows).to(self._first_pos.device)
        check = self.fused.check(
            exit_index,
            hidden,
            residual,
            slots=self._slots_device[rows_device],
            positions=self._first_pos[rows_device] + offset,
            draft=offset,
            gate_threshold=self.thresholds.gate[exit_index],
        )
        confident = self._confident(exit_index, check.p)
        # The one host synchronisation of a head, with or without a gate.
        if check.live is None:
            return np.ones(len(rows), dtype=bool), confident.cpu().numpy(), check.token
        evaluated, accepted = torch.stack([check.live, confident & check.live]).cpu().numpy()
        return evaluated, accepted, check.token

    def _head_stored(
        self,
        exit_index: int,
        rows: np.ndarray,
        offset: int,
        hidden: torch.Tensor,
        residual: torch.Tensor,
    ) -> tuple[np.ndarray, np.ndarray, torch.Tensor]:
        """The same as `_head_fused` from stored logits, of the rows that pass the gate alone."""
        device = self._first_pos.device
        evaluated, confident = np.ones(len(rows), dtype=bool), np.zeros(len(rows), dtype=bool)
        threshold = self.thresholds.gate[exit_index]
        if threshold is not None:
            gate = self.staged.gate_probability(exit_index, hidden, residual)
            # The one host synchronisation of a gate: the rows for the LM head are picked out, so
            # that it never reads its weights for a row that it is not worth.
            evaluated = (gate > threshold).cpu().numpy()
        passed = np.flatnonzero(evaluated)
        tokens = torch.zeros(len(rows), dtype=torch.int64, device=device)
        if passed.size == 0:
            return evaluated, confident, tokens
        index = torch.from_numpy(passed).to(device)
        if len(passed) < len(rows):
            hidden, residual = hidden[index], residual[index]
        if self.sampler is None:
            tokens[index], p = self.staged.head_top1(exit_index, hidden, residual)
        else:
            rows_device = torch.from_numpy(rows[passed]).to(device)
            logits, other = self.staged.head_logits(exit_index, hidden, residual)
            _, p = top1_confidence(logits, other)
            # Drawn from the head's distribution; whether it is accepted depends on that
            # distribution alone (see thresholds.py).
            tokens[index] = self.sampler.sample(
                self.staged.projection.over_all_tokens(logits),
                self._slots_device[rows_device],
                self._first_pos[rows_device] + offset,
                offset,
            )
        # The one host synchronisation of a head.
        confident[passed] = self._confident(exit_index, p).cpu().numpy()
        return evaluated, confident, tokens

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
        evaluated: np.ndarray,
        # [len(rows)] bool
        confident: np.ndarray,
        # [len(rows)] int64
        tokens: torch.Tensor,
    ) -> None:
        """Give the confident ones of ``rows`` their next draft, and count."""
        counters = self._exit_counters(exit_index)
        checked = int(evaluated.sum())
        counters.heads_evaluated += checked
        counters.head_batches += checked > 0
        counters.draft_tokens += int(confident.sum())
        if confident.any():
            chosen = torch.from_numpy(np.flatnonzero(confident)).to(tokens.device)
            rows_device = torch.from_numpy(rows[confident]).to(tokens.device)
            state.tokens[rows_device, offset + 1] = tokens[chosen]
            state.num_drafts[rows[confident]] += 1
            state.exits[rows[confident], offset] = exit_index

    def _exit_counters(self, exit_index: int) -> ExitCounters:
        return self.counters.exits[self.staged.exit_layers[exit_index]]

    def _run_span(
        self, state: DraftState, span: int, rows: np.ndarray, offset: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Take each row's tokens at depth ``span``, up to its newest, one span deeper.

        Returns:
            (hidden, residual) of the newest tokens, ``[len(rows), hidden_size]`` each.
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
        if span == 0:
            hidden = self.staged.embed(state.tokens[rows_device, offsets_device].to(torch.int32))
            residual = None
        else:
            hidden, residual = self.deferred.gather(slots_device, offsets_device)
        hidden, residual = self.spans.run(
            span,
            slots=self._slots[rows],
            num_tokens=counts,
            seq_lens_upper=self._upper[rows] + offset + 1,
            positions=self._first_pos[rows_device] + offsets_device,
            hidden=hidden,
            residual=residual,
        )
        self.deferred.store(slots_device, offsets_device, hidden, residual)
        state.depths[token_rows, offsets] = span + 1
        start, stop = self.staged.spans[span]
        self.counters.draft_layers += stop - start
        self.counters.draft_token_layers += (stop - start) * len(token_rows)

        newest = torch.from_numpy(ends - 1).to(device)
        return hidden[newest], residual[newest]
