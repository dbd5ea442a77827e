"""The draft policy: after a head check, extend, promote or stop.

Owns that decision and nothing else; the proposer carries it out. A policy may look at confidences
and at how far the window has come, never at the sampled draft itself: were a draft dropped because
of *which* token was drawn, the proposal distribution would no longer be the one that rejection
sampling divides by, and sampling would not be exact.
"""

from collections.abc import Sequence
from typing import Protocol

import torch


class DraftPolicy(Protocol):
    """Decides per request what the proposer does after head ``exit_index`` was evaluated."""

    def uses(self, exit_index: int) -> bool:
        """Whether the head at this exit can ever be followed; if not, it is not evaluated."""
        ...

    def extend(
        self,
        exit_index: int,
        # [num_rows] float32
        confidence: torch.Tensor,
    ) -> torch.Tensor:
        """Rows whose head's token becomes the next draft, ``[num_rows]`` bool.

        The other rows are promoted through the next span; after the last used exit they stop.
        """
        ...


class ThresholdPolicy:
    """The paper's rule: predict early where p > gamma, else go one span deeper.

    Args:
        thresholds: gamma per exit layer, in [0, 1]. A probability is never above 1, so a
            threshold of 1 turns its exit off.
    """

    def __init__(self, thresholds: Sequence[float]) -> None:
        self.thresholds = tuple(float(t) for t in thresholds)

    def uses(self, exit_index: int) -> bool:
        return self.thresholds[exit_index] < 1.0

    def extend(self, exit_index: int, confidence: torch.Tensor) -> torch.Tensor:
        # NaN compares false: a broken row is never confident.
        return confidence > self.thresholds[exit_index]
