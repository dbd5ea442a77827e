"""The draft policy: is a head worth its cost, and after a head check, extend, promote or stop.

Owns these decisions and nothing else; the proposer carries them out. A policy may look at gates,
confidences and how far the window has come, never at the sampled draft itself: were a draft dropped
because of *which* token was drawn, the proposal distribution would no longer be the one that
rejection sampling divides by, and sampling would not be exact.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from functools import partial
from typing import Protocol

import torch

# Gate probabilities float32 [num_rows] -> bool [num_rows], on their device.
PassesGate = Callable[[torch.Tensor], torch.Tensor]


class Action(IntEnum):
    """What becomes of a request after a head check."""

    # The head's token is the next draft; its first pass is through span 0.
    EXTEND = 0
    # The newest token goes one span deeper, with shallower ones of its window (fill-in).
    PROMOTE = 1
    # The window goes to verification as it is.
    STOP = 2


@dataclass(frozen=True)
class Cutoffs:
    """A policy in numbers, for loops whose decisions are on the device.

    Attributes:
        follow: per exit, the confidence above which its head is followed.
        gate: per exit, what a gate's probability must be above; of no meaning without a gate.
    """

    follow: tuple[float, ...]
    gate: tuple[float, ...]


class DraftPolicy(Protocol):
    """Decides, per request, what the proposer does after a head was evaluated."""

    @property
    def num_used_exits(self) -> int:
        """Exits from this index on are never reached; 0 turns drafting off."""
        ...

    def uses(self, exit_index: int) -> bool:
        """Whether the head at this exit can be followed; if not, it is passed by unevaluated."""
        ...

    def uses_gate(self, exit_index: int) -> bool:
        """Whether `passes_gate` is to be asked before the head at this exit is evaluated."""
        ...

    def passes_gate(
        self,
        exit_index: int,
        # [num_rows] float32
        gate: torch.Tensor,
    ) -> torch.Tensor:
        """Which rows' head is worth evaluating, bool ``[num_rows]``.

        Args:
            gate: probability that the head will be confident. The other rows are promoted, or
                stop if this is the last exit.
        """
        ...

    def decide(
        self,
        exit_index: int,
        # [num_rows] float32
        confidence: torch.Tensor,
    ) -> torch.Tensor:
        """An `Action` per row, ``[num_rows]`` int8."""
        ...

    def cutoffs(self) -> Cutoffs:
        """The same decisions in numbers, of all exits that are used."""
        ...


def otherwise(policy: DraftPolicy, exit_index: int) -> Action:
    """What becomes of a request whose head here is not followed: it goes deeper, if it can."""
    return Action.PROMOTE if exit_index + 1 < policy.num_used_exits else Action.STOP


def gate_at(policy: DraftPolicy, exit_index: int) -> PassesGate | None:
    """The policy's word on gates at an exit; None where it asks for none."""
    return partial(policy.passes_gate, exit_index) if policy.uses_gate(exit_index) else None


class ThresholdPolicy:
    """The paper's rule: predict early where p > gamma, else go deeper; after the last head, stop.

    Args:
        thresholds: gamma per exit layer, in [0, 1]. A probability is never above 1, so a
            threshold of 1 turns its exit off.
        gate_thresholds: per exit layer, in [0, 1]; None for heads without a gate. 0 evaluates
            every head and leaves the gate out, 1 turns the exit off.
    """

    def __init__(
        self, thresholds: Sequence[float], gate_thresholds: Sequence[float] | None = None
    ) -> None:
        self.thresholds = tuple(float(t) for t in thresholds)
        self.gate_thresholds = (
            None if gate_thresholds is None else tuple(float(t) for t in gate_thresholds)
        )

    @property
    def num_used_exits(self) -> int:
        return max((i + 1 for i in range(len(self.thresholds)) if self.uses(i)), default=0)

    def uses(self, exit_index: int) -> bool:
        gates = self.gate_thresholds
        return self.thresholds[exit_index] < 1.0 and (gates is None or gates[exit_index] < 1.0)

    def uses_gate(self, exit_index: int) -> bool:
        return self.gate_thresholds is not None and self.gate_thresholds[exit_index] > 0.0

    def passes_gate(self, exit_index: int, gate: torch.Tensor) -> torch.Tensor:
        assert self.gate_thresholds is not None
        return gate > self.gate_thresholds[exit_index]

    def decide(self, exit_index: int, confidence: torch.Tensor) -> torch.Tensor:
        # NaN compares false: a broken row is never confident.
        confident = confidence > self.thresholds[exit_index]
        actions = torch.full_like(confidence, int(otherwise(self, exit_index)), dtype=torch.int8)
        return actions.masked_fill_(confident, int(Action.EXTEND))

    def cutoffs(self) -> Cutoffs:
        return Cutoffs(self.thresholds, self.gate_thresholds or (0.0,) * len(self.thresholds))
