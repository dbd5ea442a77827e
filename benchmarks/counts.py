"""What AdaDecode's workers counted, over several requests.

Owns adding such counts up, and the ratios that follow from them. The names are those of
`vllm_adadecode.metrics.counters`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Stats = Mapping[str, Any]


def total(stats: Sequence[Stats]) -> dict[str, Any]:
    """One snapshot for several of the same server: counts are added, ratios taken anew."""
    found = _added(stats)
    found["num_layers"] = stats[0]["num_layers"]
    exits = found["exits"].values()
    verified = sum(e["accepted_tokens"] + e["rejected_tokens"] for e in exits)
    layers = found["draft_layers"] + found["verification_layers"]
    tokens = found["generated_tokens"]
    return found | {
        "draft_acceptance_rate": ratio(found["accepted_tokens"], verified),
        "mean_acceptance_length": ratio(tokens, found["verification_steps"]),
        "layers_executed_per_token": ratio(layers, found["num_layers"] * tokens),
    }


def _added(parts: Sequence[Stats]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in parts[0].items():
        values = [part[name] for part in parts]
        if isinstance(value, Mapping):
            found[name] = _added(values)
        elif isinstance(value, int):
            found[name] = sum(values)
    return found


def ratio(part: float, whole: float) -> float | None:
    """None where there is nothing to take a share of."""
    return part / whole if whole else None
