"""What becomes of draft tokens: counts of draft phase and verification, to choose lengths by.

Owns these counts. A round that used all exits also says what it would have drafted with the first
few of them: the same, up to the first draft token of a deeper exit. So one round tells about all
that it could have been.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

# Windows after which an old one counts half: some hundred tokens of text at batch 1.
HALF_LIFE = 256
# Weight of windows below which nothing is known about a draft token: until then, it is tried.
LEAST_WINDOWS = 8.0
# What is known weighs as many at most when it is to be put to the test.
STALE_WINDOWS = 1.25 * LEAST_WINDOWS
_KEEP = 0.5 ** (1 / HALF_LIFE)


@dataclass
class AcceptanceStatistics:
    """Counts that fade: the newer ones weigh more.

    Rows are numbers of exits that a round might have used, from 1.

    Attributes:
        max_drafts: K.
        windows: ``[exits, 1 + K]`` weight of windows that might have had so many draft tokens.
        drafted, accepted: ``[exits, 1 + K]`` of those, windows that had, and kept, so many.
        reached, confident, evaluated: ``[exits]`` tries that came to this exit; of those, the ones
            whose head was confident, and whose head was evaluated.
    """

    max_drafts: int
    num_exits: int
    windows: np.ndarray = field(init=False)
    drafted: np.ndarray = field(init=False)
    accepted: np.ndarray = field(init=False)
    reached: np.ndarray = field(init=False)
    confident: np.ndarray = field(init=False)
    evaluated: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        for name in ("windows", "drafted", "accepted"):
            setattr(self, name, np.zeros((self.num_exits, 1 + self.max_drafts)))
        for name in ("reached", "confident", "evaluated"):
            setattr(self, name, np.zeros(self.num_exits))
        self._counts = np.arange(1 + self.max_drafts)
        self._used = np.arange(1, 1 + self.num_exits)

    def add_window(self, limit: int, used: int, exits: np.ndarray, accepted: int) -> None:
        """A verified window.

        Older ones fade as far as this one takes their place: what is known about more draft
        tokens or exits than it could have stays until there is something newer.

        Args:
            limit: most draft tokens that it might have had.
            used: exits that it might have used.
            exits: ``[num_drafts]`` exit index of each draft token.
        """
        if limit == 0:
            return
        # By number of exits: draft tokens before the first that is deeper.
        drafted = np.searchsorted(np.maximum.accumulate(exits), self._used[:used])
        counts = self._counts[: 1 + limit]
        for values, added in (
            (self.windows, 1.0),
            (self.drafted, counts <= drafted[:, None]),
            (self.accepted, counts <= np.minimum(drafted, accepted)[:, None]),
        ):
            part = values[:used, : 1 + limit]
            part *= _KEEP
            part += added

    def add_round(
        self,
        # [num_reqs] most draft tokens of each
        limits: np.ndarray,
        # [num_reqs] exits that each might have used
        used: np.ndarray,
        # [num_reqs]
        num_drafts: np.ndarray,
        # [num_reqs, K] exit index of each draft token
        exits: np.ndarray,
        # [exits] heads evaluated, by requests
        evaluated: np.ndarray,
    ) -> None:
        """A draft loop that has ended."""
        made = np.arange(exits.shape[1]) < num_drafts[:, None]
        tries = np.minimum(num_drafts + 1, limits)
        for exit_index in range(self.num_exits):
            # The last exit in use had all tries at which no other was confident.
            shallower = (made & (exits < exit_index)).sum(axis=1)
            here = used > exit_index
            self.reached[exit_index] += float((tries - shallower)[here].sum())
            self.confident[exit_index] += float((made & (exits == exit_index)).sum())
        self.evaluated += evaluated
        drafting = limits > 0
        keep = _KEEP ** np.count_nonzero(drafting)
        for values in (self.reached, self.confident, self.evaluated):
            values[: int(used[drafting].max(initial=0))] *= keep

    def make_room(self) -> None:
        """What is known may be of other text: let a few new windows and tries outweigh it."""
        factor = STALE_WINDOWS / np.maximum(self.windows, STALE_WINDOWS)
        for values in (self.windows, self.drafted, self.accepted):
            values *= factor
        factor = STALE_WINDOWS / np.maximum(self.reached, STALE_WINDOWS)
        for values in (self.reached, self.confident, self.evaluated):
            values *= factor

    def knows(self, drafts: int) -> bool:
        """Whether enough windows were tried with so many draft tokens, at all exits."""
        return bool(self.windows[-1, drafts] >= LEAST_WINDOWS and self.reached[0] >= LEAST_WINDOWS)

    def chances(self) -> np.ndarray:
        """Share of tries that come to an exit whose head is confident there, ``[exits]``."""
        return self.confident / np.maximum(self.reached, 1.0)

    def evaluated_in_vain(self) -> np.ndarray:
        """Heads evaluated in vain for each try that comes to an exit, ``[exits]``."""
        return np.maximum(self.evaluated - self.confident, 0.0) / np.maximum(self.reached, 1.0)
