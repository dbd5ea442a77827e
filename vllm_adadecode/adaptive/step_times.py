"""How long rounds take while serving, against what was expected of them.

Owns the correction of costs that were measured at start, when the machine may have been busy,
prompts were short and nothing was scheduled. Kept for rounds with and without draft tokens apart,
and for batches of about the same size: it is their relation that decides whether drafting pays.
"""

from __future__ import annotations

import time
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

# Rounds after which an old one counts half.
HALF_LIFE = 64
# Rounds without which nothing is said.
LEAST_ROUNDS = 2.0
# Something else held a round up that took so many times as long as others.
OUTLIER = 3.0


class Factors(NamedTuple):
    """By what expected seconds of each kind are to be multiplied; None: it is not known yet."""

    plain: float | None
    drafting: float | None

    def of(self, drafting: bool) -> float:
        """One that is not known is taken to be as wrong as the other."""
        own, other = (self.drafting, self.plain) if drafting else self
        return own or other or 1.0


@dataclass
class _Sums:
    """Sums over rounds of one kind, in seconds, that fade: newer ones count more."""

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
    """Seconds of rounds by batch size, to powers of two, with and without draft tokens."""

    _sums: dict[tuple[int, bool], _Sums] = field(default_factory=dict)

    def add(self, num_reqs: int, drafting: bool, expected: float, taken: float) -> None:
        """A round of ``num_reqs`` requests."""
        key = num_reqs.bit_length(), drafting
        self._sums.setdefault(key, _Sums()).add(expected, taken)

    def factors(self, num_reqs: int) -> Factors:
        size = num_reqs.bit_length()
        plain, drafting = (self._sums.get((size, d), _Sums()) for d in (False, True))
        return Factors(plain.factor, drafting.factor)


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
