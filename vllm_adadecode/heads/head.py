"""One early head as a module: its transform T, and optionally a gate and an "other" logit.

Owns everything of a head but what it borrows from the target: the final norm is handed in, the LM
head is applied by the caller to `EarlyHead.features`. Training and the engine use the same module.
"""

from collections.abc import Callable, Mapping

import torch
from torch import nn
from torch.nn import functional

from vllm_adadecode.heads.config import HeadsConfig, Norm

# Inside the root of the gate's norm, whatever the target's own norm adds.
GATE_NORM_EPS = 1e-6


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


class EarlyHead(nn.Module):
    """The head at one exit layer.

    Args:
        transform: T.
        norm: where the target's final norm is applied, "before" T or "after" it.
        hidden_size: width d; of the gate and the "other" logit.
        gate: whether there is a gate.
        other: whether there is an "other" logit (with a draft vocabulary).
        device: of the gate and the "other" logit.

    Attributes:
        gate_weight: float32 ``[d]``; None without a gate.
        gate_bias: float32 ``[1]``; None without a gate.
        other_weight: float32 ``[d]``; None without a draft vocabulary.
        other_bias: float32 ``[1]``; None without a draft vocabulary.

    These four are float32 whatever the dtype of T: they are small and decide against thresholds.
    They start as zeros, that is, as gate probability 1/2 and logit 0.
    """

    def __init__(
        self,
        transform: Transform,
        norm: Norm,
        hidden_size: int,
        *,
        gate: bool = False,
        other: bool = False,
        device: torch.device | str = "cpu",
    ) -> None:
        super().__init__()
        self.transform = transform
        self.norm_placement = norm

        def zeros(size: int, wanted: bool) -> nn.Parameter | None:
            if not wanted:
                return None
            return nn.Parameter(torch.zeros(size, dtype=torch.float32, device=device))

        self.gate_weight, self.gate_bias = zeros(hidden_size, gate), zeros(1, gate)
        self.other_weight, self.other_bias = zeros(hidden_size, other), zeros(1, other)

    def features(
        self,
        # [num_tokens, hidden_size], residual added
        hidden: torch.Tensor,
        norm: Callable[[torch.Tensor], torch.Tensor],
    ) -> torch.Tensor:
        """What the LM head multiplies, x = ``T . norm(h)`` or ``norm(T . h)``.

        Args:
            hidden: ``[num_tokens, hidden_size]`` in the dtype of T; left as it is.
            norm: the target's final norm, which must not write to its input.

        Returns:
            ``[num_tokens, hidden_size]``.
        """
        if self.norm_placement == "before":
            return self.transform(norm(hidden))
        return norm(self.transform(hidden))

    def gate_logit(
        self,
        # [num_tokens, hidden_size], residual added
        hidden: torch.Tensor,
    ) -> torch.Tensor | None:
        """``w . h / sqrt(mean(h^2) + 1e-6) + b``, float32 ``[num_tokens]``; None without a gate.

        Its sigmoid is the probability that this head will be confident.
        """
        if self.gate_weight is None or self.gate_bias is None:
            return None
        hidden = hidden.float()
        scale = torch.rsqrt(hidden.square().mean(-1) + GATE_NORM_EPS)
        return (hidden @ self.gate_weight) * scale + self.gate_bias

    def other_logit(
        self,
        # [num_tokens, hidden_size] from `features`
        x: torch.Tensor,
    ) -> torch.Tensor | None:
        """Logit of "a token outside the draft vocabulary", float32 ``[num_tokens]``.

        Computed from the same x that the LM head multiplies; None without a draft vocabulary.
        """
        if self.other_weight is None or self.other_bias is None:
            return None
        return x.float() @ self.other_weight + self.other_bias

    def checkpoint_parameters(self) -> dict[str, nn.Parameter]:
        """Parameters by their name in the checkpoint, without the exit."""
        return {name.removeprefix("transform."): p for name, p in self.named_parameters()}


def make_heads(
    config: HeadsConfig, dtype: torch.dtype, device: torch.device | str
) -> dict[int, EarlyHead]:
    """A new, trainable head per exit layer; T starts as the identity.

    Args:
        config: what the heads consist of.
        dtype: of the transforms; see `EarlyHead` for the rest.
        device: of all weights.

    Returns:
        Head by exit layer, in the order of ``config.exit_layers``.
    """
    return {
        exit_layer: EarlyHead(
            make_transform(config, dtype, device),
            config.norm,
            config.target.hidden_size,
            gate=config.gate,
            other=config.draft_vocab_size is not None,
            device=device,
        )
        for exit_layer in config.exit_layers
    }


def tensor_name(exit_layer: int, parameter: str) -> str:
    """Name in the checkpoint of one parameter of the head at ``exit_layer``."""
    return f"exit_{exit_layer}.{parameter}"


def head_tensors(heads: Mapping[int, EarlyHead]) -> dict[str, torch.Tensor]:
    """The heads' weights under their names in the checkpoint, detached.

    For heads with a draft vocabulary the caller adds the tensor ``draft_vocab``.
    """
    return {
        tensor_name(exit_layer, name): parameter.detach()
        for exit_layer, head in heads.items()
        for name, parameter in head.checkpoint_parameters().items()
    }
