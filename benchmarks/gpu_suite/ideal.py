"""What a trace must read, and how much faster that would be if reading were all.

The ideal speed-up of a trace is the ratio of the bytes of weights that vanilla and AdaDecode read
for the same tokens: both at the same bandwidth. Layers and LM head count once for every pass of a
batch, whatever its size; a head once for every batch in which it is evaluated. Left out: keys and
values (at a few hundred tokens a request well under a hundredth of an 8 B model's weights, and less
for AdaDecode, which passes by less often), activations, the embedding's rows, and prefill.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import LlamaConfig

from vllm_adadecode.evaluation.costs import Costs, ModelShape, costs_from_bytes
from vllm_adadecode.heads import HeadsConfig
from vllm_adadecode.heads.resolve import SUBFOLDER


@dataclass(frozen=True)
class Reading:
    """Of a target with its heads.

    Attributes:
        costs: of each part, in layers.
        layer_bytes: of one layer's weights.
    """

    costs: Costs
    layer_bytes: int

    @classmethod
    def of(cls, target: Path, dtype_bytes: int) -> Reading:
        """From the folder of a target that has heads beside it."""
        shape = ModelShape.from_config(LlamaConfig.from_pretrained(target))
        costs = costs_from_bytes(shape, HeadsConfig.load(target / SUBFOLDER), "bytes")
        return cls(costs, dtype_bytes * shape.layer_weights)

    def vanilla(self, steps: int) -> float:
        """Layers that so many decoding steps read."""
        return steps * self.costs.vanilla_token

    def adadecode(self, stats: dict[str, Any]) -> float:
        """Layers that the decoding rounds of `counters.Counters.snapshot` read."""
        heads = sum(e["head_batches"] for e in stats["exits"].values())
        # Gates are counted by requests; each is one vector.
        gates = sum(e["gates_evaluated"] for e in stats["exits"].values())
        batches = stats["deferred_steps"] + stats["plain_steps"]
        return float(
            stats["draft_layers"]
            + stats["verification_layers"]
            + self.costs.head * heads
            + self.costs.gate * gates
            + self.costs.lm_head * batches
        )

    def as_dict(self) -> dict[str, Any]:
        """What was counted as what."""
        return {
            "layer_megabytes": round(self.layer_bytes / 1e6, 2),
            "in_layers": {
                "lm_head": round(self.costs.lm_head, 4),
                "head_check": round(self.costs.head, 4),
                "gate_check": round(self.costs.gate, 6),
                "vanilla_step": round(self.costs.vanilla_token, 4),
            },
        }
