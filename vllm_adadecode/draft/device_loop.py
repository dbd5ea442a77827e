"""The draft loop on the device: the passes and decisions of draft_loop.py, with fixed shapes.

Owns the order of passes. Nothing here depends on data: the same calls with the same
shapes and addresses for every round of a padded batch size, so that a round can be queued without
waiting for the device, or captured in a graph. A row that has no part in a pass is padding in it.

Requests go in step as in host_loop.py. A step (`Steps.run`) is a span, its head and the kernel that
follows, and may be captured by itself. After each one the host polls which is needed next, if any
(status_poll.py); it may do something else between the first step and the others (`Drafting`).
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from vllm.v1.utils import record_function_or_nullcontext

from vllm_adadecode.draft.buffers import LoopBuffers, padded_size
from vllm_adadecode.draft.status_poll import StatusPoll
from vllm_adadecode.heads.thresholds import ExitThresholds
from vllm_adadecode.kernels.confidence import top1_confidence
from vllm_adadecode.kernels.deferred import DeferredStates
from vllm_adadecode.kernels.draft_step import draft_step
from vllm_adadecode.kernels.head_results import record_head_results
from vllm_adadecode.model.draft_sampler import DraftSampler
from vllm_adadecode.model.fused_head import FusedHeads
from vllm_adadecode.model.target import StagedTarget
from vllm_adadecode.spans.padded import PaddedSpans

if TYPE_CHECKING:
    from vllm_adadecode.draft.graphs import DraftGraphs


class DeviceLoop:
    """Drafts with buffers of its own; one round is `begin`, `start`, and `Drafting.finish`.

    Args:
        buffers: for the largest batch.
        poll: what the host knows after each step.
    """

    def __init__(
        self,
        staged: StagedTarget,
        spans: PaddedSpans,
        deferred: DeferredStates,
        buffers: LoopBuffers,
        poll: StatusPoll,
    ) -> None:
        self.staged, self.spans, self.deferred = staged, spans, deferred
        self.buffers, self.poll = buffers, poll
        self.max_num_rows = len(buffers.rows.slots)
        self._loaded: ExitThresholds | None = None

    def begin(
        self,
        # [n] int64 request slots
        slots: torch.Tensor,
        # [n] int64, position of the last sampled token
        first_pos: torch.Tensor,
        # [n] most drafts for each request; 0: none
        limits: torch.Tensor,
        # [n] int64
        last_sampled: torch.Tensor,
        thresholds: ExitThresholds,
        num_exits: int,
    ) -> LoopBuffers:
        """Load a round's requests, all of these on the device; the buffers of their batch size.

        Args:
            num_exits: so many of the used exits may be. A row that waits for another has
                stopped.
        """
        num_rows = padded_size(len(slots), self.max_num_rows)
        round_ = self._first(num_rows, thresholds, num_exits)
        round_.rows.load(slots, first_pos, limits, last_sampled)
        torch._foreach_zero_([round_.checked, round_.asked, round_.passes])
        self.spans.begin(slots, len(round_.rows.slots))
        return round_

    def idle(self, num_rows: int, thresholds: ExitThresholds) -> LoopBuffers:
        """The buffers of a round without requests: steps on them change nothing that is kept."""
        round_ = self._first(num_rows, thresholds, thresholds.num_used_exits)
        nothing = round_.rows.first_pos[:0]
        round_.rows.load(nothing, nothing, nothing, nothing)
        return round_

    def _first(self, num_rows: int, thresholds: ExitThresholds, num_exits: int) -> LoopBuffers:
        self._load(thresholds)
        round_ = self.buffers.first(num_rows, thresholds.num_used_exits)
        round_.status.allowed.fill_(num_exits)
        return round_

    def _load(self, thresholds: ExitThresholds) -> None:
        # Others come with costs that are measured at start, or in tests: not in every round.
        if thresholds is self._loaded:
            return
        self._loaded = thresholds
        for buffer, values in (
            (self.buffers.accept_above, thresholds.confidence),
            (self.buffers.gate_above, thresholds.gate),
        ):
            # Nothing is compared with those that are None.
            buffer[: len(values)] = torch.tensor([0.0 if v is None else v for v in values])

    def rehearse(self) -> None:
        """Compile the kernels between passes for every batch size; between rounds only."""
        sizes = {padded_size(n, self.max_num_rows) for n in range(1, 1 + self.max_num_rows)}
        for num_rows in sorted(sizes):
            round_ = self.buffers.first(num_rows, 1)
            self.step(round_, exit_index=None, next_span=0)
            nobody = torch.zeros_like(round_.confident)
            _note(round_, torch.zeros_like(round_.token), nobody.float(), nobody, 0)

    def step(
        self,
        round_: LoopBuffers,
        *,
        exit_index: int | None,
        next_span: int,
        **answers: torch.Tensor,
    ) -> None:
        """The kernel between two passes: see `draft_step`."""
        draft_step(
            round_.rows,
            round_.inputs,
            self.spans.blocks,
            round_.status,
            exit_index=exit_index,
            next_span=next_span,
            **answers,
        )

    def start(
        self,
        round_: LoopBuffers,
        thresholds: ExitThresholds,
        max_drafts: int,
        sampler: DraftSampler | None,
        fused: FusedHeads | None,
        captured: "DraftGraphs | None" = None,
    ) -> "Drafting":
        """Queue the first step of a round.

        Args:
            round_: from `begin`; updated.
            thresholds: those of `begin`.
            max_drafts: no limit is above it.
            sampler: draws draft tokens; None: the most likely ones.
            fused: heads by the fused kernels; None: from stored logits.
            captured: graphs that run in place of a step where they have it.
        """
        steps = Steps(self, round_, thresholds, sampler, fused, self.poll)
        return Drafting(self, round_, max_drafts, steps, captured)


class Drafting:
    """A round that has been started: by `DeviceLoop.start`, which says what the arguments are."""

    def __init__(
        self,
        loop: DeviceLoop,
        round_: LoopBuffers,
        max_drafts: int,
        steps: "Steps",
        captured: "DraftGraphs | None",
    ) -> None:
        self.round_ = round_
        self._loop, self._max_drafts, self._captured = loop, max_drafts, captured
        self._num_exits = len(round_.rows.counts)
        self._steps: Steps | None = steps
        # Of the last step: window offset and exit.
        self._at = 0, 0
        # Whoever begins a round knows of a request that may draft.
        self._run(0, 0)

    def finish(self) -> None:
        """Queue all other steps, as many as are needed; to be called once."""
        while (following := self._next()) is not None:
            self._run(*following)
        self._steps = None

    def pending(self) -> list[int]:
        """Tokens that a verification runs in each span, after `finish`."""
        return self._loop.poll.pending()

    def _next(self) -> tuple[int, int] | None:
        (offset, exit_index), waits = self._at, self._loop.poll.waits
        if exit_index + 1 < self._num_exits and waits(exit_index + 1):
            return offset, exit_index + 1
        if offset + 1 < self._max_drafts and waits(0):
            return offset + 1, 0
        return None

    def _run(self, offset: int, exit_index: int) -> None:
        assert self._steps is not None
        place = len(self.round_.rows.slots), offset, exit_index
        if self._captured is None or not self._captured.replay_step(*place):
            self._steps.run(1 + offset, exit_index)
        self._at = offset, exit_index
        self._loop.poll.stepped(self.round_.status)


@dataclass(frozen=True)
class Steps:
    """The steps of one round: what runs between two polls, the same whatever the data.

    Attributes:
        poll: leaves out heads that no row needs; None while a graph is captured: all of them run.
    """

    loop: DeviceLoop
    round_: LoopBuffers
    thresholds: ExitThresholds
    sampler: DraftSampler | None
    fused: FusedHeads | None
    poll: StatusPoll | None = None

    def run(self, row_tokens: int, exit_index: int) -> None:
        """Span and head at this exit for the newest token of each row that waits for it.

        Args:
            row_tokens: most pending tokens of such a row.
        """
        round_ = self.round_
        if exit_index == 0:
            # The last step that ran laid out another span's pass, or none.
            self.loop.step(round_, exit_index=None, next_span=0)
        hidden, residual = self._run_span(row_tokens, exit_index)
        if self.thresholds.uses(exit_index):
            with record_function_or_nullcontext(f"adadecode: head {exit_index + 1}"):
                self._ask(exit_index, hidden, residual)
        else:
            round_.confident.zero_()
        is_last = exit_index + 1 == len(round_.rows.counts)
        self.loop.step(
            round_,
            exit_index=exit_index,
            next_span=0 if is_last else exit_index + 1,
            token=round_.token,
            confident=round_.confident,
        )

    def _run_span(self, row_tokens: int, span: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Take each waiting row's tokens at depth ``span`` one span deeper.

        Returns:
            (hidden, residual) of the newest tokens, ``[num_rows, hidden_size]`` each; of rows that
            are not in the pass, another's.
        """
        loop, inputs = self.loop, self.round_.inputs
        if span == 0:
            # Only the newest token has not been through it.
            row_tokens = 1
        num_tokens = len(inputs.seq_lens) * row_tokens
        slots, offsets = inputs.token_slots[:num_tokens], inputs.offsets[:num_tokens]
        residual: torch.Tensor | None
        if span == 0:
            hidden, residual = loop.staged.embed(inputs.input_ids[:num_tokens]), None
        else:
            out = self.round_.hidden[:num_tokens], self.round_.residual[:num_tokens]
            for states in out:
                # Spans work in place: padding would be the states of earlier passes.
                states.zero_()
            hidden, residual = loop.deferred.gather(slots, offsets, out=out)
        hidden, residual = loop.spans.run(span, inputs, row_tokens, hidden, residual)
        loop.deferred.store(slots, offsets, hidden, residual)
        self.round_.passes[span].add_(1)
        newest = inputs.newest.clamp(min=0)
        return hidden[newest], residual[newest]

    def _gate_threshold(self, exit_index: int) -> torch.Tensor | None:
        """What a gate's probability is compared with, on the device; None: the gate is left out."""
        uses_gate = self.thresholds.uses_gate(exit_index)
        return self.round_.gate_above[exit_index] if uses_gate else None

    def _ask(
        self,
        exit_index: int,
        # [num_rows, hidden_size]
        hidden: torch.Tensor,
        # [num_rows, hidden_size]
        residual: torch.Tensor,
    ) -> None:
        """Gate and head of the rows in the pass, into ``token`` and ``confident``."""
        in_pass = self.round_.rows.next_span == exit_index
        ask = self._ask_stored if self.fused is None else self._ask_fused
        ask(exit_index, hidden, residual, in_pass)

    def _ask_fused(
        self,
        exit_index: int,
        hidden: torch.Tensor,
        residual: torch.Tensor,
        # [num_rows] bool
        in_pass: torch.Tensor,
    ) -> None:
        assert self.fused is not None
        round_ = self.round_
        rows = round_.rows
        check = self.fused.check(
            exit_index,
            hidden,
            residual,
            # A row that is not in the pass has logits cached that verification divides by.
            slots=torch.where(in_pass, rows.slots, -1),
            positions=rows.first_pos + rows.num_drafts,
            draft=round_.status.offset,
            gate_threshold=self._gate_threshold(exit_index),
            in_pass=in_pass,
        )
        assert check.live is not None
        self._follow(exit_index, check.token, check.p, check.live)

    def _ask_stored(
        self,
        exit_index: int,
        hidden: torch.Tensor,
        residual: torch.Tensor,
        in_pass: torch.Tensor,
    ) -> None:
        threshold = self._gate_threshold(exit_index)
        if threshold is None:
            self._head(exit_index, hidden, residual, in_pass)
            return
        # The head may be left out.
        self.round_.confident.zero_()
        p = self.loop.staged.gate_probability(exit_index, hidden, residual)
        live = (p > threshold) & in_pass
        if self.poll is None or self.poll.any(live):
            self._head(exit_index, hidden, residual, live)

    def _head(
        self,
        exit_index: int,
        hidden: torch.Tensor,
        residual: torch.Tensor,
        # [num_rows] bool
        live: torch.Tensor,
    ) -> None:
        """The head from stored logits, of all rows."""
        staged, rows = self.loop.staged, self.round_.rows
        if self.sampler is None:
            token, p = staged.head_top1(exit_index, hidden, residual)
        else:
            logits, other = staged.head_logits(exit_index, hidden, residual)
            _, p = top1_confidence(logits, other)
            token = self.sampler.sample(
                staged.projection.over_all_tokens(logits),
                torch.where(live, rows.slots, -1),
                rows.first_pos + rows.num_drafts,
                self.round_.status.offset,
            )
        self._follow(exit_index, token, p, live)

    def _follow(
        self, exit_index: int, token: torch.Tensor, p: torch.Tensor, live: torch.Tensor
    ) -> None:
        _note(self.round_, token, p, live, exit_index)


def _note(
    round_: LoopBuffers,
    # [num_rows] int64
    token: torch.Tensor,
    # [num_rows] float32
    p: torch.Tensor,
    # [num_rows] bool, rows whose head was asked
    live: torch.Tensor,
    exit_index: int,
) -> None:
    """A head's answers, into the round's buffers."""
    record_head_results(
        token,
        p,
        live,
        exit_index,
        thresholds=round_.accept_above,
        token_out=round_.token,
        confident=round_.confident,
        heads_evaluated=round_.checked,
        head_batches=round_.asked,
    )
