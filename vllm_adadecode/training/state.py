"""The state of a training run on disk: all that a killed run needs to go on as if nothing happened.

Owns one safetensors file: weights, best weights, the optimizer's moments, and in its header the
step and the history. There is no random state: the order of the data follows from seed and step.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_safetensors

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
    tensors = {f"weights.{name}": p.detach() for name, p in parameters.items()}
    tensors |= {f"best.{name}": tensor for name, tensor in state.best_weights.items()}
    for index, moments in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{name}": value for name, value in moments.items()}
    about = {
        "step": state.step,
        "stale": state.stale,
        "finished": state.finished,
        "history": state.history,
        # Pairs: JSON has no integer keys, and its floats are exact.
        "best": list(state.best.items()),
        "running": list(state.running.items()),
    }
    content = to_safetensors(
        {name: tensor.cpu().contiguous() for name, tensor in tensors.items()},
        metadata={"run": json.dumps(about)},
    )
    write_whole(path, content)


def load_state(
    path: Path, parameters: Parameters, optimizer: torch.optim.Optimizer
) -> RunState | None:
    """Bring weights and optimizer to where a run was.

    Returns:
        Its state; None if there is no file to go on from.
    """
    try:
        with safe_open(path, framework="pt") as stored:
            about = json.loads(stored.metadata()["run"])
            tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError, KeyError, TypeError):
        return None
    best: dict[str, torch.Tensor] = {}
    moments: dict[int, dict[str, torch.Tensor]] = {}
    with torch.no_grad():
        for name, tensor in tensors.items():
            part, _, rest = name.partition(".")
            if part == "weights":
                parameters[rest].copy_(tensor)
            elif part == "best":
                best[rest] = tensor.to(parameters[rest].device)
            else:
                index, _, moment = rest.partition(".")
                moments.setdefault(int(index), {})[moment] = tensor
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": moments, "param_groups": groups})
    return RunState(
        step=about["step"],
        best=dict(about["best"]),
        best_weights=best,
        stale=about["stale"],
        history=about["history"],
        running=dict(about["running"]),
        finished=about["finished"],
    )
