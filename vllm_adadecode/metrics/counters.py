"""Counts of what the method did, kept by each worker.

Owns the numbers behind `adadecode_stats`, the Prometheus metrics, the log line and the demo's
table; counting never touches the device.
"""

from dataclasses import asdict, dataclass, fields
from typing import Any, Self

import numpy as np


@dataclass
class ExitCounters:
    """Per exit layer: gate and head checks, drafts they gave, and what verification made of those.

    Both kinds of checks are counted by rows, one per request whose newest token was looked at, and
    heads by batches as well.
    """

    gated: int = 0
    checked: int = 0
    # Head checks by batches: each reads the head and the LM head once for all its rows.
    head_passes: int = 0
    drafted: int = 0
    # Rows that went on through the next span, not confident or held back by the gate.
    promoted: int = 0
    accepted: int = 0
    rejected: int = 0


@dataclass
class Counters:
    """Totals since start, or between two moments (`-`).

    A *layer pass* is one layer run once on a batch of any size. Those of verification, and the
    tokens it emits, are counted for batches without prefill only, where a token's cost is the
    method's alone; mixed batches, prefill beside deferred states, have counts of their own.
    """

    num_layers: int
    exits: dict[int, ExitCounters]
    # Verified windows (one per request and round), and tokens those emitted.
    verifications: int = 0
    tokens: int = 0
    draft_layer_passes: int = 0
    verify_layer_passes: int = 0
    # Token-layers: layer passes weighted with the tokens in the batch.
    draft_token_layers: int = 0
    verify_token_layers: int = 0
    # Decode batches that started from deferred states, that had none, and batches with prefill.
    deferred_batches: int = 0
    plain_batches: int = 0
    prefill_batches: int = 0
    # Of all batches, those that were prepared before the host knew their drafts: it did not wait.
    open_batches: int = 0
    # Of the batches with prefill, those that had deferred states too: their layer passes, and what
    # prefill and verification, each in its own tokens, took of those.
    mixed_batches: int = 0
    mixed_layer_passes: int = 0
    mixed_prefill_token_layers: int = 0
    mixed_verify_token_layers: int = 0
    # Tokens that a verification took up from a deferred state, and tokens sampled after the last
    # layer, in all batches: the emitted tokens that are no accepted drafts.
    deferred_tokens: int = 0
    sampled_tokens: int = 0

    @classmethod
    def create(cls, num_layers: int, exit_layers: tuple[int, ...]) -> "Counters":
        return cls(num_layers=num_layers, exits={e: ExitCounters() for e in exit_layers})

    def checked(self, num_exits: int) -> np.ndarray:
        """Head checks at each of the first exits, ``[num_exits]``."""
        return np.array([e.checked for e in self.exits.values()][:num_exits])

    def __bool__(self) -> bool:
        """Whether anything was counted."""
        parts = (self, *self.exits.values())
        return any(getattr(part, name) for part in parts for name in _COUNTS[type(part)])

    def __add__(self, other: Self) -> "Counters":
        return self._combine(other, 1)

    def __sub__(self, earlier: Self) -> "Counters":
        """What was counted since ``earlier``, a former state of the same counters."""
        return self._combine(earlier, -1)

    def _combine(self, other: Self, sign: int) -> "Counters":
        result = Counters(self.num_layers, {})
        _combine_counts(result, self, other, sign)
        for layer, counts in self.exits.items():
            result.exits[layer] = ExitCounters()
            _combine_counts(result.exits[layer], counts, other.exits[layer], sign)
        return result

    def snapshot(self) -> dict[str, Any]:
        """All counts and the ratios users ask for, JSON-ready; a ratio without data is None."""
        drafted = sum(e.drafted for e in self.exits.values())
        accepted = sum(e.accepted for e in self.exits.values())
        rejected = sum(e.rejected for e in self.exits.values())
        passes = self.draft_layer_passes + self.verify_layer_passes
        values = asdict(self)
        values["exits"] = {str(layer): asdict(e) for layer, e in self.exits.items()}
        values |= {
            "drafted": drafted,
            "accepted": accepted,
            "acceptance_rate": _ratio(accepted, accepted + rejected),
            "tokens_per_verification": _ratio(self.tokens, self.verifications),
            # Share of the emitted tokens that were predicted early.
            "early_prediction_rate": _ratio(self.tokens - self.verifications, self.tokens),
            # Share of a full pass of all layers that an emitted token cost, 1.0 for vanilla.
            "layer_passes_per_token": _ratio(passes, self.num_layers * self.tokens),
        }
        return values


def _combine_counts(result: Any, a: Any, b: Any, sign: int) -> None:
    for name in _COUNTS[type(result)]:
        # int: NumPy's integers cannot be sent between processes.
        setattr(result, name, int(getattr(a, name)) + sign * int(getattr(b, name)))


def _ratio(part: int, whole: int) -> float | None:
    return part / whole if whole else None


# By class, the fields that count: they have a default, 0; the others are not counts.
_COUNTS: dict[type, tuple[str, ...]] = {
    kind: tuple(field.name for field in fields(kind) if field.default == 0)
    for kind in (Counters, ExitCounters)
}
