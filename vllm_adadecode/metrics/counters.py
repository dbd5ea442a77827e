"""Counts of what the method did, kept by each worker.

Owns the numbers behind `adadecode_stats`, the Prometheus metrics, the log line and the tables of
benchmarks; counting never touches the device.
"""

from dataclasses import asdict, dataclass, fields
from typing import Any, Self


@dataclass
class ExitCounters:
    """Of one exit layer: gates and heads evaluated, draft tokens, and how many were accepted.

    Evaluations are counted by requests whose newest token was looked at, and heads by batches too.
    """

    gates_evaluated: int = 0
    heads_evaluated: int = 0
    # Each batch reads the head and the LM head once for all its requests.
    head_batches: int = 0
    draft_tokens: int = 0
    # Requests that went on to the next exit: the head was not confident, or the gate skipped it.
    next_exit: int = 0
    accepted_tokens: int = 0
    rejected_tokens: int = 0


@dataclass
class Counters:
    """Totals since start, or between two moments (`-`).

    *Layers* are layers executed, each once per batch of any size; *token-layers* weight them with
    the tokens in the batch. Those of verification, and the tokens it generates, are counted for
    batches without prefill only, where a token's cost is the method's alone; mixed steps, prefill
    beside deferred states, have counts of their own.
    """

    num_layers: int
    exits: dict[int, ExitCounters]
    # One verification step per request and decode step, and the tokens that they generated.
    verification_steps: int = 0
    generated_tokens: int = 0
    draft_layers: int = 0
    verification_layers: int = 0
    draft_token_layers: int = 0
    verify_token_layers: int = 0
    # Decode steps that started from deferred states, that had none, and steps with prefill.
    deferred_steps: int = 0
    plain_steps: int = 0
    prefill_steps: int = 0
    # Of all steps, those prepared before the host knew their draft tokens: it did not wait.
    overlapped_steps: int = 0
    # Of the steps with prefill, those that had deferred states too: their layers, and what prefill
    # and verification, each in its own tokens, took of those.
    mixed_steps: int = 0
    mixed_layers: int = 0
    mixed_prefill_token_layers: int = 0
    mixed_verify_token_layers: int = 0
    # Tokens that a verification took up from a deferred state, and tokens sampled after the last
    # layer, in all steps: the generated tokens that are not accepted draft tokens.
    deferred_tokens: int = 0
    sampled_tokens: int = 0

    @classmethod
    def create(cls, num_layers: int, exit_layers: tuple[int, ...]) -> "Counters":
        return cls(num_layers=num_layers, exits={e: ExitCounters() for e in exit_layers})

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
        exits = {
            layer: ExitCounters(**_sums(counts, other.exits[layer], sign))
            for layer, counts in self.exits.items()
        }
        return Counters(self.num_layers, exits, **_sums(self, other, sign))

    def snapshot(self) -> dict[str, Any]:
        """All counts and the ratios users ask for, JSON-ready; a ratio without data is None."""
        drafts, accepted, rejected = (
            sum(getattr(e, name) for e in self.exits.values())
            for name in ("draft_tokens", "accepted_tokens", "rejected_tokens")
        )
        layers = self.draft_layers + self.verification_layers
        values = asdict(self)
        values["exits"] = {str(layer): asdict(e) for layer, e in self.exits.items()}
        values |= {
            "draft_tokens": drafts,
            "accepted_tokens": accepted,
            "draft_acceptance_rate": _ratio(accepted, accepted + rejected),
            "mean_acceptance_length": _ratio(self.generated_tokens, self.verification_steps),
            # As a fraction of all target layers: 1.0 for vanilla decoding.
            "layers_executed_per_token": _ratio(layers, self.num_layers * self.generated_tokens),
        }
        return values


def _sums(a: Any, b: Any, sign: int) -> dict[str, int]:
    # int: NumPy's integers cannot be sent between processes.
    return {name: int(getattr(a, name)) + sign * int(getattr(b, name)) for name in _COUNTS[type(a)]}


def _ratio(part: int, whole: int) -> float | None:
    return part / whole if whole else None


# By class, the fields that count: they have a default, 0; the others are not counts.
_COUNTS: dict[type, tuple[str, ...]] = {
    kind: tuple(field.name for field in fields(kind) if field.default == 0)
    for kind in (Counters, ExitCounters)
}
