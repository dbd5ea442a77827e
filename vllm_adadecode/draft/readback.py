"""What the host gets to know of a round on the device: one copy, on its way while the host goes on.

Owns the layout of that copy and what it says once it is there. Who waits for it, and when, is up to
device_round.py.
"""

from dataclasses import dataclass, field

import numpy as np
import torch

from vllm_adadecode.draft.buffers import LoopBuffers
from vllm_adadecode.draft.host_loop import DraftState


@dataclass
class RoundReadback:
    """What the host needs of a round, in one tensor of int64 on its way from the device.

    Attributes:
        num_reqs, num_exits, window: sizes of the round; the last two 0 if it drafted nothing.
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
        round_: LoopBuffers | None,
        # [num_reqs]
        num_sampled: torch.Tensor,
    ) -> "RoundReadback":
        """Copy a round, or with ``round_`` None what the verification before it sampled."""
        if round_ is None:
            return RoundReadback._of(num_sampled[:num_reqs].to(torch.int64), num_reqs, 0, 0)
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
        return RoundReadback._of(device, num_reqs, len(by_exit), rows.tokens.shape[1])

    @staticmethod
    def _of(values: torch.Tensor, num_reqs: int, num_exits: int, window: int) -> "RoundReadback":
        host = values.to("cpu", non_blocking=True, copy=True)
        copy = RoundReadback(num_reqs, num_exits, window, host)
        if values.is_cuda:
            copy.done = torch.cuda.Event()
            copy.done.record()
        return copy

    @property
    def drafted(self) -> bool:
        """Whether there was a draft loop."""
        return self.window > 0

    def has_arrived(self) -> bool:
        """Whether `wait` would not wait."""
        return self.done is None or self.done.query()

    def wait(self) -> "RoundResult":
        """The round's results; waits for the device if it is not done."""
        if self.done is not None and not self.has_arrived():
            self.done.synchronize()
        values = self.host.numpy()
        if not self.drafted:
            return RoundResult(num_sampled=values)
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


def _nothing() -> np.ndarray:
    return np.zeros(0, dtype=np.int64)


@dataclass
class RoundResult:
    """A round on the host.

    Attributes:
        num_sampled, first_pos, limits: ``[num_reqs]``. Of a round without a draft loop there is
            nothing but the first.
        state: the windows, all on the host.
        visited, drafted, checked: ``[num_exits]`` rows that came to an exit, followed its head, and
            had it asked.
        asked, passes: ``[num_exits]`` passes of the head and of its span.
    """

    num_sampled: np.ndarray
    first_pos: np.ndarray = field(default_factory=_nothing)
    limits: np.ndarray = field(default_factory=_nothing)
    state: DraftState | None = None
    visited: np.ndarray = field(default_factory=_nothing)
    drafted: np.ndarray = field(default_factory=_nothing)
    checked: np.ndarray = field(default_factory=_nothing)
    asked: np.ndarray = field(default_factory=_nothing)
    passes: np.ndarray = field(default_factory=_nothing)
