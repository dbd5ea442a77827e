"""The transform T of a head.

Owns the maths of T alone; the norm, gate and "other" logit around it are `head.py`'s.
"""

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


def make_transform(
    config: HeadsConfig, dtype: torch.dtype, device: torch.device | str
) -> Transform:
    """A new transform as the config says; trainable."""
    d = config.target.hidden_size
    if config.transform == "full":
        return FullTransform(d, dtype, device)
    if config.transform == "identity":
        return Transform()
    assert config.rank is not None
    return LowRankTransform(d, config.rank, dtype, device)
