"""What the host gets to know of a round on the device: one copy, on its way while the host goes on.

Owns the layout of that copy and what it says once it is there. Who waits for it, and when, is up to
engine/device_rounds.py.
"""

from dataclasses import dataclass

import numpy as np
import torch

from vllm_adadecode.draft.buffers import LoopBuffers
from vllm_adadecode.draft.result import DraftResult, DraftState, ExitCounts


@dataclass
class RoundResult:
    """A round on the host.

    Attributes:
        num_sampled: ``[num_reqs]`` tokens that the verification before it sampled.
        first_pos: ``[num_reqs]`` position of the last sampled token; None if it drafted nothing.
        drafted: what it drafted; None: nothing.
    """

    num_sampled: np.ndarray
    first_pos: np.ndarray | None = None
    drafted: DraftResult | None = None


@dataclass
class RoundReadback:
    """What the host needs of a round, in one tensor of int64 on its way from the device.

    Attributes:
        host: the copy; not to be read before `done`.
        num_reqs, num_exits, window: sizes of the round; the last two 0 if it drafted nothing.
        used_exits: that it might use.
        done: recorded after the copy; None on a CPU, where copies end before they return.
    """

    host: torch.Tensor
    num_reqs: int
    num_exits: int
    window: int
    used_exits: int
    done: torch.cuda.Event | None = None

    @staticmethod
    def start(
        num_reqs: int,
        buffers: LoopBuffers | None,
        # [>= num_reqs]
        num_sampled: torch.Tensor,
        used_exits: int,
    ) -> "RoundReadback":
        """Copy what a round left in its buffers.

        Args:
            buffers: None: it drafted nothing.
            num_sampled: tokens that the verification before it sampled.
        """
        if buffers is None:
            return RoundReadback._copy(num_sampled[:num_reqs].to(torch.int64), num_reqs, 0, 0, 0)
        rows = buffers.rows
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
        # In the order of `ExitCounts`.
        counted = torch.stack(
            [buffers.heads_evaluated, buffers.head_batches, buffers.span_passes], dim=1
        )
        by_exit = torch.cat([rows.counts, counted], dim=1)
        device = torch.cat([by_row.flatten(), by_exit.flatten()])
        sizes = num_reqs, len(by_exit), rows.tokens.shape[1]
        return RoundReadback._copy(device, *sizes, used_exits)

    @staticmethod
    def _copy(values: torch.Tensor, *sizes: int) -> "RoundReadback":
        readback = RoundReadback(values.to("cpu", non_blocking=True, copy=True), *sizes)
        if values.is_cuda:
            readback.done = torch.cuda.Event()
            readback.done.record()
        return readback

    def has_arrived(self) -> bool:
        """Whether `wait` would not wait."""
        return self.done is None or self.done.query()

    def wait(self) -> RoundResult:
        """The round's results; waits for the device if it is not done."""
        if self.done is not None and not self.has_arrived():
            self.done.synchronize()
        values = self.host.numpy()
        if self.window == 0:
            return RoundResult(num_sampled=values)
        width = 4 + 3 * self.window - 1
        by_row = values[: self.num_reqs * width].reshape(self.num_reqs, width)
        by_exit = values[self.num_reqs * width :].reshape(self.num_exits, 5)
        sampled, first_pos, limits, num_drafts = by_row[:, :4].T
        ends = np.cumsum([4, self.window, self.window - 1])
        state = DraftState(
            tokens=torch.from_numpy(by_row[:, ends[2] :]),
            num_drafts=num_drafts,
            depths=by_row[:, ends[0] : ends[1]],
            exits=by_row[:, ends[1] : ends[2]],
        )
        used_exits = np.full_like(limits, self.used_exits)
        drafted = DraftResult(state, ExitCounts(*by_exit.T), limits, used_exits)
        return RoundResult(sampled, first_pos, drafted)
