"""Counts of what the method did, kept by each worker.

Owns the numbers behind `adadecode_stats`, the log line and the demo's table; counting never
touches the device.
"""

from dataclasses import asdict, dataclass
from typing import Any


@dataclass
class ExitCounters:
    """Per exit layer: gate and head checks, drafts they gave, and what verification made of those.

    Both kinds of checks are counted by rows: one per request whose newest token was looked at.
    """

    gated: int = 0
    checked: int = 0
    drafted: int = 0
    accepted: int = 0
    rejected: int = 0


@dataclass
class Counters:
    """Totals since start (or the last `reset`).

    A *layer pass* is one layer run once on a batch of any size. Passes are counted for batches
    without prefill only, where a token's cost is the method's alone.
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

    @classmethod
    def create(cls, num_layers: int, exit_layers: tuple[int, ...]) -> "Counters":
        return cls(num_layers=num_layers, exits={e: ExitCounters() for e in exit_layers})

    @property
    def checked(self) -> int:
        """Head checks, of all exits."""
        return sum(e.checked for e in self.exits.values())

    def reset(self) -> None:
        fresh = Counters.create(self.num_layers, tuple(self.exits))
        self.__dict__.update(fresh.__dict__)

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


def _ratio(part: int, whole: int) -> float | None:
    return part / whole if whole else None
