"""How many drafts a round may make: the number that gives most tokens a second, 0 if none pays.

Owns what a batch's next drafts are expected to bring and to cost, and the choice between them.
Costs are measured at start (`startup_costs.py`), what drafts bring is counted as they are verified.
Both are the same on all tensor-parallel ranks, so the choice is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

# Windows after which an old one counts half: some hundred tokens of text at batch 1.
HALF_LIFE = 256
# Weight of windows without which nothing is known about a draft: until then, it is tried.
LEAST_WINDOWS = 8.0
# One round in so many makes a few drafts where none or one seemed best, to see whether they pay by
# now. All that there may be would cost a large batch many rounds.
PROBE_EVERY = 128
PROBE_DRAFTS = 2
# Rounds for which a choice holds.
REUSE = 16


@dataclass(frozen=True)
class RoundCosts:
    """Seconds of whole rounds, all requests of a batch doing the same.

    Attributes:
        batch_sizes: increasing, from 1.
        plain: ``[sizes]`` a round without drafting.
        failed: ``[sizes]`` what an attempt adds that no head follows; with gates, none is asked.
        extended: ``[sizes][exits]`` what a draft adds that is made at this exit; with gates, only
            its head is asked.
        check: ``[sizes]`` what a head adds that a gate lets pass in vain; 0 without gates.
    """

    batch_sizes: tuple[int, ...]
    plain: tuple[float, ...]
    failed: tuple[float, ...]
    extended: tuple[tuple[float, ...], ...]
    check: tuple[float, ...]

    def at(self, values: Sequence[float], rows: float) -> float:
        """A column for a batch of ``rows``, by interpolation; the nearest outside of the table."""
        return float(np.interp(rows, self.batch_sizes, values))

    def exit_column(self, exit_index: int) -> tuple[float, ...]:
        return tuple(row[exit_index] for row in self.extended)


@dataclass
class DraftStatistics:
    """What became of drafts, the newer windows counting more.

    Attributes:
        max_drafts: K.
        windows: ``[1 + K]`` weight of windows that might have had so many drafts.
        drafted, accepted: ``[1 + K]`` of those, windows that had, and kept, so many.
        attempts: predictions tried from a token; ``exits`` of them gave a draft, by exit index;
            ``checks`` heads were asked.
    """

    max_drafts: int
    num_exits: int
    windows: np.ndarray = field(init=False)
    drafted: np.ndarray = field(init=False)
    accepted: np.ndarray = field(init=False)
    exits: np.ndarray = field(init=False)
    attempts: float = 0.0
    checks: float = 0.0

    def __post_init__(self) -> None:
        for name in ("windows", "drafted", "accepted"):
            setattr(self, name, np.zeros(1 + self.max_drafts))
        self.exits = np.zeros(self.num_exits)

    def add_window(self, limit: int, drafted: int, accepted: int) -> None:
        """A verified window that might have had ``limit`` drafts.

        Older ones fade as far as this one takes their place: what is known about more drafts than
        it could have stays until there is something newer.
        """
        if limit == 0:
            return
        self._fade(limit)
        counts = np.arange(1 + limit)
        self.windows[: 1 + limit] += 1.0
        self.drafted[: 1 + limit] += counts <= drafted
        self.accepted[: 1 + limit] += counts <= accepted

    def add_round(
        self,
        # [num_reqs] most drafts of each
        limits: np.ndarray,
        # [num_reqs]
        num_drafts: np.ndarray,
        # [num_reqs, K] exit index of each draft
        exits: np.ndarray,
        checks: int,
    ) -> None:
        """A draft loop that has ended."""
        made = np.arange(exits.shape[1]) < num_drafts[:, None]
        self.attempts += float(np.minimum(num_drafts + 1, limits).sum())
        self.exits += np.bincount(exits[made], minlength=self.num_exits)
        self.checks += checks

    def knows(self, drafts: int) -> bool:
        """Whether enough windows were tried with that many drafts."""
        return bool(self.windows[drafts] >= LEAST_WINDOWS and self.attempts >= LEAST_WINDOWS)

    def _fade(self, limit: int) -> None:
        keep = 0.5 ** (1 / HALF_LIFE)
        for values in (self.windows, self.drafted, self.accepted):
            values[: 1 + limit] *= keep
        self.exits *= keep
        self.attempts *= keep
        self.checks *= keep


class DraftBudget:
    """Chooses the most drafts of each round.

    Args:
        costs: of this target on this machine.
        max_drafts: K, never exceeded.
        num_exits: exits that the policy uses.
    """

    def __init__(self, costs: RoundCosts, max_drafts: int, num_exits: int) -> None:
        self.costs, self.max_drafts, self.num_exits = costs, max_drafts, num_exits
        self.statistics = DraftStatistics(max_drafts, num_exits)
        self._rounds = 0
        self._since_probe = 0
        # By batch size: the round of the choice, and the choice.
        self._chosen: dict[int, tuple[int, int]] = {}

    def choose(self, num_reqs: int) -> int:
        """Most drafts of the next round, for ``num_reqs`` requests that may draft."""
        self._rounds += 1
        at, drafts = self._chosen.get(num_reqs, (-REUSE, 0))
        if self._rounds - at >= REUSE:
            drafts = self.best(num_reqs)
            self._chosen[num_reqs] = (self._rounds, drafts)
        probe = min(PROBE_DRAFTS, self.max_drafts)
        self._since_probe = 0 if drafts >= probe else self._since_probe + 1
        if self._since_probe >= PROBE_EVERY:
            self._since_probe = 0
            return probe
        return drafts

    def best(self, num_reqs: int) -> int:
        """The number of drafts with the most tokens a second; the largest while nothing is known
        about it."""
        if not self.statistics.knows(self.max_drafts):
            return self.max_drafts
        rates = self.rates(num_reqs)
        return int(np.argmax(rates))

    def rates(self, num_reqs: int) -> np.ndarray:
        """Expected tokens a second by most drafts, ``[1 + K]``."""
        found, known = self.statistics, np.maximum(self.statistics.windows, 1e-9)
        alive, kept = found.drafted / known, found.accepted / known
        seconds = self.costs.at(self.costs.plain, num_reqs)
        tokens = float(num_reqs)
        rates = [tokens / seconds]
        for draft in range(1, 1 + self.max_drafts):
            seconds += self._attempt_seconds(num_reqs * float(alive[draft - 1]))
            tokens += num_reqs * float(kept[draft])
            rates.append(tokens / seconds)
        return np.array(rates)

    def _attempt_seconds(self, rows: float) -> float:
        """Of one more draft tried from the newest token of ``rows`` requests, in expectation.

        They go in step: a span runs if one of them needs it, and costs what so many rows cost.
        """
        found, costs = self.statistics, self.costs
        followed = found.exits / found.attempts
        fails = max(0.0, 1.0 - float(followed.sum()))
        happens = min(1.0, rows)
        rows = max(rows, 1.0)
        all_fail = fails**rows
        seconds = all_fail * costs.at(costs.failed, rows)
        before: tuple[float, ...] = (0.0,) * len(costs.batch_sizes)
        reached = 1.0
        for exit_index in range(self.num_exits):
            column = costs.exit_column(exit_index)
            step = [a - b for a, b in zip(column, before, strict=True)]
            some = 1.0 - (1.0 - reached) ** rows
            # Where all fail, the spans are verification's, only earlier.
            seconds += max(0.0, some - all_fail) * costs.at(step, max(1.0, rows * reached))
            before, reached = column, max(0.0, reached - float(followed[exit_index]))
        in_vain = max(0.0, (found.checks - float(found.exits.sum())) / found.attempts)
        return happens * (seconds + in_vain * costs.at(costs.check, rows))
