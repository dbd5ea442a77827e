"""One round of drafting on the device, from its first step until the host has recorded it.

Owns the states that such a round goes through and what is kept of it in each. `DeviceRounds`
(device_rounds.py) moves it from one to the next:

    propose          overlap            plan             verify          resolve
       |                |                 |                 |               |
    DRAFTING ------> OVERLAPPED ------> VERIFYING ------> READBACK ------> RESOLVED
       |                                                    ^
       +----------------------------------------------------+
        nothing was drafted, or the next batch has to know the draft tokens

The upper way is that of async scheduling. The host prepares the next batch while the device drafts,
for as many draft tokens as there may be; the device itself plans which tokens that batch verifies
(verify/overlapped_plan.py). The lower way is that of all other rounds: they end before the next
batch is prepared, and the host waits for them if it needs their draft tokens.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import Enum, auto

import numpy as np
import torch
from vllm.v1.worker.gpu.input_batch import InputBatch

from vllm_adadecode.draft.device_loop import DraftRun
from vllm_adadecode.draft.readback import RoundReadback
from vllm_adadecode.draft.windows import PendingWindow
from vllm_adadecode.verify.overlapped_plan import OverlappedPlan


class RoundState(Enum):
    """How far a round is, as the host sees it."""

    # Its first step is queued. How the next batch verifies it is not decided.
    DRAFTING = auto()
    # The next batch verifies it before the host knows its draft tokens.
    OVERLAPPED = auto()
    # That batch is prepared, and the verification planned.
    VERIFYING = auto()
    # All its steps are queued, and a copy of what came of it is on its way.
    READBACK = auto()
    # The host has read and recorded it.
    RESOLVED = auto()


TRANSITIONS: dict[RoundState, frozenset[RoundState]] = {
    RoundState.DRAFTING: frozenset({RoundState.OVERLAPPED, RoundState.READBACK}),
    RoundState.OVERLAPPED: frozenset({RoundState.VERIFYING}),
    RoundState.VERIFYING: frozenset({RoundState.READBACK}),
    RoundState.READBACK: frozenset({RoundState.RESOLVED}),
    RoundState.RESOLVED: frozenset(),
}


class IllegalTransitionError(RuntimeError):
    """The model runner has called for a step of a round out of its order."""


@dataclass
class DraftRound:
    """A round, kept until the one after it is resolved.

    Attributes:
        input_batch: that was verified before it.
        num_sampled: ``[>= num_reqs]`` tokens that this batch sampled.
        samples: bool ``[num_reqs]``, whether a request has a window: it is not in the midst of its
            prompt.
        used_exits: that the round might use.
        timed: whether its time is that of its requests' rounds.
        verified: windows that its batch verified, by request.
        previous: the round whose windows its batch verified, if that was overlapped: they are
            known once it is resolved.
        run: its steps; None: it drafted nothing.
        caps: most draft tokens of each request.
        plan: how the next batch verifies it, from VERIFYING on.
        left_out: its requests that go on, but that this batch left out.
        readback: of what came of it, from READBACK on.
        windows: its own, once it is RESOLVED, if it was overlapped.
        kv_capacity: tokens that its requests had blocks for, if that is checked.
        state: changed by `move_to` alone.
    """

    input_batch: InputBatch
    num_sampled: torch.Tensor
    samples: np.ndarray
    used_exits: int
    verified: dict[str, PendingWindow]
    timed: bool = True
    previous: "DraftRound | None" = None
    run: DraftRun | None = None
    caps: dict[str, int] = field(default_factory=dict)
    plan: OverlappedPlan | None = None
    left_out: set[str] = field(default_factory=set)
    readback: RoundReadback | None = None
    windows: dict[str, PendingWindow] = field(default_factory=dict)
    kv_capacity: np.ndarray | None = None
    state: RoundState = RoundState.DRAFTING

    def move_to(self, state: RoundState) -> None:
        """Go on to a state that may follow.

        Raises:
            IllegalTransitionError: it may not.
        """
        if state not in TRANSITIONS[self.state]:
            raise IllegalTransitionError(
                f"a round that is {self.state.name} can't become {state.name}: "
                "a batch has skipped or repeated a part of it"
            )
        self.state = state

    @property
    def is_awaited(self) -> bool:
        """Whether somebody is to verify windows of it as the host knows them."""
        return self.run is not None and (self.plan is None or bool(self.left_out))

    def row_of(self, req_ids: Iterable[str]) -> dict[str, int]:
        """Rows of these requests of the round."""
        rows = {req_id: row for row, req_id in enumerate(self.input_batch.req_ids)}
        return {req_id: rows[req_id] for req_id in req_ids}
