"""A round's drafting on the device: what is given to the loop, and what comes back, late.

Owns the device's half of `propose` (limits, the copy of all that the host needs) and the host's
half, `settle`, which waits for that copy and books it: windows, drafts, counters. Whoever is about
to use these settles first; until then the host has nothing to wait for. A round that drafts nothing
leaves nothing to wait for at all: it is booked whenever its copy has come.

With async scheduling a round stays open when `propose` returns: its first step is queued, and the
host prepares the next batch while that runs. If that batch may verify it unseen (open_round.py),
the other steps are queued just before its forward pass, and the host never waits for the windows
that it verifies. Otherwise the round is settled before the batch is prepared.
"""

from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Self

import numpy as np
import torch
from vllm.utils.torch_utils import async_tensor_h2d
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.utils import record_function_or_nullcontext
from vllm.v1.worker.gpu.input_batch import InputBatch
from vllm.v1.worker.workspace import use_workspace_lane

from vllm_adadecode.draft.buffers import LoopBuffers
from vllm_adadecode.draft.device_loop import DeviceLoop, Drafting
from vllm_adadecode.draft.readback import RoundReadback, RoundResult
from vllm_adadecode.draft.status_poll import StatusPoll
from vllm_adadecode.draft.windows import PendingWindow
from vllm_adadecode.kernels.draft_state import STOPPED
from vllm_adadecode.spans.padded import PaddedSpans
from vllm_adadecode.spans.ragged import CHECK_KV_BOUNDS
from vllm_adadecode.verify.overlapped_plan import MOST_PLACES, NextBatch, OpenPlan

if TYPE_CHECKING:
    from vllm_adadecode.engine.speculator import AdaDecodeSpeculator


@dataclass
class _Round:
    """A round that is not booked yet.

    Attributes:
        input_batch: that was verified before it.
        verified: windows that this verified, by request.
        num_sampled: ``[>= num_reqs]`` that it sampled.
        used_exits: that the round might use.
        timed: whether its requests did as adaptive draft length said.
        samples: whether each of its requests has a window: it is not in the midst of its prompt.
        drafting: its steps; None: it drafted nothing.
        caps: most drafts of each request.
        copy: of what came of it; None as long as not all of its steps are queued.
        verifies: the round that its batch verified, if that was open.
        verified_as: how the next batch verified it, if that did so while it was open.
        left_out: its requests that go on, but that this batch left out.
        windows: its own, once it is booked, if it was verified while it was open.
        kv_capacity: tokens that its requests had blocks for, if that is checked.
    """

    input_batch: InputBatch
    verified: dict[str, PendingWindow]
    num_sampled: torch.Tensor
    used_exits: int
    timed: bool
    # [num_reqs] bool
    samples: np.ndarray
    drafting: Drafting | None = None
    caps: dict[str, int] = field(default_factory=dict)
    copy: RoundReadback | None = None
    verifies: "_Round | None" = None
    verified_as: OpenPlan | None = None
    left_out: set[str] = field(default_factory=set)
    windows: dict[str, PendingWindow] = field(default_factory=dict)
    kv_capacity: np.ndarray | None = None

    @property
    def has_windows(self) -> bool:
        """Whether somebody is to verify its windows as the host knows them."""
        return self.drafting is not None and (self.verified_as is None or bool(self.left_out))

    def row_of(self, req_ids: Iterable[str]) -> dict[str, int]:
        """Rows of these requests of the round."""
        rows = {req_id: row for row, req_id in enumerate(self.input_batch.req_ids)}
        return {req_id: rows[req_id] for req_id in req_ids}


# Where there are several tensor-parallel ranks, a round is booked when as many have come after it:
# by then its copy is there. The first look at it that finds it would be another one on each rank.
ROUNDS_LATE = 2


class DeviceRounds:
    """The speculator's rounds with the loop on the device.

    Args:
        speculator: its deferred states, thresholds, heads and records are used.
        keeps_open: whether rounds may stay open; drafts are then not known when `propose` returns.
        num_ranks: of tensor parallelism.

    Attributes:
        most_places: of a batch that verifies an open round, vacant ones among them.
    """

    most_places = MOST_PLACES

    def __init__(
        self,
        speculator: "AdaDecodeSpeculator",
        loop: DeviceLoop,
        keeps_open: bool = False,
        num_ranks: int = 1,
    ) -> None:
        self.speculator, self.loop = speculator, loop
        self.keeps_open, self.num_ranks = keeps_open, num_ranks
        self._unsettled: deque[_Round] = deque()
        # The last round, as long as nothing says how it will be verified.
        self._open: _Round | None = None
        # The open round that the batch under way verifies.
        self._verifying: _Round | None = None

    @classmethod
    def make(
        cls, speculator: "AdaDecodeSpeculator", states: tuple[torch.Tensor, torch.Tensor]
    ) -> Self:
        """With buffers for the largest batch; see `PaddedSpans` for what is refused.

        Args:
            states: from `pass_states`.
        """
        buffers = LoopBuffers.empty(
            speculator.max_num_reqs,
            speculator.num_speculative_steps,
            len(speculator.model.exit_layers),
            speculator.block_tables.num_kv_cache_groups,
            states,
        )
        spans = PaddedSpans(speculator.spans, speculator.max_model_len)
        loop = DeviceLoop(speculator.model, spans, speculator.deferred, buffers, StatusPoll())
        config = speculator.vllm_config
        return cls(
            speculator,
            loop,
            keeps_open=bool(config.scheduler_config.async_scheduling),
            num_ranks=config.parallel_config.tensor_parallel_size,
        )

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
        num_speculative_tokens: int | None,
    ) -> torch.Tensor:
        """Draft for every request that sampled a token; the host waits for nothing.

        Returns:
            int64 ``[num_reqs, num_speculative_steps]``, as `AdaDecodeSpeculator.propose`; zeros
            for a round that stays open.
        """
        self.settle(wait=not self.keeps_open)
        speculator, num_reqs = self.speculator, input_batch.num_reqs
        thresholds, max_drafts = speculator.thresholds, speculator.num_speculative_steps
        if num_speculative_tokens is not None:
            max_drafts = min(max_drafts, num_speculative_tokens)
        prefilled = input_batch.num_computed_prefill_tokens_np + input_batch.num_scheduled_tokens
        samples = prefilled >= input_batch.prefill_len_np
        caps, exits, is_even = self._allowed(input_batch, samples, max_drafts)
        verified, speculator.in_verification = speculator.in_verification, {}
        this = _Round(
            input_batch,
            verified,
            num_sampled,
            exits,
            timed=is_even,
            samples=samples,
        )
        this.verifies, self._verifying = self._verifying, None
        self._unsettled.append(this)
        if not caps.any():
            # As quick as can be: this is every round where drafting does not pay.
            speculator.last_req_ids = list(input_batch.req_ids)
            speculator.last_drafts = [[]] * num_reqs
            self._end(this)
            return speculator.no_drafts(num_reqs)
        slots = input_batch.idx_mapping.to(torch.int64)
        first_pos = speculator.req_states.num_computed_tokens.gpu[slots].to(torch.int64)
        limits = self._limits(input_batch, num_sampled[:num_reqs], first_pos, caps)
        last = last_sampled[slots].view(-1)
        # vLLM's lie elsewhere in every other step: the loop's addresses must not change.
        speculator.temperature.copy_(temperature)
        speculator.seeds.copy_(seeds)
        heads = speculator.heads(speculator.temperature, speculator.seeds)
        round_ = self.loop.begin(slots, first_pos, limits, last, thresholds, exits)
        graphs = speculator.draft_graphs
        captured = graphs if graphs is not None and graphs.fits(thresholds) else None
        with record_function_or_nullcontext("adadecode: draft loop"):
            this.drafting = self.loop.start(round_, thresholds, int(caps.max()), *heads, captured)
        this.caps = dict(zip(input_batch.req_ids, caps.tolist(), strict=True))
        if CHECK_KV_BOUNDS:
            this.kv_capacity = speculator.spans.kv_capacity(input_batch.idx_mapping_np)
        if self.keeps_open:
            self._open = this
            return speculator.no_drafts(num_reqs)
        self._finish(this)
        self._end(this)
        # A copy: vLLM may write to it.
        return round_.rows.tokens[:num_reqs, 1:].clone()

    def _finish(self, this: _Round) -> None:
        """Queue what is left of a round's steps."""
        if this.drafting is not None:
            with (
                record_function_or_nullcontext("adadecode: draft loop"),
                use_workspace_lane(self.speculator.workspace_lane),
            ):
                this.drafting.finish()

    def _end(self, this: _Round) -> None:
        """Queue the copy of what comes of a round, which is queued to its end."""
        round_ = this.drafting.round_ if this.drafting is not None else None
        this.copy = RoundReadback.start(this.input_batch.num_reqs, round_, this.num_sampled)
        self.speculator.end_round(this.input_batch, this.timed)

    # --- a round that is open while the next batch is prepared ---------------------------------

    def verify_open(self, scheduler_output: SchedulerOutput) -> bool:
        """Whether the next batch verifies the last round unseen; else that has been settled."""
        left = scheduler_output.finished_req_ids | (scheduler_output.preempted_req_ids or set())
        # One that has more of a prompt, as of a session, begins anew as well.
        anew = left | {request.req_id for request in scheduler_output.scheduled_new_reqs}
        for unsettled in self._unsettled:
            unsettled.left_out -= anew
        this = self._open
        if this is None:
            self.settle()
            return False
        req_ids = this.input_batch.req_ids
        decoding = dict.fromkeys(r for r, s in zip(req_ids, this.samples, strict=True) if s)
        batch = NextBatch.of(scheduler_output, decoding, set(req_ids) - decoding.keys())
        if batch is None or not self._stays_open(this, batch):
            # Nobody needs the drafts of a round whose requests are all gone. Of one that may have
            # waited for requests, nobody knows how long it took.
            self._close(drop=decoding.keys() <= left, timed=batch is not None)
            self.settle()
            return False
        self._open, self._verifying = None, this
        this.left_out = set(batch.left_out)
        if batch.gone:
            self._stop_rows(this, batch.gone)
        return True

    def _stays_open(self, this: _Round, batch: NextBatch) -> bool:
        """Whether this batch verifies the round unseen, as it might."""
        passes = self.speculator.verification_passes
        assert passes is not None
        places = sum(1 + this.caps[r] for r in batch.decoding)
        fits = places <= min(self.most_places, passes.most_tokens)
        return fits and (passes.static.takes_prefill or not batch.prefills)

    def _stop_rows(self, this: _Round, req_ids: list[str]) -> None:
        """Have requests that are gone draft no more: their blocks may become others'."""
        assert this.drafting is not None
        rows = this.drafting.round_.rows
        gone = np.array([*this.row_of(req_ids).values()])
        index = async_tensor_h2d(gone, device=rows.slots.device)
        rows.next_span.index_fill_(0, index, STOPPED)
        rows.slots.index_fill_(0, index, -1)

    def most_drafts(self, req_id: str) -> int:
        """Of a request in a batch that verifies an open round."""
        assert self._verifying is not None
        return self._verifying.caps.get(req_id, 0)

    def plan_open(self, input_batch: InputBatch) -> OpenPlan:
        """How a batch, now prepared, verifies the open round."""
        this = self._verifying
        assert this is not None
        assert this.drafting is not None
        decoding = np.flatnonzero(~input_batch.is_prefilling_np)
        rows = this.row_of(input_batch.req_ids[row] for row in decoding)
        plan = OpenPlan.of(input_batch, this.drafting, rows, self.speculator.device)
        # It is ended with that batch, and its time would be the prompts', too.
        this.timed &= plan.prefill is None
        this.verified_as = plan
        return plan

    def finish_open(self) -> None:
        """Queue what is left of the round that is being verified; before the batch runs."""
        this = self._verifying
        assert this is not None
        self._finish(this)
        if this.left_out:
            self._hand_on(this, this.row_of(this.left_out))

    def end_open(self) -> None:
        """The same round's copy; after the batch, which the device should not wait for."""
        assert self._verifying is not None
        self._end(self._verifying)

    def _close(self, drop: bool = False, timed: bool = False) -> None:
        """The last round will be verified as the host knows it: end it, and hand on its drafts.

        Args:
            drop: nobody will verify it: what has been queued of it is enough.
            timed: whether nothing else kept it from being closed.
        """
        this, self._open = self._open, None
        if this is None:
            return
        this.timed &= timed
        if not drop:
            self._finish(this)
        self._end(this)
        self._hand_on(this, this.row_of(this.input_batch.req_ids))

    def _hand_on(self, this: _Round, rows: Mapping[str, int]) -> None:
        """Give vLLM the drafts of these requests, which `propose` has returned without."""
        assert this.drafting is not None
        of_round = np.array([*rows.values()])
        slots = this.input_batch.idx_mapping_np[of_round]
        places = np.stack([of_round, slots]).astype(np.int64)
        row, slot = async_tensor_h2d(places, device=self.speculator.device)
        drafts = this.drafting.round_.rows.tokens
        self.speculator.req_states.draft_tokens[slot] = drafts[row, 1:]

    # -------------------------------------------------------------------------------------------

    def _allowed(
        self,
        input_batch: InputBatch,
        # [num_reqs] bool
        samples: np.ndarray,
        max_drafts: int,
    ) -> tuple[np.ndarray, int, bool]:
        """Most drafts of each request, and the exits that all use.

        Also whether all requests do as adaptive draft length says: one with a seed of its own
        has the others use all exits with it.
        """
        speculator = self.speculator
        caps, exits = speculator.allowed(input_batch.req_ids, samples, max_drafts)
        caps[~samples] = 0
        drafting = exits[caps > 0]
        most = int(drafting.max(initial=0)) or speculator.thresholds.num_used_exits
        return caps, most, bool((drafting == most).all())

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
        """`AdaDecodeSpeculator._draft_limits` on the device."""
        speculator = self.speculator
        end = np.minimum(
            speculator.req_states.max_seq_len[input_batch.idx_mapping_np], speculator.max_model_len
        )
        ends_and_caps = np.stack([end - 2, caps]).astype(np.int64)
        last, most = async_tensor_h2d(ends_and_caps, device=first_pos.device)
        room = torch.minimum(last - first_pos, most).clamp_(min=0)
        return room.masked_fill_(num_sampled <= 0, 0)

    @torch.inference_mode()
    def settle(self, wait: bool = True, everything: bool = False) -> None:
        """Book rounds that have ended.

        Args:
            wait: for windows that are still to be verified, and rounds before them; the last round
                does not stay open.
            everything: wait for all others as well, of which there is nothing to use but counts.
        """
        if wait or everything:
            self._close()
        while self._unsettled:
            this = self._unsettled[0]
            if this is self._open or this.copy is None:
                return
            wanted = everything or (wait and any(u.has_windows for u in self._unsettled))
            if not wanted and not self._is_due(this.copy):
                return
            self._book(self._unsettled.popleft(), this.copy)

    def _is_due(self, copy: RoundReadback) -> bool:
        """Whether the first unsettled round may be booked, which nobody is in need of."""
        if self.num_ranks == 1:
            return copy.has_arrived()
        return len(self._unsettled) > ROUNDS_LATE

    def _book(self, this: _Round, copy: RoundReadback) -> None:
        input_batch, result = this.input_batch, copy.wait()
        speculator = self.speculator
        if this.verifies is not None:
            # Booked before this one.
            this.verified, this.verifies = this.verifies.windows, None
        speculator.count_verified(input_batch, result.num_sampled, this.verified)
        if result.state is None:
            return
        if CHECK_KV_BOUNDS:
            lengths = result.first_pos + (result.state.depths > 0).sum(axis=1)
            assert this.kv_capacity is not None
            speculator.spans.check_kv_bounds(this.kv_capacity, lengths)
        self._count(result, this.used_exits)
        used_exits = np.full_like(result.limits, this.used_exits)
        if speculator.draft_length is not None:
            statistics = speculator.draft_length.statistics
            checked = np.zeros(statistics.num_exits, dtype=np.int64)
            checked[: len(result.checked)] = result.checked
            statistics.add_round(
                result.limits, used_exits, result.state.num_drafts, result.state.exits, checked
            )
        found = input_batch, result.num_sampled, result.limits, used_exits, result.state
        if this.verified_as is None:
            speculator.keep_windows(*found)
            return
        # For the round that its verification comes before.
        this.windows = speculator.windows_of(*found)
        for req_id in this.left_out & this.windows.keys():
            speculator.windows.put(req_id, this.windows.pop(req_id))
        this.verified_as.count(this.windows, speculator.model, speculator.counters)

    def _count(self, result: RoundResult, num_exits: int) -> None:
        """What draft_loop.py counts as it goes, of a round that might use so many exits."""
        assert result.state is not None
        counters, staged = self.speculator.counters, self.speculator.model
        thresholds = self.speculator.thresholds
        for e in range(num_exits):
            start, stop = staged.spans[e]
            counters.draft_layers += (stop - start) * int(result.passes[e])
            # Each token goes through a span once at most.
            tokens = int((result.state.depths > e).sum())
            counters.draft_token_layers += (stop - start) * tokens
            if not thresholds.uses(e):
                continue
            exit_counters = counters.exits[staged.exit_layers[e]]
            visited, drafted = int(result.visited[e]), int(result.drafted[e])
            exit_counters.heads_evaluated += int(result.checked[e])
            exit_counters.head_batches += int(result.asked[e])
            exit_counters.draft_tokens += drafted
            if thresholds.uses_gate(e):
                exit_counters.gates_evaluated += visited
            if e + 1 < num_exits:
                exit_counters.next_exit += visited - drafted
