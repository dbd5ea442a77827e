"""The transform T of a head, and the names and shapes of its weights.

Owns the maths of T alone; the norm and the LM head around it are applied by the engine.
"""

from collections.abc import Mapping

import torch
from torch import nn
from torch.nn import functional

from vllm_adadecode.heads.config import HeadsConfig


class Transform(nn.Module):
    """T of one head, ``[num_tokens, hidden_size]`` to the same shape; this one is the identity.

    Input and weights are of one dtype. A new transform starts as the identity, up to rounding.
    """

    def forward(
        self,
        # [num_tokens, hidden_size]
        hidden: torch.Tensor,
    ) -> torch.Tensor:
        return hidden


class FullTransform(Transform):
    """T is a matrix, ``weight`` ``[hidden_size, hidden_size]``."""

    def __init__(self, hidden_size: int, dtype: torch.dtype, device: torch.device | str) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.eye(hidden_size, dtype=dtype, device=device))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return functional.linear(hidden, self.weight)


class LowRankTransform(Transform):
    """T = I + up . down, ``down`` ``[rank, hidden_size]``, ``up`` ``[hidden_size, rank]``."""

    def __init__(
        self, hidden_size: int, rank: int, dtype: torch.dtype, device: torch.device | str
    ) -> None:
        super().__init__()
        # Random down, zero up: T is the identity, and up has a gradient from the first step.
        down = torch.randn(rank, hidden_size, dtype=torch.float32) / hidden_size**0.5
        self.down = nn.Parameter(down.to(device=device, dtype=dtype))
        self.up = nn.Parameter(torch.zeros(hidden_size, rank, dtype=dtype, device=device))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden + functional.linear(functional.linear(hidden, self.down), self.up)


def make_transforms(
    config: HeadsConfig, dtype: torch.dtype, device: torch.device | str
) -> dict[int, Transform]:
    """A new transform per exit layer, as the config says; trainable."""
    d = config.target.hidden_size
    transforms: dict[int, Transform] = {}
    for exit_layer in config.exit_layers:
        if config.transform == "full":
            transforms[exit_layer] = FullTransform(d, dtype, device)
        elif config.transform == "low_rank":
            assert config.rank is not None
            transforms[exit_layer] = LowRankTransform(d, config.rank, dtype, device)
        else:
            transforms[exit_layer] = Transform()
    return transforms


def tensor_name(exit_layer: int, parameter: str) -> str:
    """Name in the checkpoint of one parameter of the head at ``exit_layer``."""
    return f"exit_{exit_layer}.{parameter}"


def tensor_shapes(config: HeadsConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor that the checkpoint holds."""
    d, r = config.target.hidden_size, config.rank or 0
    per_exit: dict[str, dict[str, tuple[int, ...]]] = {
        "identity": {},
        "full": {"weight": (d, d)},
        "low_rank": {"down": (r, d), "up": (d, r)},
    }
    return {
        tensor_name(exit_layer, parameter): shape
        for exit_layer in config.exit_layers
        for parameter, shape in per_exit[config.transform].items()
    }


def transform_tensors(transforms: Mapping[int, Transform]) -> dict[str, torch.Tensor]:
    """The transforms' weights under their names in the checkpoint, detached."""
    return {
        tensor_name(exit_layer, name): parameter.detach()
        for exit_layer, transform in transforms.items()
        for name, parameter in transform.named_parameters()
    }
