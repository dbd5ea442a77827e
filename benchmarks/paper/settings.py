"""AdaDecode as the paper's experiments want it: one gamma, no early prediction, no verification.

Owns the speculative configuration of each, and the names by which a comparison knows them. Nothing
in the plugin turns verification off: that is vLLM's own `synthetic` acceptance, which exists for
benchmarks and has to be asked for by name, here at a rate of 1 for every draft.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from benchmarks.compare.methods import kind
from vllm_adadecode.errors import AdaDecodeError
from vllm_adadecode.heads import HeadsConfig, find_heads

OURS = "adadecode"
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
        drafts: most drafts in one window; None: as many as the heads say.
        all_exits: also use exits that the heads' own thresholds turn off.
        gates: whether the heads' gates decide which heads are evaluated. The paper has none.
    """

    heads: HeadsConfig
    folder: str | None = None
    drafts: int | None = None
    all_exits: bool = False
    gates: bool = True

    def at(self, gamma: float) -> dict[str, Any]:
        """Options of `--speculative-config` with one threshold for all exits in use.

        Raises:
            AdaDecodeError: no exit is in use.
        """
        used = self._used()
        if not any(used):
            raise AdaDecodeError(
                "the heads' own thresholds turn every exit off: add --all-exits to use them"
            )
        options: dict[str, Any] = {
            "confidence_threshold": [gamma if use else OFF for use in used],
            "num_speculative_tokens": self._drafts(),
            # The paper's rule, which the threshold alone decides.
            "cost_aware": False,
        }
        if self.folder is not None:
            options["model"] = self.folder
        gates = self.heads.gate_thresholds
        if gates is not None and not self.gates:
            options["gate_threshold"] = 0.0
        elif gates is not None and self.all_exits:
            # A gate that lets nothing through would keep its exit off.
            options["gate_threshold"] = [0.0 if gate >= OFF else gate for gate in gates]
        return options

    def unverified(self, gamma: float) -> dict[str, Any]:
        """As `at`, and every draft is accepted unseen: what comes out is not the target's."""
        return self.at(gamma) | {
            "rejection_sample_method": "synthetic",
            "synthetic_acceptance_rates": [1.0] * self._drafts(),
        }

    def _drafts(self) -> int:
        return self.drafts or self.heads.num_speculative_tokens

    def _used(self) -> list[bool]:
        gates = self.heads.gate_thresholds or (0.0,) * len(self.heads.exit_layers)
        return [
            self.all_exits or (threshold < OFF and gate < OFF)
            for threshold, gate in zip(self.heads.thresholds, gates, strict=True)
        ]


def read_heads(target: str, folder: str | None) -> HeadsConfig:
    """Those that vLLM would use for this target.

    Args:
        target: folder or hub id.
        folder: of the heads, or a hub id; None: beside the target, else the logit lens.

    Raises:
        AdaDecodeError: target or heads can't be read.
    """
    found = find_heads(folder, target)
    if found is not None:
        return HeadsConfig.load(found)
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(target).get_text_config()
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise AdaDecodeError(f"target {target} can't be read: {reason}") from None
    return HeadsConfig.logit_lens(
        hidden_size=config.hidden_size,
        vocab_size=config.vocab_size,
        num_hidden_layers=config.num_hidden_layers,
    )
