"""What is kept of a drafter's training while it runs, so that a stopped run goes on.

Owns one file for each learning rate. Which rows a step sees depends on its number and the seed
alone, so that weights, the optimizer's state and the step are all there is to keep.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from vllm_adadecode.files import write_file


class Checkpoint:
    """
    Args:
        path: of the file, which need not exist; None: nothing is kept.

    Attributes:
        seconds: of CPU time that the training has taken, whenever it ran.
    """

    def __init__(self, path: Path | None = None) -> None:
        self.path = path
        self.seconds = 0.0

    def load(
        self, parameters: Sequence[torch.nn.Parameter], optimizer: torch.optim.Optimizer
    ) -> tuple[int, list[float] | None]:
        """Bring both to where the run was.

        Returns:
            Steps done, and what the whole training has led to if it is over.
        """
        if self.path is None or not self.path.is_file():
            return 0, None
        kept = torch.load(self.path, weights_only=True, map_location="cpu")
        with torch.no_grad():
            for parameter, value in zip(parameters, kept["parameters"], strict=True):
                parameter.copy_(value)
        if kept["optimizer"] is not None:
            optimizer.load_state_dict(kept["optimizer"])
        self.seconds = kept["seconds"]
        return kept["step"], kept["agreement"]

    def save(
        self,
        step: int,
        seconds: float,
        parameters: Sequence[torch.nn.Parameter],
        optimizer: torch.optim.Optimizer,
        agreement: list[float] | None = None,
    ) -> None:
        """Replace the file.

        Args:
            agreement: of the drafter when its training is over; the optimizer is then left out.

        Raises:
            OSError: the disk refuses; the file is then as it was.
        """
        self.seconds = seconds
        if self.path is None:
            return
        state: dict[str, Any] = {
            "step": step,
            "seconds": seconds,
            "parameters": [parameter.detach() for parameter in parameters],
            "optimizer": optimizer.state_dict() if agreement is None else None,
            "agreement": agreement,
        }
        write_file(self.path, partial(torch.save, state))
