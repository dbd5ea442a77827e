"""Chooses exits, thresholds, gate thresholds and K that pay best on held-out traces.

Owns the search and its honesty: settings are chosen on one half of the traces of every set, and
what is predicted for them is measured on the other half. A setting is only chosen if it pays on
every set; if none does, drafting is turned off, which costs nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import combinations

from vllm_adadecode.errors import AdaDecodeError
from vllm_adadecode.evaluation.costs import Costs
from vllm_adadecode.evaluation.metrics import Measurer, Metrics
from vllm_adadecode.evaluation.simulate import Setting
from vllm_adadecode.evaluation.trace import Trace
from vllm_adadecode.heads.config import default_exit_layers

COARSE_THRESHOLDS = (0.3, 0.5, 0.65, 0.75, 0.85, 0.95)
COARSE_DRAFTS = (2, 4, 6, 9, 14)
COARSE_GATES = (0.0, 0.2, 0.4, 0.6)
FINE_THRESHOLDS = (*(round(0.05 * i, 2) for i in range(2, 20)), 0.97, 0.99, 1.0)
FINE_GATES = tuple(round(0.05 * i, 2) for i in range(20))
FINE_DRAFTS = (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 12, 14, 16, 20, 24)
# With more exits than this, subsets of up to three and the whole are tried, not all.
ALL_SUBSETS = 5
STARTS = 4
# A smaller gain on the choosing half is taken for noise.
LEAST_GAIN = 1e-3
# The best settings, which are much alike, are all held against the other half; if it refuses them,
# one in so many of the rest, before drafting is turned off.
CANDIDATES = 24
THINNED = 8
# How far below the wanted acceptance the other half may come out.
ACCEPTANCE_SLACK = 0.02
# What puts a setting that is not allowed below no drafting at all.
UNDER = 1e-6


@dataclass(frozen=True)
class Calibration:
    """What was chosen and what is to be expected of it.

    Attributes:
        settings: by name: ``calibrated``, the choice, thresholds of 1 throughout if nothing pays;
            ``paper``; ``before``, the heads' own.
        pays: whether anything does.
        costs: the prices it is chosen for.
        predictions: by name of set, then of setting, on the half that did not choose.
        settings_tried: evaluated in all.
    """

    settings: dict[str, Setting]
    pays: bool
    costs: Costs
    predictions: dict[str, dict[str, Metrics]]
    settings_tried: int

    @property
    def setting(self) -> Setting:
        """The choice."""
        return self.settings["calibrated"]


def paper_setting(exit_layers: Sequence[int], num_layers: int) -> Setting:
    """The paper's: threshold 0.75, K = 5, three exits, here those nearest to 1/4, 1/2 and 3/4."""
    left = list(exit_layers)
    chosen = set()
    for wanted in default_exit_layers(num_layers):
        if left:
            nearest = min(left, key=lambda e: (abs(e - wanted), e))
            left.remove(nearest)
            chosen.add(nearest)
    return Setting(tuple(0.75 if e in chosen else 1.0 for e in exit_layers), 5)


def calibrate(
    sets: Mapping[str, Sequence[Trace]],
    costs: Costs,
    current: Setting | None = None,
    has_gate: bool = False,
    least_acceptance: float = 0.0,
    most_drafts: int | None = None,
) -> Calibration:
    """Choose the setting with the most expected tokens a unit of cost.

    Sets weigh the same, whatever their size: what is maximised is the speed-up of a server that
    decodes as many tokens of each.

    Args:
        sets: traces by name, held out from training; at least two of each set.
        costs: of this target.
        current: the heads' setting so far; None: the paper's.
        has_gate: whether the heads have gates whose thresholds can be chosen.
        least_acceptance: smallest draft acceptance rate, on every set. What costs most at batch 1
            is layers run, which rejected draft tokens hardly add to; in large batches they do.
        most_drafts: largest K; None: any that is tried. K tokens of every request are reserved.

    Raises:
        AdaDecodeError: there is no set, one has fewer than two sequences, or ``least_acceptance``
            is no share, or ``most_drafts`` is below 1.
    """
    if most_drafts is not None and most_drafts < 1:
        raise AdaDecodeError(f"--most-drafts must be at least 1, not {most_drafts}")
    if not 0.0 <= least_acceptance <= 1.0:
        raise AdaDecodeError(f"--least-acceptance must lie in [0, 1], not {least_acceptance:g}")
    if not sets:
        raise AdaDecodeError("nothing to calibrate on: give --data")
    for name, traces in sets.items():
        if len(traces) < 2:
            raise AdaDecodeError(
                f"{name} has {len(traces)} usable sequence{'s' * (len(traces) != 1)}: calibration "
                "chooses on one half and predicts on the other, give at least two, better a hundred"
            )
    choosing = {name: Measurer(traces[0::2], costs) for name, traces in sets.items()}
    checking = {name: Measurer(traces[1::2], costs) for name, traces in sets.items()}
    first = next(iter(sets.values()))[0]
    num_exits = len(first.exit_layers)
    search = _Search(list(choosing.values()), num_exits, has_gate, least_acceptance, most_drafts)
    check = partial(score, list(checking.values()), least_acceptance - ACCEPTANCE_SLACK)
    setting = next((s for s in search.ranked() if check(s) > 1.0), None)
    paper = paper_setting(first.exit_layers, first.num_layers)
    settings = {
        "calibrated": setting or Setting.off(num_exits),
        "paper": paper,
        "before": current or paper,
    }
    predictions = {
        name: {which: measurer.measure(s) for which, s in settings.items()}
        for name, measurer in checking.items()
    }
    return Calibration(settings, setting is not None, costs, predictions, len(search.scores))


def score(measurers: Sequence[Measurer], least_acceptance: float, setting: Setting) -> float:
    """Speed-up over all sets, the harmonic mean: that of a server that decodes as many tokens of
    each. Below 1.0, and less the further off, where one set is slower than plain decoding or has a
    draft acceptance rate below ``least_acceptance``."""
    counts = [m.counts(setting) for m in measurers]
    speedups = [m.costs.speedup(c) for m, c in zip(measurers, counts, strict=True)]
    rates = [c.draft_acceptance_rate for c in counts]
    missing = max(0.0, least_acceptance - min((r for r in rates if r is not None), default=1.0))
    if missing or min(speedups) < 1.0:
        return min(1.0, *speedups) - missing - UNDER
    return len(speedups) / sum(1.0 / s for s in speedups)


class _Search:
    """A coarse grid over all, then one value at a time from the best of it."""

    def __init__(
        self,
        measurers: Sequence[Measurer],
        num_exits: int,
        has_gate: bool,
        least_acceptance: float,
        most_drafts: int | None,
    ) -> None:
        self.num_exits, self.has_gate = num_exits, has_gate
        self.coarse, self.fine = (_up_to(most_drafts, k) for k in (COARSE_DRAFTS, FINE_DRAFTS))
        self.score = partial(score, measurers, least_acceptance)
        self.scores: dict[Setting, float] = {}

    def ranked(self) -> list[Setting]:
        """The best settings, best first, none below 1.0."""
        for setting in self._grid():
            self._score(setting)
        for start in self._starts():
            self._climb(start)
        best = sorted(self.scores, key=lambda s: -self.scores[s])
        allowed = [s for s in best if self.scores[s] > 1.0]
        return allowed[:CANDIDATES] + allowed[CANDIDATES::THINNED]

    def _score(self, setting: Setting) -> float:
        if setting not in self.scores:
            self.scores[setting] = self.score(setting)
        return self.scores[setting]

    def _grid(self) -> Iterator[Setting]:
        gates = COARSE_GATES if self.has_gate else (None,)
        for subset in _subsets(self.num_exits):
            for threshold in COARSE_THRESHOLDS:
                values = tuple(threshold if e in subset else 1.0 for e in range(self.num_exits))
                for gate in gates:
                    closed = None if gate is None else (gate,) * self.num_exits
                    for drafts in self.coarse:
                        yield Setting(values, drafts, closed)

    def _starts(self) -> list[Setting]:
        """The best settings of different sets of exits."""
        found: dict[tuple[bool, ...], Setting] = {}
        for setting in sorted(self.scores, key=lambda s: -self.scores[s]):
            found.setdefault(setting.used, setting)
        return list(found.values())[:STARTS]

    def _climb(self, setting: Setting) -> None:
        """One value at a time, for as long as one of them gains."""
        exits = range(self.num_exits)
        moves: list[tuple[str, int]] = [("max_drafts", 0), *(("thresholds", e) for e in exits)]
        moves += [("gate_thresholds", e) for e in exits if self.has_gate]
        while True:
            before = self._score(setting)
            for name, e in moves:
                best = max(self._others(setting, name, e), key=self._score, default=setting)
                if self._score(best) > self._score(setting) + LEAST_GAIN:
                    setting = best
            if self._score(setting) <= before:
                return

    def _others(self, s: Setting, name: str, e: int) -> list[Setting]:
        """The setting with every value in turn of one of its fields, for exit number ``e``."""
        if name == "max_drafts":
            return [replace(s, max_drafts=k) for k in self.fine]
        if name == "thresholds":
            return [replace(s, thresholds=_put(s.thresholds, e, t)) for t in FINE_THRESHOLDS]
        if s.gate_thresholds is None or not s.used[e]:
            return []
        return [replace(s, gate_thresholds=_put(s.gate_thresholds, e, g)) for g in FINE_GATES]


def _up_to(most: int | None, drafts: tuple[int, ...]) -> tuple[int, ...]:
    if most is None:
        return drafts
    return (*(k for k in drafts if k < most), most)


def _subsets(num_exits: int) -> Iterable[tuple[int, ...]]:
    sizes: Iterable[int] = range(1, num_exits + 1)
    if num_exits > ALL_SUBSETS:
        sizes = (1, 2, 3, num_exits)
    return (subset for size in sizes for subset in combinations(range(num_exits), size))


def _put(values: tuple[float, ...], index: int, value: float) -> tuple[float, ...]:
    return (*values[:index], value, *values[index + 1 :])
