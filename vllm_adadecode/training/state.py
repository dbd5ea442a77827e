"""The state of a training run on disk: all that a killed run needs to go on as if nothing happened.

Owns one file of `torch.save`, read without executing anything. There is no random state: the order
of the data follows from seed and step.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch

from vllm_adadecode.files import write_whole

Parameters = Mapping[str, torch.nn.Parameter]


@dataclass
class RunState:
    """How far a run is.

    Attributes:
        step: optimizer steps done.
        best: lowest held-out loss by exit layer.
        best_weights: parameters at that evaluation, by name ``{exit layer}.{parameter}``.
        stale: evaluations since any exit has improved.
        history: one entry an evaluation.
        running: sums of training losses by exit layer since the last evaluation.
        finished: whether training is over; only the gates may be missing.
    """

    step: int = 0
    best: dict[int, float] = field(default_factory=dict)
    best_weights: dict[str, torch.Tensor] = field(default_factory=dict)
    stale: int = 0
    history: list[dict[str, Any]] = field(default_factory=list)
    running: dict[int, float] = field(default_factory=dict)
    finished: bool = False


def save_state(
    path: Path, state: RunState, parameters: Parameters, optimizer: torch.optim.Optimizer
) -> None:
    """Replace the file in one step.

    Raises:
        OSError: the disk refuses; the file is then as it was.
    """
    weights = {name: parameter.detach() for name, parameter in parameters.items()}
    stored = {"run": vars(state), "weights": weights, "optimizer": optimizer.state_dict()}
    # Not into the file: torch's complaint about a full disk is no OSError.
    buffer = BytesIO()
    torch.save(stored, buffer)
    write_whole(path, buffer.getvalue())


def load_state(
    path: Path, parameters: Parameters, optimizer: torch.optim.Optimizer
) -> RunState | None:
    """Bring weights and optimizer to where a run was.

    Returns:
        Its state; None if there is no file to go on from.
    """
    try:
        stored = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, EOFError, RuntimeError, UnpicklingError):
        return None
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(stored["weights"][name])
    optimizer.load_state_dict(stored["optimizer"])
    return RunState(**stored["run"])
