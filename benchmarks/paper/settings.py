"""AdaDecode as the paper's experiments want it: one gamma, no draft token, no verification.

Owns the speculative configuration of each, and the names by which a comparison knows them. Nothing
in the plugin turns verification off: that is vLLM's own `synthetic` acceptance, which exists for
benchmarks and has to be asked for by name, here at a rate of 1 for every draft token.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.compare.figures import OURS
from benchmarks.compare.methods import kind
from vllm_adadecode.errors import AdaDecodeError
from vllm_adadecode.heads import HeadsConfig

VANILLA = "vanilla"
# A second server without the method: what its figures differ by is not the method's.
CONTROL = "vanilla@again"
UNVERIFIED = "-unverified"
# A probability is never above it.
OFF = 1.0


def name_of(gamma: float) -> str:
    """The method's name in a comparison when all exits in use have this threshold."""
    return f"{OURS}@{gamma:g}"


def gamma_of(name: str) -> float | None:
    """Of a name of `name_of`; None for every other method."""
    label = name.partition("@")[2]
    if kind(name) != OURS or not label or label.endswith(UNVERIFIED):
        return None
    return float(label)


@dataclass(frozen=True)
class Settings:
    """Heads, and what all variants of them share.

    Attributes:
        heads: their configuration; of the logit lens where the target has none.
        folder: of the heads if named by the user; None: those beside the target, if any.
        draft_tokens: most in one decode step; None: as many as the heads say.
        gates: whether the heads' gates decide which heads are evaluated. The paper has none.
    """

    heads: HeadsConfig
    folder: str | None = None
    draft_tokens: int | None = None
    gates: bool = True

    def variants(self, gammas: Sequence[float]) -> Mapping[str, Mapping[str, Any]]:
        """The speculative configuration of each method of the comparison, in order of their turns.

        What is compared on times has its turns next to vanilla's. Verification is turned off at
        the lowest gamma, where it has most to do.
        """
        low = min(gammas)
        return {
            name_of(OFF): self.at(OFF),
            VANILLA: {},
            CONTROL: {},
            **{name_of(gamma): self.at(gamma) for gamma in gammas},
            name_of(low) + UNVERIFIED: self.unverified(low),
        }

    def at(self, gamma: float) -> dict[str, Any]:
        """Options of `--speculative-config` with one threshold for all exits in use.

        Raises:
            AdaDecodeError: no exit is in use.
        """
        used = self._used()
        if not any(used):
            raise AdaDecodeError(
                "the heads' own thresholds turn every exit off: name other heads with --heads"
            )
        options: dict[str, Any] = {
            "confidence_threshold": [gamma if use else OFF for use in used],
            "num_speculative_tokens": self._draft_tokens(),
            # The paper's rule, which the threshold alone decides.
            "cost_aware": False,
        }
        if self.folder is not None:
            options["model"] = self.folder
        if self.heads.gate_thresholds is not None and not self.gates:
            options["gate_threshold"] = 0.0
        return options

    def unverified(self, gamma: float) -> dict[str, Any]:
        """As `at`, and every draft token is accepted unseen: what comes out is not the target's."""
        return self.at(gamma) | {
            "rejection_sample_method": "synthetic",
            "synthetic_acceptance_rates": [1.0] * self._draft_tokens(),
        }

    def _draft_tokens(self) -> int:
        return self.draft_tokens or self.heads.num_speculative_tokens

    def _used(self) -> list[bool]:
        gates = self.heads.gate_thresholds or (0.0,) * len(self.heads.exit_layers)
        return [
            threshold < OFF and gate < OFF
            for threshold, gate in zip(self.heads.thresholds, gates, strict=True)
        ]
