"""What is written: one JSON file, whole after every part, and which parts it has already."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.gpu_suite.settings import AT_MOST, GOALS
from vllm_adadecode.errors import AdaDecodeError
from vllm_adadecode.files import read_json, write_json

WHAT = (
    "python -m benchmarks.gpu_suite: vLLM with AdaDecode against vLLM as it is, on the demo target "
    "widened to a large shape. efficiency: measured over ideal speed-up, the ratio of the bytes of "
    "weights that both must read"
)
# What else is written on top.
ABOUT = ("target", "engines", "command")
# How a part ended. Only the first is not run again.
DONE, PARTIAL, SKIPPED, FAILED = "done", "partial", "skipped", "failed"


@dataclass
class Result:
    """One run of the suite, or of several that went on where the last one stopped.

    Attributes:
        identity: settings, code and machine: what parts of one result have in common.
        about: by names of `ABOUT`.
        parts: by name, how each one ended: ``status``, ``reason``, ``seconds``, and ``data``, what
            it found until then.
        expected: names of all parts that there are to be.
    """

    file: Path
    identity: dict[str, Any]
    about: dict[str, Any] = field(default_factory=dict)
    parts: dict[str, dict[str, Any]] = field(default_factory=dict)
    expected: tuple[str, ...] = ()

    @classmethod
    def open(cls, file: Path, identity: dict[str, Any], again: bool) -> Result:
        """Go on with what the file has if it is of the same identity; else begin.

        Raises:
            AdaDecodeError: the file is no JSON; nothing is lost.
        """
        identity = json.loads(json.dumps(identity))
        result = cls(file, identity)
        if again or not file.exists():
            return result
        before = read_json(file)
        if not isinstance(before, dict):
            raise AdaDecodeError(f"{file} is no result of this suite: give another --out")
        if all(before.get(name) == value for name, value in identity.items()):
            result.parts = before.get("parts", {})
            result.about = {name: before[name] for name in ABOUT if name in before}
        return result

    def is_done(self, part: str) -> bool:
        return bool(self.parts.get(part, {}).get("status") == DONE)

    def data(self, part: str) -> dict[str, Any]:
        """What a part found; empty if it has not run."""
        data: dict[str, Any] = self.parts.get(part, {}).get("data", {})
        return data

    def put(
        self, part: str, status: str, data: dict[str, Any], seconds: float, reason: str | None
    ) -> None:
        """Take what a part found, and write everything."""
        entry = {"status": status, "seconds": round(seconds, 1), "data": data}
        self.parts[part] = entry | ({} if reason is None else {"reason": reason})
        self.write()

    def write(self) -> None:
        write_json(self.file, self.as_dict())

    def as_dict(self) -> dict[str, Any]:
        return {
            "what": WHAT,
            **summary(self),
            **self.identity,
            **self.about,
            "parts": self.parts,
        }

    def missing(self) -> dict[str, str]:
        """Parts that are not done, and why."""
        not_run = {name: "not run yet" for name in self.expected if name not in self.parts}
        return not_run | {
            name: f"{part['status']}: {part.get('reason')}"
            for name, part in self.parts.items()
            if part["status"] != DONE
        }


def summary(result: Result) -> dict[str, Any]:
    """The figures on top; None, or no entry, where nothing was measured."""
    speed, concurrency = result.data("speed"), result.data("concurrency")
    same, ties = result.data("bit_identical"), result.data("ties")
    syncs = result.data("host_syncs")
    found: dict[str, Any] = {
        name: {batch: cell[name] for batch, cell in speed.items()}
        for name in (
            *("efficiency", "speedup", "ideal_speedup"),
            *("draft_acceptance_rate", "mean_acceptance_length"),
        )
    }
    found["ratio_by_concurrency"] = {level: cell["ratio"] for level, cell in concurrency.items()}
    found["host_syncs_per_round"] = highest(
        cell["adadecode"]["syncs_per_round"] for cell in syncs.values() if "adadecode" in cell
    )
    found["bit_identical"] = same.get("identical")
    found["ties"] = {
        name: ties[name]
        for name in ("outputs", "divergences", "beyond_bound", "tie_bound", "largest_gap")
        if name in ties
    } or None
    found["goals"] = goals(found)
    found["missing"] = result.missing()
    return found


def highest(values: Iterable[float | None]) -> float | None:
    return max((v for v in values if v is not None), default=None)


def goals(found: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The project's goals, what was measured, and whether that meets them (None: not measured)."""
    efficiency, ratios = found["efficiency"], found["ratio_by_concurrency"]
    measured = {
        "efficiency at batch 1": efficiency.get("1"),
        "efficiency at batch 8": efficiency.get("8"),
        "least ratio at any concurrency": min(ratios.values(), default=None),
        "host syncs in a round": found["host_syncs_per_round"],
    }
    return {
        name: {"goal": goal, "measured": measured[name], "met": met(name, measured[name], goal)}
        for name, goal in GOALS.items()
    }


def met(name: str, value: float | None, goal: float) -> bool | None:
    """None: not measured."""
    if value is None:
        return None
    return value <= goal if name in AT_MOST else value >= goal
