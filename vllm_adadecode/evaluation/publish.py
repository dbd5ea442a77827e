"""Calibrated heads as a folder: the same weights, another config, and why.

Owns what is written; the choice is `calibrate.py`'s.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from vllm_adadecode.evaluation.session import Session
from vllm_adadecode.evaluation.simulate import Setting
from vllm_adadecode.heads import HeadsConfig, save_heads
from vllm_adadecode.heads.config import WEIGHTS_NAME
from vllm_adadecode.heads.resolve import is_relative
from vllm_adadecode.training.card import CARD_NAME
from vllm_adadecode.training.request import relative_name

RESULT_NAME = "calibration.json"
_SECTION = """
## Calibrated

`{command}` has chosen exits, thresholds and K anew; those in config.json count, what is said above
is of the settings before. Predicted ideal speed-up on sequences that took no part in the choice,
simulated at batch 1, greedy, heads counted ({source}):

| data | calibrated | paper's setting | before |
| --- | --- | --- | --- |
"""


def publish(session: Session, setting: Setting, output: Path, result: Mapping[str, Any]) -> None:
    """Write the session's heads with another setting, ``calibration.json`` and the model card.

    All of it or nothing, see `save_heads`.

    Args:
        session: the heads that were calibrated.
        setting: the choice.
        output: the folder to write, may be that of the session.
        result: of `report.calibration_json`, with ``data`` and ``made_with``.

    Raises:
        AdaDecodeError: the folder holds something else.
        OSError: the disk refuses.
    """
    weights, card = session.folder / WEIGHTS_NAME, session.folder / CARD_NAME
    tensors = load_file(weights) if weights.is_file() else {}
    beside = {RESULT_NAME: (json.dumps(result, indent=2) + "\n").encode()}
    if card.is_file():
        before = card.read_text(encoding="utf-8").partition("\n## Calibrated\n")[0].rstrip()
        beside[CARD_NAME] = (before + "\n" + card_section(result)).encode()
    save_heads(output, _with_setting(session, setting, output, result), tensors, beside)


def card_section(result: Mapping[str, Any]) -> str:
    """What is added to the model card."""
    text = _SECTION.format(command=result["made_with"]["command"], source=result["costs"]["source"])
    for name, predicted in result["predictions"].items():
        cells = (
            f"{predicted[setting]['ideal_speedup_with_head_cost']:.3f}"
            for setting in ("calibrated", "paper", "before")
        )
        text += f"| {name} | {' | '.join(cells)} |\n"
    return text


def _with_setting(
    session: Session, setting: Setting, output: Path, result: Mapping[str, Any]
) -> HeadsConfig:
    """The config for ``output``, see `publish`.

    A target that the heads name relative to their folder is named so from ``output``.
    """
    config = session.config
    data = config.model_dump(mode="json")
    data["confidence_threshold"] = list(setting.thresholds)
    if config.gate and setting.gate_thresholds is not None:
        data["gate_threshold"] = list(setting.gate_thresholds)
    section = data["speculators_config"]
    if any(setting.used):
        section["proposal_methods"][0]["speculative_tokens"] = setting.max_drafts
    if is_relative(section["verifier"]["name_or_path"]):
        target = Path(session.target.name).expanduser()
        name = relative_name(target, output) if target.is_dir() else session.target.name
        section["verifier"]["name_or_path"] = name
    data["provenance"]["calibration"] = {
        "command": result["made_with"]["command"],
        "data": result["data"],
        "costs": result["costs"],
        "predicted_speedup": {
            name: round(p["calibrated"]["ideal_speedup_with_head_cost"], 4)
            for name, p in result["predictions"].items()
        },
    }
    return HeadsConfig(**data)
