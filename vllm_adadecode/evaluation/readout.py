"""What a head says, computed with transformers as the engine does it.

Owns the step from a hidden state at an exit layer to (token, confidence, gate), with the options of
a checkpoint that change it: draft vocabulary and quantised LM head.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch.nn import functional

from vllm_adadecode.heads import EarlyHead, HeadsConfig, load_draft_vocab, load_heads
from vllm_adadecode.kernels.confidence import top1_confidence

if TYPE_CHECKING:
    from vllm_adadecode.training.target_model import FrozenTarget


@dataclass(frozen=True)
class Said:
    """Of one head at N positions.

    Attributes:
        token: int64 ``[N]``.
        confidence: float32 ``[N]``.
        gate: float32 ``[N]``; None without a gate.
    """

    token: torch.Tensor
    confidence: torch.Tensor
    gate: torch.Tensor | None


class HeadReadout:
    """The heads of a target, ready to be asked.

    Args:
        target: lends its final norm and LM head.
        config: of the heads.
        heads: by exit layer, on the target's device.
        draft_vocab: int64 ``[Vd]`` token ids if the heads have a draft vocabulary, else None.
    """

    def __init__(
        self,
        target: FrozenTarget,
        config: HeadsConfig,
        heads: Mapping[int, EarlyHead],
        draft_vocab: torch.Tensor | None = None,
    ) -> None:
        self.target, self.config, self.heads = target, config, heads
        self.exit_layers = config.exit_layers
        self.draft_vocab = None if draft_vocab is None else draft_vocab.to(target.device)
        self._rows = self._copied_rows()

    @classmethod
    def load(cls, target: FrozenTarget, folder: Path | None, config: HeadsConfig) -> HeadReadout:
        """The heads of a folder; None: the training-free logit lens.

        Raises:
            AdaDecodeError: the folder is damaged or not that of ``config``.
        """
        heads = load_heads(folder, config, target.dtype, target.device)
        return cls(target, config, heads, load_draft_vocab(folder, config))

    @property
    def has_gate(self) -> bool:
        return self.config.gate

    def read(
        self,
        exit_layer: int,
        # [N, d], residual added
        hidden: torch.Tensor,
    ) -> Said:
        """Head and gate at one exit layer; logits ``[N, vocab]`` exist meanwhile."""
        token, confidence = self.head(exit_layer, hidden)
        return Said(token, confidence, self.gate(exit_layer, hidden))

    def head(self, exit_layer: int, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Most likely token, int64 ``[N]``, and its probability, float32 ``[N]``."""
        head = self.heads[exit_layer]
        x = head.features(hidden.to(self.target.dtype), self.target.norm)
        if self._rows is None:
            return top1_confidence(self.target.lm_head(x))
        token, confidence = top1_confidence(functional.linear(x, self._rows), head.other_logit(x))
        return (token if self.draft_vocab is None else self.draft_vocab[token]), confidence

    def gate(self, exit_layer: int, hidden: torch.Tensor) -> torch.Tensor | None:
        """Probability that the head will be confident, float32 ``[N]``; None without gates."""
        logit = self.heads[exit_layer].gate_logit(hidden)
        return None if logit is None else logit.sigmoid()

    def _copied_rows(self) -> torch.Tensor | None:
        """``[Vd or V, d]`` of the LM head as the heads read it; None: they read the target's own.

        A quantised copy is kept as what its values stand for.
        """
        quantization = self.config.lm_head_quantization
        if self.draft_vocab is None and quantization is None:
            return None
        weight = self.target.lm_head_weight
        if self.draft_vocab is not None:
            weight = weight[self.draft_vocab]
        if quantization is not None:
            # The engine's rounding, which lives with its LM head and so imports vLLM.
            from vllm_adadecode.model.lm_head_rows import quantize_rows

            rows, scales = quantize_rows(weight)
            weight = (rows.float() * scales[:, None]).to(weight.dtype)
        return weight
