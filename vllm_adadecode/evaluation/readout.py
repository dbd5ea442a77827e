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

from vllm_adadecode.heads.config import HeadsConfig
from vllm_adadecode.heads.head import EarlyHead, load_draft_vocab, load_heads
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
