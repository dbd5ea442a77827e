"""How many drafts a round may make: the number that gives most tokens a second, 0 if none pays.

Owns what a batch's next drafts are expected to bring and to cost, and the choice between them.
Costs are measured at start (`startup_costs.py`) and set right by the rounds that follow
(`round_times.py`); what drafts bring is counted as they are verified. All of it is the same on all
tensor-parallel ranks, so the choice is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from vllm_adadecode.round_times import RoundClock, RoundTimes

# Windows after which an old one counts half: some hundred tokens of text at batch 1.
HALF_LIFE = 256
# Weight of windows without which nothing is known about a draft: until then, it is tried.
LEAST_WINDOWS = 8.0
# Once in so many rounds of a batch size, a few do something else, to see what that takes and brings
# by now: none where there were drafts, more drafts, or a few where there were none. All that there
# may be would cost a large batch many rounds.
PROBE_EVERY = 256
PROBE_ROUNDS = 3
PROBE_DRAFTS = 2
FIRST_PROBE = 32
# Drafting must promise so much more than decoding without: less than that is not measured.
MARGIN = 1.02
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


@dataclass
class _Probes:
    """When something else is tried at one batch size."""

    rounds: int = PROBE_EVERY - FIRST_PROBE
    left: int = 0
    drafts: int = 0
    upwards: bool = False

    def instead(self, chosen: int, max_drafts: int) -> int:
        """The drafts of this round, ``chosen`` or a probe's."""
        if self.left == 0:
            self.rounds += 1
            if self.rounds < PROBE_EVERY:
                return chosen
            self.rounds, self.left = 0, PROBE_ROUNDS
            self.upwards = chosen == 0 or (not self.upwards and chosen < max_drafts)
            more = max(2 * chosen, PROBE_DRAFTS)
            self.drafts = min(more, max_drafts) if self.upwards else 0
        self.left -= 1
        return self.drafts


class DraftBudget:
    """Chooses the most drafts of each round.

    Args:
        costs: of this target on this machine.
        max_drafts: K, never exceeded.
        num_exits: exits that the policy uses.
        share: the first tensor-parallel rank's value of what ranks may see differently.
    """

    def __init__(
        self,
        costs: RoundCosts,
        max_drafts: int,
        num_exits: int,
        share: Callable[[tuple[float, float]], tuple[float, float]] = lambda value: value,
    ) -> None:
        self.costs, self.max_drafts, self.num_exits = costs, max_drafts, num_exits
        self.share = share
        self.statistics = DraftStatistics(max_drafts, num_exits)
        self.times = RoundTimes()
        self._clock = RoundClock()
        self._rounds = 0
        # By requests: the round that ends a choice, the choice, expected seconds by most drafts.
        self._chosen: dict[int, tuple[int, int, np.ndarray]] = {}
        self._probes: dict[int, _Probes] = {}
        # Of the round under way: requests that may draft, and their most drafts.
        self._now = (0, 0)

    def choose(self, num_reqs: int) -> int:
        """Most drafts of the next round, for ``num_reqs`` requests that may draft."""
        self._rounds += 1
        known = self._chosen.get(num_reqs)
        if known is None or self._rounds >= known[0]:
            expected = self.expected(num_reqs)
            # What was chosen without knowing anything holds for one round only.
            until = self._rounds + (REUSE if self._knows else 1)
            known = until, self._best(num_reqs, *expected), expected[1]
            self._chosen[num_reqs] = known
        probes = self._probes.setdefault(num_reqs.bit_length(), _Probes())
        self._now = num_reqs, probes.instead(known[1], self.max_drafts)
        return self._now[1]

    def round_ended(self, requests: Sequence[str] | None) -> None:
        """A draft loop is over; ``requests`` as for `RoundClock.ended`."""
        num_reqs, drafts = self._now
        self._now = (0, 0)
        taken = self._clock.ended(requests if num_reqs else None, drafts)
        if taken is not None:
            expected = self._chosen[num_reqs][2][drafts]
            self.times.add(num_reqs, drafts > 0, float(expected), taken)

    def best(self, num_reqs: int) -> int:
        """The number of drafts with the most tokens a second; the largest while nothing is known
        about it."""
        return self._best(num_reqs, *self.expected(num_reqs))

    def rates(self, num_reqs: int) -> np.ndarray:
        """Expected tokens a second by most drafts, ``[1 + K]``."""
        return self._rates(num_reqs, *self.expected(num_reqs))

    @property
    def _knows(self) -> bool:
        return self.statistics.knows(self.max_drafts)

    def _best(self, num_reqs: int, tokens: np.ndarray, seconds: np.ndarray) -> int:
        if not self._knows:
            return self.max_drafts
        rates = self._rates(num_reqs, tokens, seconds)
        drafts = int(np.argmax(rates))
        return drafts if rates[drafts] > MARGIN * rates[0] else 0

    def _rates(self, num_reqs: int, tokens: np.ndarray, seconds: np.ndarray) -> np.ndarray:
        plain, drafting = self.share(self.times.factors(num_reqs))
        seconds = seconds * drafting
        seconds[0] *= plain / drafting
        return tokens / seconds

    def expected(self, num_reqs: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens of a round and its seconds, by most drafts, ``[1 + K]`` each; as costs say."""
        found, known = self.statistics, np.maximum(self.statistics.windows, 1e-9)
        alive, kept = found.drafted / known, found.accepted / known
        tokens, seconds = np.empty(1 + self.max_drafts), np.empty(1 + self.max_drafts)
        tokens[0], seconds[0] = num_reqs, self.costs.at(self.costs.plain, num_reqs)
        for draft in range(1, 1 + self.max_drafts):
            rows = num_reqs * float(alive[draft - 1])
            seconds[draft] = seconds[draft - 1] + self._attempt_seconds(rows)
            tokens[draft] = tokens[draft - 1] + num_reqs * float(kept[draft])
        return tokens, seconds

    def _attempt_seconds(self, rows: float) -> float:
        """Of one more draft tried from the newest token of ``rows`` requests, in expectation.

        They go in step: a span runs if one of them needs it, and costs what so many rows cost.
        """
        found, costs = self.statistics, self.costs
        attempts = max(found.attempts, 1.0)
        followed = found.exits / attempts
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
        in_vain = max(0.0, (found.checks - float(found.exits.sum())) / attempts)
        return happens * (seconds + in_vain * costs.at(costs.check, rows))
