"""Adaptive draft length: how many draft tokens a round may have, and from which exits.

Owns the choice of what gives most tokens a second: what a batch's next draft tokens are expected to
bring and to cost; 0 of them if none pays. The more requests draft in step, the more likely one of
them is not confident and takes a round through all exits: large batches pay with the first exits
only, where a single request pays with all.

Latencies are measured at start (profile.py) and corrected by the rounds that follow
(step_times.py); what draft tokens bring is counted as they are verified (acceptance.py). All of it
is the same on all tensor-parallel ranks, so the choice is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from vllm_adadecode.adaptive.acceptance import AcceptanceStatistics
from vllm_adadecode.adaptive.step_times import Factors, RoundClock, StepTimes

# Once in so many rounds of a batch size, a few probe another choice, to see what that takes and
# brings by now: no draft tokens where there were some, more of them, and where there were none, as
# many as may be. Less often where probes would cost more than this share of the rounds.
PROBE_EVERY = 256
PROBE_ROUNDS = 3
PROBE_SHARE = 0.01
FIRST_PROBE = 32
# Drafting must promise so much more than decoding without: less than that is not measured.
MARGIN = 1.02
# What promises so nearly as much as the best is as good, and more draft tokens and exits tell more.
NEAR = 0.99
# Windows that speak for a draft token being as likely as others, against its own.
PRIOR = 4.0
# Rounds for which a choice holds.
REUSE = 16


@dataclass(frozen=True)
class RoundCosts:
    """Seconds of whole rounds, all requests of a batch doing the same.

    Attributes:
        batch_sizes: increasing, from 1.
        plain: ``[sizes]`` a round without drafting.
        failed: ``[sizes]`` what an attempt adds at which no head is confident; with gates, none is
            evaluated.
        extended: ``[sizes][exits]`` what a draft token adds that is made at this exit; with gates,
            only its head is evaluated.
        check: ``[sizes]`` what a head adds that a gate lets pass in vain; 0 without gates.
    """

    batch_sizes: tuple[int, ...]
    plain: tuple[float, ...]
    failed: tuple[float, ...]
    extended: tuple[tuple[float, ...], ...]
    check: tuple[float, ...]

    def at(self, values: Sequence[float], rows: np.ndarray) -> np.ndarray:
        """A column for batches of ``rows``, by interpolation; the nearest outside of the table."""
        return np.interp(rows, self.batch_sizes, values)

    def exit_column(self, exit_index: int) -> tuple[float, ...]:
        return tuple(row[exit_index] for row in self.extended)


class Choice(NamedTuple):
    """Most draft tokens of each request in a round, and the exits that may give them."""

    drafts: int
    exits: int


@dataclass(frozen=True)
class _Plan:
    """For a batch of one size, from now on.

    Attributes:
        until: the round that ends it.
        choice: what holds; ``less`` and ``more`` are tried in between.
        less_every, more_every: rounds between such tries.
        seconds: expected, ``[exits, 1 + K]``.
    """

    until: int
    choice: Choice
    less: Choice
    more: Choice
    less_every: float
    more_every: float
    seconds: np.ndarray


@dataclass
class _Probes:
    """When something else is tried at one batch size."""

    rounds: int = PROBE_EVERY - FIRST_PROBE
    left: int = 0
    upwards: bool = False

    def instead(self, plan: _Plan) -> Choice:
        """What holds for this round, the plan's choice or a probe."""
        if self.left == 0:
            self.rounds += 1
            turn = plan.choice.drafts == 0 or (not self.upwards and plan.choice != plan.more)
            if self.rounds < (plan.more_every if turn else plan.less_every):
                return plan.choice
            self.rounds, self.left, self.upwards = 0, PROBE_ROUNDS, turn
        self.left -= 1
        return plan.more if self.upwards else plan.less


class AdaptiveDraftLength:
    """Chooses the most draft tokens of each round, and the exits that it may use.

    Args:
        costs: of this target on this machine.
        max_drafts: K, never exceeded.
        num_exits: exits in use.
        share: the first tensor-parallel rank's factors of a batch size, in place of one's own:
            ranks may see them differently.
    """

    def __init__(
        self,
        costs: RoundCosts,
        max_drafts: int,
        num_exits: int,
        share: Callable[[int, Factors], Factors] = lambda size, own: own,
    ) -> None:
        self.costs, self.most = costs, Choice(max_drafts, num_exits)
        self.share = share
        self.statistics = AcceptanceStatistics(max_drafts, num_exits)
        self.times = StepTimes()
        self._clock = RoundClock()
        self._rounds = 0
        self._plans: dict[int, _Plan] = {}  # by requests
        self._probes: dict[int, _Probes] = {}
        # Of the round under way: requests that may draft, what holds for them, and its seconds.
        self._now = 0, self.most, 0.0

    def choose(self, num_reqs: int) -> Choice:
        """For the next round, of ``num_reqs`` requests that may draft."""
        self._rounds += 1
        plan = self._plans.get(num_reqs)
        if plan is None or self._rounds >= plan.until:
            plan = self._plans[num_reqs] = self._plan(num_reqs)
        probes = self._probes.setdefault(num_reqs.bit_length(), _Probes())
        before = probes.left
        choice = probes.instead(plan)
        self._now = num_reqs, choice, float(plan.seconds[choice.exits - 1, choice.drafts])
        if before == 0 < probes.left and plan.choice.drafts == 0:
            # Without draft tokens nothing is learned but from these few rounds.
            self.statistics.make_room()
        return choice

    def _plan(self, num_reqs: int) -> _Plan:
        tokens, seconds = self.expected(num_reqs)
        factors = self._factors(num_reqs)
        rates = self._rates(tokens, seconds, factors)
        choice, less = self._best(rates), Choice(0, self.most.exits)
        more = self.most
        if choice.drafts:
            more = more._replace(drafts=min(2 * choice.drafts, more.drafts))
        taken = tokens / rates  # seconds, set right by what rounds took

        def every(other: Choice) -> float:
            at, there = (choice.exits - 1, choice.drafts), (other.exits - 1, other.drafts)
            lost = taken[there] / taken[at] * max(0.0, 1.0 - rates[there] / rates[at])
            return max(PROBE_EVERY, float(PROBE_ROUNDS * lost / PROBE_SHARE))

        # What was chosen without knowing anything holds for one round only.
        until = self._rounds + (REUSE if self._knows else 1)
        return _Plan(until, choice, less, more, every(less), every(more), seconds)

    def round_ended(self, requests: Sequence[str] | None, overlapped: bool = False) -> None:
        """A draft loop is over.

        Args:
            requests: as for `RoundClock.ended`.
            overlapped: whether the next batch was prepared before. Such a round ends later, so its
                time is told by another of its kind alone.
        """
        num_reqs, choice, expected = self._now
        self._now = 0, self.most, 0.0
        taken = self._clock.ended(requests if num_reqs else None, (choice, overlapped))
        if taken is not None:
            self.times.add(num_reqs, choice.drafts > 0, expected, taken)

    def best(self, num_reqs: int) -> Choice:
        """What gives most tokens a second; all that there may be while nothing is known about it.

        Without draft tokens it names all exits.
        """
        return self._best(self.rates(num_reqs))

    def rates(self, num_reqs: int) -> np.ndarray:
        """Expected tokens a second by exits and most draft tokens, ``[exits, 1 + K]``."""
        return self._rates(*self.expected(num_reqs), self._factors(num_reqs))

    def _factors(self, num_reqs: int) -> Factors:
        return self.share(num_reqs.bit_length(), self.times.factors(num_reqs))

    @property
    def _knows(self) -> bool:
        return self.statistics.knows(self.most.drafts)

    def _best(self, rates: np.ndarray) -> Choice:
        if not self._knows:
            return self.most
        if rates.max() <= MARGIN * rates[0, 0]:
            return Choice(0, self.most.exits)
        return _best_of(rates)

    def _rates(self, tokens: np.ndarray, seconds: np.ndarray, factors: Factors) -> np.ndarray:
        drafting = factors.of(drafting=True)
        seconds = seconds * drafting
        seconds[:, 0] *= factors.of(drafting=False) / drafting
        return np.asarray(tokens / seconds)

    def expected(self, num_reqs: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens of a round, and its seconds as measured at start, ``[exits, 1 + K]`` each, by
        exits and most draft tokens."""
        found = self.statistics
        alive, kept = (_shares(found.windows, of) for of in (found.drafted, found.accepted))
        tokens = num_reqs * kept.cumsum(axis=1)
        seconds = np.full_like(tokens, self.costs.at(self.costs.plain, np.array(num_reqs)))
        for exits in range(1, 1 + self.most.exits):
            tries = self._try_seconds(exits, num_reqs * alive[exits - 1, :-1])
            seconds[exits - 1, 1:] += tries.cumsum()
        return tokens, seconds

    def _try_seconds(self, exits: int, rows: np.ndarray) -> np.ndarray:
        """Of one more draft token tried from the newest token of ``rows`` requests, in expectation.

        They go in step: a span runs if one of them needs it, and costs what so many rows cost.
        """
        costs, chances = self.costs, self.statistics.chances()[:exits]
        evaluated_in_vain = self.statistics.evaluated_in_vain()
        happens, rows = np.minimum(rows, 1.0), np.maximum(rows, 1.0)
        all_fail = np.prod(1.0 - chances) ** rows
        seconds = all_fail * costs.at(costs.failed, rows) * (exits / self.most.exits)
        before: tuple[float, ...] = (0.0,) * len(costs.batch_sizes)
        reached, in_vain = 1.0, 0.0
        for exit_index, chance in enumerate(chances):
            column = costs.exit_column(exit_index)
            step = [a - b for a, b in zip(column, before, strict=True)]
            some = 1.0 - (1.0 - reached) ** rows
            # Where all fail, the spans are verification's, only earlier.
            spans = costs.at(step, np.maximum(rows * reached, 1.0))
            seconds += np.maximum(some - all_fail, 0.0) * spans
            in_vain += reached * float(evaluated_in_vain[exit_index])
            before, reached = column, reached * (1.0 - float(chance))
        return np.asarray(happens * (seconds + in_vain * costs.at(costs.check, rows)))


def _best_of(rates: np.ndarray) -> Choice:
    """The most exits, and then draft tokens, of all that are as good as the best."""
    last = np.flatnonzero(rates >= NEAR * rates.max())[-1]
    exits, drafts = np.unravel_index(last, rates.shape)
    return Choice(int(drafts), 1 + int(exits))


def _shares(windows: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Share of windows that reach each number of draft tokens, ``[exits, 1 + K]``.

    A chain of chances from each draft to the next. One that was seldom reached is taken to be like
    the others: a few windows that happened to end early must not rule out all that is behind.
    """
    share = counts / np.maximum(windows, 1e-9)
    share[:, 0] = 1.0  # the token that is sampled
    tries = windows[:, 1:] * share[:, :-1]
    hits = np.minimum(windows[:, 1:] * share[:, 1:], tries)
    pooled = hits.sum(axis=1, keepdims=True) / np.maximum(tries.sum(axis=1, keepdims=True), 1e-9)
    share[:, 1:] = ((hits + PRIOR * pooled) / (tries + PRIOR)).cumprod(axis=1)
    return share
