"""A round's drafting on the device: what is given to the loop, and what comes back, late.

Owns the device's half of `propose` (limits, one copy of all that the host needs) and the host's
half, `settle`, which waits for that copy and books it: windows, drafts, counters. Whoever is about
to use these settles first; until then the host has nothing to wait for.
"""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Self

import numpy as np
import torch
from vllm.utils.torch_utils import async_tensor_h2d
from vllm.v1.utils import record_function_or_nullcontext
from vllm.v1.worker.gpu.input_batch import InputBatch

from vllm_adadecode.device_loop import DeviceLoop
from vllm_adadecode.draft_loop import DraftState
from vllm_adadecode.draws import Draws
from vllm_adadecode.fused_head import FusedHeads
from vllm_adadecode.loop_buffers import LoopBuffers
from vllm_adadecode.span_runner import CHECK_KV_BOUNDS
from vllm_adadecode.static_spans import StaticSpans
from vllm_adadecode.step_guard import make_guard

if TYPE_CHECKING:
    from vllm_adadecode.proposer import AdaDecodeSpeculator


@dataclass
class RoundCopy:
    """What the host needs of a round, in one tensor of int64 on its way from the device.

    Attributes:
        num_reqs, num_exits, window: sizes of the round.
        host: the copy; not to be read before `done`.
        done: recorded after the copy; None on a CPU, where copies end before they return.
    """

    num_reqs: int
    num_exits: int
    window: int
    host: torch.Tensor
    done: torch.cuda.Event | None = field(default=None)

    @staticmethod
    def start(
        num_reqs: int,
        round_: LoopBuffers,
        # [num_reqs]
        num_sampled: torch.Tensor,
    ) -> "RoundCopy":
        rows = round_.rows
        by_row = torch.cat(
            [
                num_sampled[:num_reqs, None],
                rows.first_pos[:num_reqs, None],
                rows.limits[:num_reqs, None],
                rows.num_drafts[:num_reqs, None],
                rows.depths[:num_reqs],
                rows.exits[:num_reqs],
                rows.tokens[:num_reqs],
            ],
            dim=1,
        )
        counted = torch.stack([round_.checked, round_.asked, round_.passes], dim=1)
        by_exit = torch.cat([rows.counts, counted], dim=1)
        device = torch.cat([by_row.flatten(), by_exit.flatten()])
        window = rows.tokens.shape[1]
        copy = RoundCopy(
            num_reqs, len(by_exit), window, device.to("cpu", non_blocking=True, copy=True)
        )
        if device.is_cuda:
            copy.done = torch.cuda.Event()
            copy.done.record()
        return copy

    def has_arrived(self) -> bool:
        """Whether `wait` would not wait."""
        return self.done is None or self.done.query()

    def wait(self) -> "RoundResult":
        """The round's results; waits for the device if it is not done."""
        if self.done is not None:
            self.done.synchronize()
        values = self.host.numpy()
        width = 4 + 3 * self.window - 1
        by_row = values[: self.num_reqs * width].reshape(self.num_reqs, width)
        by_exit = values[self.num_reqs * width :].reshape(self.num_exits, 5)
        sampled, first_pos, limits, num_drafts = by_row[:, :4].T
        ends = np.cumsum([4, self.window, self.window - 1])
        return RoundResult(
            num_sampled=sampled,
            first_pos=first_pos,
            limits=limits,
            state=DraftState(
                tokens=torch.from_numpy(by_row[:, ends[2] :]),
                num_drafts=num_drafts,
                depths=by_row[:, ends[0] : ends[1]],
                exits=by_row[:, ends[1] : ends[2]],
            ),
            visited=by_exit[:, 0],
            drafted=by_exit[:, 1],
            checked=by_exit[:, 2],
            asked=by_exit[:, 3],
            passes=by_exit[:, 4],
        )


@dataclass
class RoundResult:
    """A round on the host.

    Attributes:
        num_sampled, first_pos, limits: ``[num_reqs]``.
        state: the windows, all on the host.
        visited, drafted, checked: ``[num_exits]`` rows that came to an exit, followed its head, and
            had it asked.
        asked, passes: ``[num_exits]`` passes of the head and of its span.
    """

    num_sampled: np.ndarray
    first_pos: np.ndarray
    limits: np.ndarray
    state: DraftState
    visited: np.ndarray
    drafted: np.ndarray
    checked: np.ndarray
    asked: np.ndarray
    passes: np.ndarray


class DeviceRounds:
    """The speculator's rounds with the loop on the device.

    Args:
        speculator: its deferred states, policy, heads and records are used.
    """

    def __init__(self, speculator: "AdaDecodeSpeculator", loop: DeviceLoop) -> None:
        self.speculator, self.loop = speculator, loop
        self._unsettled: tuple[InputBatch, RoundCopy] | None = None

    @classmethod
    def make(
        cls, speculator: "AdaDecodeSpeculator", states: tuple[torch.Tensor, torch.Tensor]
    ) -> Self:
        """With buffers for the largest batch; see `StaticSpans` for what is refused.

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
        spans = StaticSpans(speculator.spans, speculator.max_model_len)
        guard = make_guard(speculator.device)
        loop = DeviceLoop(speculator.model, spans, speculator.deferred, buffers, guard)
        return cls(speculator, loop)

    def propose(
        self,
        input_batch: InputBatch,
        # [>= num_reqs]
        num_sampled: torch.Tensor,
        # [max_num_reqs, 1]
        last_sampled: torch.Tensor,
        draws: Draws | None,
        fused: FusedHeads | None,
        num_speculative_tokens: int | None,
    ) -> torch.Tensor:
        """Draft for every request that sampled a token; the host waits for nothing.

        Returns:
            int64 ``[num_reqs, num_speculative_steps]``, as `AdaDecodeSpeculator.propose`.
        """
        self.settle()
        speculator, num_reqs = self.speculator, input_batch.num_reqs
        policy, max_drafts = speculator.policy, speculator.num_speculative_steps
        if num_speculative_tokens is not None:
            max_drafts = min(max_drafts, num_speculative_tokens)
        if policy.num_used_exits == 0:
            max_drafts = 0
        slots = input_batch.idx_mapping.to(torch.int64)
        first_pos = speculator.req_states.num_computed_tokens.gpu[slots].to(torch.int64)
        limits = self._limits(input_batch, num_sampled[:num_reqs], first_pos, max_drafts)
        round_ = self.loop.begin(
            slots, first_pos, limits, last_sampled[slots].view(-1), policy.num_used_exits
        )
        with record_function_or_nullcontext("adadecode: draft loop"):
            self.loop.draft(round_, policy, max_drafts, draws, fused)
        self._unsettled = input_batch, RoundCopy.start(num_reqs, round_, num_sampled)
        # A copy: vLLM may write to it.
        return round_.rows.tokens[:num_reqs, 1:].clone()

    def _limits(
        self,
        input_batch: InputBatch,
        # [num_reqs]
        num_sampled: torch.Tensor,
        # [num_reqs]
        first_pos: torch.Tensor,
        max_drafts: int,
    ) -> torch.Tensor:
        """`AdaDecodeSpeculator._draft_limits` on the device."""
        speculator = self.speculator
        end = np.minimum(
            speculator.req_states.max_seq_len[input_batch.idx_mapping_np], speculator.max_model_len
        )
        room = async_tensor_h2d(end, device=first_pos.device) - first_pos - 2
        return torch.where(num_sampled > 0, room.clamp(0, max_drafts), 0)

    def settle(self, wait: bool = True) -> None:
        """Book the last round if that is not done.

        Args:
            wait: for its end; else nothing happens before.
        """
        if self._unsettled is None:
            return
        input_batch, copy = self._unsettled
        if not wait and not copy.has_arrived():
            return
        self._unsettled = None
        result = copy.wait()
        speculator = self.speculator
        if CHECK_KV_BOUNDS:
            lengths = result.first_pos + (result.state.depths > 0).sum(axis=1)
            speculator.spans.check_kv_bounds(input_batch.idx_mapping_np, lengths)
        speculator.count_verified(input_batch, result.num_sampled)
        self._count(result)
        used_exits = np.full_like(result.limits, speculator.policy.num_used_exits)
        speculator.keep_windows(
            input_batch, result.num_sampled, result.limits, used_exits, result.state
        )

    def _count(self, result: RoundResult) -> None:
        """What draft_loop.py counts as it goes."""
        counters, staged = self.speculator.counters, self.speculator.model
        policy, num_exits = self.speculator.policy, len(result.visited)
        for e in range(num_exits):
            start, stop = staged.spans[e]
            counters.draft_layer_passes += (stop - start) * int(result.passes[e])
            # Each token goes through a span once at most.
            tokens = int((result.state.depths > e).sum())
            counters.draft_token_layers += (stop - start) * tokens
            if not policy.uses(e):
                continue
            exit_counters = counters.exits[staged.exit_layers[e]]
            visited, drafted = int(result.visited[e]), int(result.drafted[e])
            exit_counters.checked += int(result.checked[e])
            exit_counters.head_passes += int(result.asked[e])
            exit_counters.drafted += drafted
            if policy.uses_gate(e):
                exit_counters.gated += visited
            if e + 1 < num_exits:
                exit_counters.promoted += visited - drafted
