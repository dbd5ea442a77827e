"""The numbers per exit layer by which a draft loop decides (paper, section "Confidence").

A head is evaluated where its gate is above one, and its prediction accepted where its confidence is
above the other; else the request goes to the next exit, or stops behind the last one in use. The
sampled draft token itself is never looked at: were one dropped because of *which* token was drawn,
the proposal distribution would no longer be the one that rejection sampling divides by.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class ExitThresholds:
    """By exit index. No comparison holds for NaN: a broken row is never confident.

    Attributes:
        confidence: a prediction is accepted where its probability is above; None: the exit is
            turned off, its head never evaluated.
        gate: a head is evaluated where the gate's probability is above; None: always, without the
            gate.
    """

    confidence: tuple[float | None, ...]
    gate: tuple[float | None, ...]

    @classmethod
    def of(cls, confidence: Sequence[float], gate: Sequence[float] | None = None) -> ExitThresholds:
        """From what users set, all in [0, 1].

        Args:
            confidence: a probability is never above 1, so 1 turns its exit off.
            gate: 1 turns its exit off as well, 0 leaves the gate out; None: heads without gates.
        """
        pairs = list(zip(confidence, gate or [0.0] * len(confidence), strict=True))
        return cls(
            tuple(p if p < 1.0 and g < 1.0 else None for p, g in pairs),
            tuple(g if p < 1.0 and 0.0 < g < 1.0 else None for p, g in pairs),
        )

    @property
    def num_used_exits(self) -> int:
        """Exits from this index on are never reached; 0 turns drafting off."""
        return max((1 + i for i in range(len(self.confidence)) if self.uses(i)), default=0)

    def uses(self, exit_index: int) -> bool:
        """Whether a prediction here can be accepted; if not, the exit is passed by."""
        return self.confidence[exit_index] is not None

    def uses_gate(self, exit_index: int) -> bool:
        """Whether the gate here is evaluated before the head."""
        return self.gate[exit_index] is not None
