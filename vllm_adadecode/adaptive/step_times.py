"""How long rounds take while serving, against what was expected of them.

Owns the correction of costs that were measured at start, when the machine may have been busy,
prompts were short and nothing was scheduled. Kept for rounds with and without drafts apart, and for
batches of about the same size: it is their relation that decides whether drafting pays. Those with
drafts are of two kinds, whose relation decides whether large ones stay open (open_round.py).
"""

from __future__ import annotations

import time
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import NamedTuple

# Rounds after which an old one counts half.
HALF_LIFE = 64
# Rounds without which nothing is said.
LEAST_ROUNDS = 2.0
# Something else held a round up that took so many times as long as others.
OUTLIER = 3.0


# Rounds after which the other kind is tried, and for how many; the first is another kind's still.
OTHER_EVERY, OTHER_ROUNDS = 256, 4


class Kind(Enum):
    """What a round does, as far as its time is another's."""

    PLAIN = "without drafts"
    SETTLED = "with drafts that are known when their verification is prepared"
    OPEN = "with drafts that are not"


class Factors(NamedTuple):
    """By what expected seconds of each kind are to be multiplied; None: it is not known yet."""

    plain: float | None
    settled: float | None
    open: float | None

    def of(self, drafting: bool) -> float:
        """One that is not known is taken to be as wrong as the other. Drafting, as it is best."""
        best = min((f for f in (self.settled, self.open) if f), default=None)
        return (best or self.plain if drafting else self.plain or best) or 1.0


@dataclass
class _Sums:
    """Of rounds of one kind, in seconds, the newer ones counting more."""

    rounds: float = 0.0
    expected: float = 0.0
    taken: float = 0.0

    @property
    def factor(self) -> float | None:
        return self.taken / self.expected if self.rounds >= LEAST_ROUNDS else None

    def add(self, expected: float, taken: float) -> None:
        # Cut rather than left out: rounds that are slow from now on are followed, step by step.
        taken = min(taken, OUTLIER * expected * (self.factor or 1.0))
        keep = 0.5 ** (1 / HALF_LIFE)
        self.rounds = keep * self.rounds + 1.0
        self.expected = keep * self.expected + expected
        self.taken = keep * self.taken + taken


@dataclass
class StepTimes:
    """Seconds of rounds by batch size, to powers of two, and kind."""

    _sums: dict[tuple[int, Kind], _Sums] = field(default_factory=dict)

    def add(self, num_reqs: int, kind: Kind, expected: float, taken: float) -> None:
        """A round of ``num_reqs`` requests."""
        key = num_reqs.bit_length(), kind
        self._sums.setdefault(key, _Sums()).add(expected, taken)

    def factors(self, num_reqs: int) -> Factors:
        found = (self._sums.get((num_reqs.bit_length(), kind), _Sums()) for kind in Kind)
        return Factors(*(sums.factor for sums in found))


@dataclass
class OpenOrSettled:
    """Which of the two large rounds of one batch size are: the quicker, the other now and then."""

    rounds: int = 0

    def opens(self, factors: Factors) -> bool:
        """For the next one; settled, and then open, as long as that is not known."""
        if factors.settled is None or factors.open is None:
            return factors.settled is not None
        self.rounds += 1
        if self.rounds >= OTHER_EVERY + OTHER_ROUNDS:
            self.rounds = 0
        better = factors.open < factors.settled
        return better != (self.rounds >= OTHER_EVERY)


@dataclass
class RoundClock:
    """Times a round from the end of one draft loop to the end of the next.

    Only where the same requests do the same in both: what lies between is then one verification and
    one draft loop of theirs, with their scheduling.
    """

    _last: tuple[list[str], Hashable] | None = None
    _at: float = 0.0

    def ended(self, requests: Sequence[str] | None, choice: Hashable) -> float | None:
        """Seconds since the last round; None if that one was another.

        Args:
            requests: None for a round that is not to be timed, as with prefill in it.
            choice: what they may draft.
        """
        now = time.perf_counter()
        this = None if requests is None else (list(requests), choice)
        seconds = now - self._at if this is not None and this == self._last else None
        self._last, self._at = this, now
        return seconds
