"""Counts what the engine would do on known generations, without running it (batch 1, greedy).

Owns the replay of decode steps (draft/host_loop.py, verify/forward.py) on traces. A draft phase
ends as in the engine: after K draft tokens, at the end of the request, or where no head is
confident; what draft tokens had deferred is filled in with the last one, so a step executes the
exit layer's depth for each draft token and all layers once.

Behind a wrong draft token the engine goes on drafting on a text that no trace has: until the step
ends, what it does there is read off the true text. Generated tokens, verification steps and
accepted tokens do not depend on it; layers executed and evaluations do, a little
(tests/engine/test_simulate_engine.py compares).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vllm_adadecode.errors import AdaDecodeError
from vllm_adadecode.evaluation.trace import Trace


@dataclass(frozen=True)
class Setting:
    """What a user can choose without training again.

    Attributes:
        thresholds: gamma per exit layer of the traces, in [0, 1]; 1 turns an exit off.
        max_drafts: K, most draft tokens of a step.
        gate_thresholds: per exit layer, in [0, 1]: its head is evaluated where gate > threshold; 0
            evaluates it always, without the gate; 1 turns the exit off. None: no gates.
    """

    thresholds: tuple[float, ...]
    max_drafts: int = 5
    gate_thresholds: tuple[float, ...] | None = None

    @classmethod
    def off(cls, num_exits: int) -> Setting:
        """No drafting at all."""
        return cls((1.0,) * num_exits, 1)

    @property
    def used(self) -> tuple[bool, ...]:
        """Per exit, whether its head can draft: a probability is never above 1."""
        gates = self.gate_thresholds or (0.0,) * len(self.thresholds)
        return tuple(t < 1.0 and g < 1.0 for t, g in zip(self.thresholds, gates, strict=True))

    @property
    def gated(self) -> tuple[bool, ...]:
        """Per exit, whether its gate is evaluated before its head."""
        gates = self.gate_thresholds or (0.0,) * len(self.thresholds)
        return tuple(use and g > 0.0 for use, g in zip(self.used, gates, strict=True))


@dataclass(frozen=True)
class ExitCounts:
    """Of one exit layer, as `counters.ExitCounters`."""

    gates_evaluated: int = 0
    heads_evaluated: int = 0
    draft_tokens: int = 0
    accepted_tokens: int = 0


@dataclass(frozen=True)
class Counts:
    """Totals over decode steps. A layer executed is one layer run once, on however many tokens."""

    num_layers: int
    generated_tokens: int
    layers_executed: int
    verification_steps: int
    exits: tuple[ExitCounts, ...]

    def _total(self, name: str) -> int:
        return sum(getattr(e, name) for e in self.exits)

    @property
    def gates_evaluated(self) -> int:
        return self._total("gates_evaluated")

    @property
    def heads_evaluated(self) -> int:
        return self._total("heads_evaluated")

    @property
    def draft_tokens(self) -> int:
        return self._total("draft_tokens")

    @property
    def accepted_tokens(self) -> int:
        return self._total("accepted_tokens")

    @property
    def draft_acceptance_rate(self) -> float | None:
        """Share of draft tokens that verification accepted; None without any."""
        return self.accepted_tokens / self.draft_tokens if self.draft_tokens else None

    @property
    def mean_acceptance_length(self) -> float:
        """Tokens generated per verification step: 1 in plain decoding."""
        return self.generated_tokens / self.verification_steps

    @property
    def layers_executed_per_token(self) -> float:
        """As a fraction of all layers: 1 in plain decoding."""
        return self.layers_executed / (self.generated_tokens * self.num_layers)


class Simulator:
    """Replays decode steps on a set of traces; made once, run for as many settings as wanted.

    Args:
        traces: of one target with the same exit layers.

    Raises:
        AdaDecodeError: there is no trace, or they are of different exit layers or targets.
    """

    def __init__(self, traces: Sequence[Trace]) -> None:
        if not traces:
            raise AdaDecodeError("no traces: give data with at least one sequence")
        first = traces[0]
        if any(
            (t.exit_layers, t.num_layers) != (first.exit_layers, first.num_layers) for t in traces
        ):
            raise AdaDecodeError(
                "traces of different exit layers or targets can't be counted together"
            )
        self.exit_layers, self.num_layers = first.exit_layers, first.num_layers
        lengths = np.array([t.num_positions for t in traces])
        ends = np.cumsum(lengths)
        # End of the trace that each position belongs to, and the first position of each trace.
        self._end = np.repeat(ends, lengths)
        self._starts = (ends - lengths)[lengths > 0]
        # [E, total positions]
        self.confidence = np.concatenate([t.confidence for t in traces], axis=1)
        self.gate = np.concatenate([t.gate for t in traces], axis=1)
        self._correct = np.concatenate([t.correct for t in traces], axis=1)

    def run(self, setting: Setting) -> Counts:
        """All decode steps of all traces under ``setting``.

        Raises:
            AdaDecodeError: the setting has other exits than the traces, or a value out of range.
        """
        self._check(setting)
        used = np.array(setting.used)
        if not used.any():
            tokens = len(self._end)
            none = tuple(ExitCounts() for _ in used)
            return Counts(self.num_layers, tokens, tokens * self.num_layers, tokens, none)
        plan = _Attempts(self, setting, used)
        starts, drafts, accepted, attempts = self._rounds(plan, setting.max_drafts)
        # How many steps have tried, drafted and accepted at each position.
        total = len(self._end)
        tried, drafted, kept = (
            _coverage(starts, starts + lengths, total) for lengths in (attempts, drafts, accepted)
        )
        draft_layers = plan.layers.astype(np.float64) @ drafted
        per_exit = (
            _weighted(plan.gates, tried),
            _weighted(plan.heads, tried),
            _weighted(plan.chosen, drafted),
            _weighted(plan.chosen, kept),
        )
        exits = tuple(ExitCounts(*values) for values in zip(*per_exit, strict=True))
        return Counts(
            num_layers=self.num_layers,
            generated_tokens=int((accepted + 1).sum()),
            layers_executed=int(draft_layers) + self.num_layers * len(starts),
            verification_steps=len(starts),
            exits=exits,
        )

    def _rounds(
        self, plan: _Attempts, max_drafts: int
    ) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        """First position, draft tokens, accepted ones and tries to draft, of every step."""
        positions = np.arange(len(self._end))
        # A draft token is followed by at least the token sampled after it.
        limit = np.minimum(max_drafts, self._end - positions - 1)
        drafts = np.minimum(limit, _run_lengths(plan.drafts_here, self._end))
        accepted = np.minimum(drafts, _run_lengths(plan.right_here, self._end))
        following = positions + accepted + 1
        found, active = [], self._starts
        while active.size:
            found.append(active)
            follow = following[active]
            active = follow[follow < self._end[active]]
        # In order, for the sake of the memory that is read from here on.
        starts = np.sort(np.concatenate(found)) if found else positions[:0]
        drafts, accepted = drafts[starts], accepted[starts]
        # Below its limit, a draft phase has ended with a try that gave nothing.
        return starts, drafts, accepted, drafts + (drafts < limit[starts])

    def _check(self, setting: Setting) -> None:
        num_exits = len(self.exit_layers)
        for name in ("thresholds", "gate_thresholds"):
            values = getattr(setting, name)
            if values is not None and (
                len(values) != num_exits or not all(0.0 <= v <= 1.0 for v in values)
            ):
                raise AdaDecodeError(
                    f"{name} must be {num_exits} numbers in [0, 1], one per exit, not {values}"
                )
        if setting.max_drafts < 1:
            raise AdaDecodeError(f"K must be at least 1, not {setting.max_drafts}")


class _Attempts:
    """What trying to draft would do at each position.

    Attributes:
        drafts_here, right_here: bool ``[P]``, whether some head drafts, and rightly so.
        layers: int64 ``[P]``, layers that the draft token takes; meaningless without one.
        gates, heads, chosen: bool ``[E, P]``, what is evaluated, and the head that drafts.
    """

    def __init__(self, sim: Simulator, setting: Setting, used: NDArray[np.bool_]) -> None:
        num_exits = len(used)
        gated = np.array(setting.gated)
        gate_thresholds = np.array(setting.gate_thresholds or (0.0,) * num_exits)
        # Float32 as in the engine; a NaN is never above a threshold.
        thresholds = np.array(setting.thresholds, dtype=np.float32)[:, None]
        is_open = used[:, None] & (
            ~gated[:, None] | (sim.gate > gate_thresholds.astype(np.float32)[:, None])
        )
        confident = is_open & (sim.confidence > thresholds)
        self.drafts_here: NDArray[np.bool_] = np.asarray(confident.any(axis=0))
        last_used = int(np.flatnonzero(used)[-1])
        first = np.where(self.drafts_here, confident.argmax(axis=0), last_used)
        reached = np.arange(num_exits)[:, None] <= first
        chosen = (np.arange(num_exits)[:, None] == first) & self.drafts_here
        self.right_here: NDArray[np.bool_] = np.asarray((chosen & sim._correct).any(axis=0))
        self.layers = np.array(sim.exit_layers)[first]
        self.gates = reached & gated[:, None]
        self.heads = reached & is_open
        self.chosen = chosen


def simulate(traces: Sequence[Trace], setting: Setting) -> Counts:
    """`Simulator.run` for a single setting."""
    return Simulator(traces).run(setting)


def _coverage(begin: NDArray[np.int64], end: NDArray[np.int64], total: int) -> NDArray[np.float64]:
    """How many of the ranges [begin, end) hold each position, ``[total]``."""
    steps = np.bincount(begin, minlength=total + 1) - np.bincount(end, minlength=total + 1)
    return np.cumsum(steps)[:total].astype(np.float64)


def _weighted(flags: NDArray[np.bool_], weights: NDArray[np.float64]) -> list[int]:
    """Weights where flags are set, summed over positions, ``[E, P]`` to ``[E]``.

    Sums of whole numbers below 2 ** 53: exact.
    """
    sums = flags.astype(np.float64) @ weights
    return [round(value) for value in sums.tolist()]


def _run_lengths(flags: NDArray[np.bool_], end: NDArray[np.int64]) -> NDArray[np.int64]:
    """How many positions in a row are set from each position on, within its trace."""
    positions = np.arange(len(flags))
    stops = np.where(flags, len(flags), positions)
    # The nearest position at or behind each one that is not set.
    stops = np.minimum.accumulate(stops[::-1])[::-1]
    return np.minimum(stops, end) - positions
