"""Rounds whose draft loop is on the device: when the host waits for one, and when it need not.

Owns the queue of rounds that the host has not recorded yet, and moves each through its states
(round_states.py). In the order in which the model runner calls: `overlap` decides whether the next
batch verifies the last round before the host knows it; `plan` and `verify` do so; `propose` starts
the next round; `resolve` records rounds that have ended, and waits only for those whose windows or
draft tokens are needed. A round that drafts nothing is recorded whenever its copy has come.
"""

from collections import deque
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext

import numpy as np
import torch
from vllm.utils.torch_utils import async_tensor_h2d
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.utils import record_function_or_nullcontext
from vllm.v1.worker.gpu.input_batch import InputBatch

from vllm_adadecode.draft.device_loop import DeviceLoop, StepGraphs
from vllm_adadecode.draft.readback import RoundReadback
from vllm_adadecode.engine.context import DraftContext
from vllm_adadecode.engine.next_batch import NextBatch
from vllm_adadecode.engine.round_states import DraftRound, IllegalTransitionError, RoundState
from vllm_adadecode.kernels.draft_state import STOPPED
from vllm_adadecode.spans.ragged import CHECK_KV_BOUNDS
from vllm_adadecode.verify.overlapped_plan import MOST_TOKEN_SLOTS, OverlappedPlan
from vllm_adadecode.verify.passes import VerificationPasses

# Where there are several tensor-parallel ranks, a round is recorded when as many have come after
# it: by then its copy is there. The first look at it that finds it would be another one on each
# rank.
ROUNDS_LATE = 2


class DeviceRounds:
    """The speculator's rounds with the loop on the device.

    Args:
        passes: of verifications that overlap with drafting; None: the next batch always waits.
        num_ranks: of tensor parallelism.
        drafting: context of draft passes outside of `propose`.

    Attributes:
        most_token_slots: of a batch that verifies an overlapped round, padding among them.
    """

    most_token_slots = MOST_TOKEN_SLOTS

    def __init__(
        self,
        context: DraftContext,
        loop: DeviceLoop,
        passes: VerificationPasses | None = None,
        num_ranks: int = 1,
        drafting: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        self.context, self.loop, self.passes = context, loop, passes
        self.num_ranks, self.drafting = num_ranks, drafting
        self._unresolved: deque[DraftRound] = deque()
        self._last: DraftRound | None = None

    # --- a batch that verifies the last round ----------------------------------------------------

    def overlap(self, scheduler_output: SchedulerOutput) -> bool:
        """Whether the next batch verifies the last round before the host knows it; else that is
        resolved."""
        left = scheduler_output.finished_req_ids | (scheduler_output.preempted_req_ids or set())
        # One that has more of a prompt, as of a session, begins anew as well.
        anew = left | {request.req_id for request in scheduler_output.scheduled_new_reqs}
        for unresolved in self._unresolved:
            unresolved.left_out -= anew
        this = self._last
        if this is None or this.state is not RoundState.DRAFTING:
            self.resolve()
            return False
        req_ids = this.input_batch.req_ids
        decoding = dict.fromkeys(r for r, s in zip(req_ids, this.samples, strict=True) if s)
        batch = NextBatch.of(scheduler_output, decoding, set(req_ids) - decoding.keys())
        if batch is None or not self._may_overlap(this, batch):
            # Nobody needs the draft tokens of a round whose requests are all gone. One that may
            # have waited for requests took nobody knows how long.
            self._end_drafting(drop=decoding.keys() <= left, timed=batch is not None)
            self.resolve()
            return False
        this.move_to(RoundState.OVERLAPPED)
        this.left_out = set(batch.left_out)
        if batch.gone:
            self._stop_rows(this, batch.gone)
        return True

    def _may_overlap(self, this: DraftRound, batch: NextBatch) -> bool:
        assert self.passes is not None
        token_slots = sum(1 + this.caps[r] for r in batch.decoding)
        fits = token_slots <= min(self.most_token_slots, self.passes.most_tokens)
        return fits and (self.passes.padded.takes_prefill or not batch.prefills)

    def _stop_rows(self, this: DraftRound, req_ids: list[str]) -> None:
        """Have requests that are gone draft no more: their blocks may become others'."""
        assert this.run is not None
        rows, inputs = this.run.buffers.rows, this.run.buffers.inputs
        gone = np.array([*this.row_of(req_ids).values()])
        index = async_tensor_h2d(gone, device=rows.slots.device)
        # The next pass is laid out already.
        of_gone = (inputs.token_slots == rows.slots[index][:, None]).any(dim=0)
        inputs.token_slots.masked_fill_(of_gone, -1)
        inputs.slot_mapping.masked_fill_(of_gone, -1)
        rows.next_span.index_fill_(0, index, STOPPED)
        rows.slots.index_fill_(0, index, -1)

    def most_drafts(self, req_id: str) -> int:
        """Token slots for draft tokens of a request in a batch that overlaps."""
        return self._last_in(RoundState.OVERLAPPED).caps.get(req_id, 0)

    def plan(self, input_batch: InputBatch) -> OverlappedPlan:
        """How a batch, now prepared, verifies the round that it overlaps with."""
        this = self._last_in(RoundState.OVERLAPPED)
        assert this.run is not None
        decoding = np.flatnonzero(~input_batch.is_prefilling_np)
        rows = this.row_of(input_batch.req_ids[row] for row in decoding)
        plan = OverlappedPlan.of(input_batch, this.run, rows, self.context.temperature.device)
        # It ends with that batch, and its time would be the prompts', too.
        this.timed &= plan.prefill is None
        this.plan = plan
        this.move_to(RoundState.VERIFYING)
        return plan

    def verify(self, forward: Callable[[OverlappedPlan], torch.Tensor]) -> torch.Tensor:
        """Queue what is left of the round's steps, and its verification.

        Args:
            forward: the forward pass.
        """
        this = self._last_in(RoundState.VERIFYING)
        assert this.plan is not None
        self._finish(this)
        if this.left_out:
            self._hand_on(this, this.row_of(this.left_out))
        hidden = forward(this.plan)
        # After the batch, which the device should not wait for.
        self._read_back(this)
        return hidden

    def _last_in(self, state: RoundState) -> DraftRound:
        if self._last is None or self._last.state is not state:
            raise IllegalTransitionError(f"the last draft round is not {state.name}")
        return self._last

    # --- the next round --------------------------------------------------------------------------

    def propose(
        self,
        input_batch: InputBatch,
        # [>= num_reqs]
        num_sampled: torch.Tensor,
        # [max_num_reqs, 1]
        last_sampled: torch.Tensor,
        # [max_num_reqs]
        temperature: torch.Tensor,
        # [max_num_reqs]
        seeds: torch.Tensor,
        max_drafts: int,
        graphs: StepGraphs | None = None,
    ) -> torch.Tensor:
        """Draft for every request that sampled a token; the host waits for nothing.

        Args:
            graphs: captured steps that fit the thresholds.

        Returns:
            int64 ``[num_reqs, num_speculative_steps]``, as `AdaDecodeSpeculator.propose`; zeros
            for a round that may overlap with the next batch.
        """
        self.resolve(wait=self.passes is None)
        context, ledger, num_reqs = self.context, self.context.ledger, input_batch.num_reqs
        prefilled = input_batch.num_computed_prefill_tokens_np + input_batch.num_scheduled_tokens
        samples = prefilled >= input_batch.prefill_len_np
        caps, exits = self._allowed(input_batch, samples, max_drafts)
        last = self._last
        if last is not None and last.state not in (RoundState.READBACK, RoundState.RESOLVED):
            raise IllegalTransitionError(f"no round can start while the last is {last.state.name}")
        this = DraftRound(
            input_batch,
            num_sampled,
            samples,
            used_exits=exits,
            verified=ledger.in_verification,
            previous=last if last is not None and last.plan is not None else None,
        )
        ledger.in_verification = {}
        if not caps.any():
            # As quick as can be: this is every round where drafting does not pay.
            self._begin(this)
            ledger.keep_nothing(input_batch)
            self._read_back(this)
            return context.no_drafts(num_reqs)
        slots = input_batch.idx_mapping.to(torch.int64)
        first_pos = context.req_states.num_computed_tokens.gpu[slots].to(torch.int64)
        limits = self._limits(input_batch, num_sampled[:num_reqs], first_pos, caps)
        # vLLM's lie elsewhere in every other step: the loop's addresses must not change.
        context.temperature.copy_(temperature)
        context.seeds.copy_(seeds)
        with record_function_or_nullcontext("adadecode: draft loop"):
            this.run = self.loop.start(
                slots,
                first_pos,
                limits,
                last_sampled[slots].view(-1),
                thresholds=ledger.thresholds,
                num_exits=exits,
                max_drafts=int(caps.max()),
                heads=context.device_heads(),
                graphs=graphs,
            )
        this.caps = dict(zip(input_batch.req_ids, caps.tolist(), strict=True))
        self._begin(this)
        if CHECK_KV_BOUNDS:
            this.kv_capacity = self.loop.spans.spans.kv_capacity(input_batch.idx_mapping_np)
        if self.passes is not None:
            return context.no_drafts(num_reqs)
        self._finish(this)
        self._read_back(this)
        # A copy: vLLM may write to it.
        return this.run.buffers.rows.tokens[:num_reqs, 1:].clone()

    def _begin(self, this: DraftRound) -> None:
        # Not before its first step is queued: with async scheduling the next batch comes before an
        # error in that step is told, and must not hide it by one of its own.
        self._last = this
        self._unresolved.append(this)

    def _allowed(
        self,
        input_batch: InputBatch,
        # [num_reqs] bool
        samples: np.ndarray,
        max_drafts: int,
    ) -> tuple[np.ndarray, int]:
        """Most draft tokens of each request, and the exits that all use: as many as any of them."""
        ledger = self.context.ledger
        caps, exits = ledger.allowed(input_batch.req_ids, samples, max_drafts)
        caps[~samples] = 0
        drafting = exits[caps > 0]
        most = int(drafting.max(initial=0)) or ledger.thresholds.num_used_exits
        return caps, most

    def _limits(
        self,
        input_batch: InputBatch,
        # [num_reqs]
        num_sampled: torch.Tensor,
        # [num_reqs]
        first_pos: torch.Tensor,
        # [num_reqs]
        caps: np.ndarray,
    ) -> torch.Tensor:
        """Most draft tokens of each request, ``[num_reqs]`` on the device."""
        last_starts = self.context.ledger.last_starts(input_batch.idx_mapping_np)
        starts_and_caps = np.stack([last_starts, caps]).astype(np.int64)
        starts, most = async_tensor_h2d(starts_and_caps, device=first_pos.device)
        room = torch.minimum(starts - first_pos, most).clamp_(min=0)
        return room.masked_fill_(num_sampled <= 0, 0)

    # --- the end of a round ----------------------------------------------------------------------

    def _end_drafting(self, drop: bool = False, timed: bool = False) -> None:
        """The last round will be verified as the host knows it: end it, hand on its draft tokens.

        Args:
            drop: nobody will verify it: what has been queued of it is enough.
            timed: whether nothing else kept it from overlapping.
        """
        this = self._last
        if this is None or this.state is not RoundState.DRAFTING:
            return
        this.timed &= timed
        if not drop:
            self._finish(this)
        self._read_back(this)
        self._hand_on(this, this.row_of(this.input_batch.req_ids))

    def _finish(self, this: DraftRound) -> None:
        """Queue what is left of a round's steps."""
        assert this.run is not None
        with record_function_or_nullcontext("adadecode: draft loop"), self.drafting():
            this.run.finish()

    def _hand_on(self, this: DraftRound, rows: Mapping[str, int]) -> None:
        """Give vLLM the draft tokens of these requests, which `propose` has returned without."""
        assert this.run is not None
        of_round = np.array([*rows.values()])
        slots = this.input_batch.idx_mapping_np[of_round]
        places = np.stack([of_round, slots]).astype(np.int64)
        drafts = this.run.buffers.rows.tokens
        row, slot = async_tensor_h2d(places, device=drafts.device)
        self.context.req_states.draft_tokens[slot] = drafts[row, 1:]

    def _read_back(self, this: DraftRound) -> None:
        """Queue the copy of what comes of a round that is queued to its end."""
        this.move_to(RoundState.READBACK)
        buffers = this.run.buffers if this.run is not None else None
        num_reqs = this.input_batch.num_reqs
        this.readback = RoundReadback.start(num_reqs, buffers, this.num_sampled, this.used_exits)
        self.context.ledger.round_ended(this.input_batch, this.timed, this.plan is not None)

    @torch.inference_mode()
    def resolve(self, wait: bool = True, everything: bool = False) -> None:
        """Record rounds that have ended.

        Args:
            wait: for windows that are still to be verified, and rounds before them; the last round
                will not overlap.
            everything: wait for all others as well, of which there is nothing to use but counts.
        """
        if wait or everything:
            self._end_drafting()
        while self._unresolved:
            this = self._unresolved[0]
            if this.readback is None:
                return
            wanted = everything or (wait and any(r.is_awaited for r in self._unresolved))
            if not wanted and not self._is_due(this.readback):
                return
            self._record(self._unresolved.popleft(), this.readback)

    def _is_due(self, readback: RoundReadback) -> bool:
        """Whether the first unresolved round may be recorded, which nobody is in need of."""
        if self.num_ranks == 1:
            return readback.has_arrived()
        return len(self._unresolved) > ROUNDS_LATE

    def _record(self, this: DraftRound, readback: RoundReadback) -> None:
        input_batch, result, ledger = this.input_batch, readback.wait(), self.context.ledger
        this.move_to(RoundState.RESOLVED)
        if this.previous is not None:
            # Resolved before this one.
            this.verified, this.previous = this.previous.windows, None
        ledger.count_verified(input_batch, result.num_sampled, this.verified)
        if result.drafted is None:
            return
        if CHECK_KV_BOUNDS:
            lengths = result.first_pos + (result.drafted.state.depths > 0).sum(axis=1)
            assert this.kv_capacity is not None
            self.loop.spans.spans.check_kv_bounds(this.kv_capacity, lengths)
        ledger.count_drafted(result.drafted)
        found = input_batch, result.num_sampled, result.drafted
        if this.plan is None:
            ledger.keep_windows(*found)
            return
        # For the round whose batch has verified them.
        this.windows = ledger.windows_of(*found)
        for req_id in this.left_out & this.windows.keys():
            ledger.windows.put(req_id, this.windows.pop(req_id))
        this.plan.count(this.windows, ledger.spans, ledger.counters)
