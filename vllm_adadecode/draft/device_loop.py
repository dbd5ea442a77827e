"""The draft loop on the device: the passes and decisions of host_loop.py, with fixed shapes.

Owns the order of passes. A step is a span, its head and the kernel that follows. Nothing in a step
depends on data: the same calls with the same shapes and addresses for every round of a padded batch
size, so that it can be queued without waiting for the device, or captured in a graph (graphs.py). A
row that has no part in a step is padding in it.

After each step the host polls which is needed next, if any (status_poll.py); it may do something
else between the first step and the others (`DraftRun`).
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from vllm.v1.utils import record_function_or_nullcontext

from vllm_adadecode.draft.buffers import LoopBuffers, padded_size
from vllm_adadecode.draft.head_evaluation import Heads
from vllm_adadecode.draft.status_poll import StatusPoll
from vllm_adadecode.heads.thresholds import ExitThresholds
from vllm_adadecode.kernels.deferred import DeferredStates
from vllm_adadecode.kernels.draft_step import draft_step
from vllm_adadecode.kernels.head_results import record_head_results
from vllm_adadecode.model.target import StagedTarget
from vllm_adadecode.spans.padded import PaddedSpans


class StepGraphs(Protocol):
    """Captured steps, as `DraftGraphs` has them."""

    def replay_step(self, num_rows: int, offset: int, exit_index: int) -> bool:
        """Run the step that tries to predict the token after window offset ``offset``.

        Returns:
            False if it is not captured.
        """
        ...


class DeviceLoop:
    """Drafts with buffers of its own; one round is `start` and `DraftRun.finish`.

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

    def start(
        self,
        # [n] int64 request slots, on the device as the next three
        slots: torch.Tensor,
        # [n] int64, position of the last sampled token
        first_pos: torch.Tensor,
        # [n] most draft tokens of each request; 0: none
        limits: torch.Tensor,
        # [n] int64
        last_sampled: torch.Tensor,
        *,
        thresholds: ExitThresholds,
        num_exits: int,
        max_drafts: int,
        heads: Heads,
        graphs: StepGraphs | None = None,
    ) -> "DraftRun":
        """Load a round's requests and queue its first step.

        Args:
            num_exits: so many of the used exits may be. A row that waits for another has stopped.
            max_drafts: no limit is above it.
            heads: must leave all that is read on the device.
            graphs: run in place of steps where they have them.
        """
        buffers = self._first(padded_size(len(slots), self.max_num_rows), thresholds, num_exits)
        buffers.rows.load(slots, first_pos, limits, last_sampled)
        torch._foreach_zero_([buffers.heads_evaluated, buffers.head_batches, buffers.span_passes])
        self.spans.begin(slots, len(buffers.rows.slots))
        return DraftRun(Steps(self, buffers, thresholds, heads), max_drafts, graphs)

    def idle(self, num_rows: int, thresholds: ExitThresholds) -> LoopBuffers:
        """The buffers of a round without requests: steps on them change nothing that is kept."""
        buffers = self._first(num_rows, thresholds, thresholds.num_used_exits)
        nothing = buffers.rows.first_pos[:0]
        buffers.rows.load(nothing, nothing, nothing, nothing)
        return buffers

    def _first(self, num_rows: int, thresholds: ExitThresholds, num_exits: int) -> LoopBuffers:
        self._load(thresholds)
        buffers = self.buffers.first(num_rows, thresholds.num_used_exits)
        buffers.status.allowed.fill_(num_exits)
        return buffers

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

    def warm_up(self) -> None:
        """Compile the kernels between passes for every batch size; between rounds only."""
        sizes = {padded_size(n, self.max_num_rows) for n in range(1, 1 + self.max_num_rows)}
        for num_rows in sorted(sizes):
            buffers = self.buffers.first(num_rows, 1)
            self.step(buffers, exit_index=None, next_span=0)
            nobody = torch.zeros_like(buffers.confident)
            self.accept(buffers, torch.zeros_like(buffers.token), nobody.float(), nobody, 0)

    def step(
        self,
        buffers: LoopBuffers,
        *,
        exit_index: int | None,
        next_span: int,
        **answers: torch.Tensor,
    ) -> None:
        """The kernel between two passes: see `draft_step`."""
        draft_step(
            buffers.rows,
            buffers.inputs,
            self.spans.blocks,
            buffers.status,
            exit_index=exit_index,
            next_span=next_span,
            **answers,
        )

    def accept(
        self,
        buffers: LoopBuffers,
        # [num_rows] int64
        token: torch.Tensor,
        # [num_rows] float32
        p: torch.Tensor,
        # [num_rows] bool, rows whose head was evaluated
        live: torch.Tensor,
        exit_index: int,
    ) -> None:
        """Which predictions are accepted, by their confidences ``p``, into the round's buffers."""
        record_head_results(
            token,
            p,
            live,
            exit_index,
            thresholds=buffers.accept_above,
            token_out=buffers.token,
            confident=buffers.confident,
            heads_evaluated=buffers.heads_evaluated,
            head_batches=buffers.head_batches,
        )


@dataclass(frozen=True)
class Steps:
    """The steps of one round."""

    loop: DeviceLoop
    buffers: LoopBuffers
    thresholds: ExitThresholds
    heads: Heads

    def run_step(self, row_tokens: int, exit_index: int) -> None:
        """Span and head at this exit for the newest token of each row that waits for it.

        Args:
            row_tokens: most pending tokens of such a row.
        """
        buffers = self.buffers
        if exit_index == 0:
            # The last step that ran laid out another span's pass, or none.
            self.loop.step(buffers, exit_index=None, next_span=0)
        hidden, residual = self._run_span(row_tokens, exit_index)
        if self.thresholds.uses(exit_index):
            with record_function_or_nullcontext(f"adadecode: head {exit_index + 1}"):
                self._evaluate(exit_index, hidden, residual)
        else:
            buffers.confident.zero_()
        is_last = exit_index + 1 == len(buffers.rows.counts)
        self.loop.step(
            buffers,
            exit_index=exit_index,
            next_span=0 if is_last else exit_index + 1,
            token=buffers.token,
            confident=buffers.confident,
        )

    def _run_span(self, row_tokens: int, span: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Take each waiting row's tokens at depth ``span`` one span deeper.

        Returns:
            (hidden, residual) of the newest tokens, ``[num_rows, hidden_size]`` each; of rows that
            are not in the pass, another's.
        """
        loop, inputs = self.loop, self.buffers.inputs
        if span == 0:
            # Only the newest token has not been through it.
            row_tokens = 1
        num_tokens = len(inputs.seq_lens) * row_tokens
        slots, offsets = inputs.token_slots[:num_tokens], inputs.offsets[:num_tokens]
        residual: torch.Tensor | None
        if span == 0:
            hidden, residual = loop.staged.embed(inputs.input_ids[:num_tokens]), None
        else:
            out = self.buffers.hidden[:num_tokens], self.buffers.residual[:num_tokens]
            for states in out:
                # Spans work in place: padding would be the states of earlier passes.
                states.zero_()
            hidden, residual = loop.deferred.gather(slots, offsets, out=out)
        hidden, residual = loop.spans.run_span(span, inputs, row_tokens, hidden, residual)
        loop.deferred.store(slots, offsets, hidden, residual)
        self.buffers.span_passes[span].add_(1)
        newest = inputs.newest.clamp(min=0)
        return hidden[newest], residual[newest]

    def _evaluate(
        self,
        exit_index: int,
        # [num_rows, hidden_size]
        hidden: torch.Tensor,
        # [num_rows, hidden_size]
        residual: torch.Tensor,
    ) -> None:
        """Gate and head of the rows in the pass, into ``token`` and ``confident``."""
        buffers, rows = self.buffers, self.buffers.rows
        in_pass = rows.next_span == exit_index
        uses_gate = self.thresholds.uses_gate(exit_index)
        check = self.heads.check(
            exit_index,
            hidden,
            residual,
            # A row that is not in the pass has logits cached that verification divides by.
            slots=torch.where(in_pass, rows.slots, -1),
            positions=rows.first_pos + rows.num_drafts,
            draft=buffers.status.offset,
            gate_threshold=buffers.gate_above[exit_index] if uses_gate else None,
            in_pass=in_pass,
        )
        assert check.live is not None
        self.loop.accept(buffers, check.token, check.p, check.live, exit_index)


class DraftRun:
    """A round's drafting under way: `DeviceLoop.start` says what the arguments are."""

    def __init__(self, steps: Steps, max_drafts: int, graphs: StepGraphs | None) -> None:
        self._steps, self._max_drafts, self._graphs = steps, max_drafts, graphs
        # Of the last step: window offset and exit.
        self._at = 0, 0
        # Whoever starts a round knows of a request that may draft.
        self._run(0, 0)

    @property
    def buffers(self) -> LoopBuffers:
        return self._steps.buffers

    def finish(self) -> None:
        """Queue all other steps, as many as are needed; to be called once."""
        while (following := self._next()) is not None:
            self._run(*following)

    def pending(self) -> list[int]:
        """Tokens that a verification runs in each span, after `finish`."""
        return self._steps.loop.poll.pending()

    def _next(self) -> tuple[int, int] | None:
        (offset, exit_index), waits = self._at, self._steps.loop.poll.waits
        if exit_index + 1 < len(self.buffers.rows.counts) and waits(exit_index + 1):
            return offset, exit_index + 1
        if offset + 1 < self._max_drafts and waits(0):
            return offset + 1, 0
        return None

    def _run(self, offset: int, exit_index: int) -> None:
        num_rows = len(self.buffers.rows.slots)
        if self._graphs is None or not self._graphs.replay_step(num_rows, offset, exit_index):
            self._steps.run_step(1 + offset, exit_index)
        self._at = offset, exit_index
        self._steps.loop.poll.stepped(self.buffers.status)
