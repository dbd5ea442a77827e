"""Heads checkpoints: their format, how they are saved, loaded, found and matched to a target.

Nothing here knows the engine: applying the target's norm and LM head is
`vllm_adadecode.model.target`'s.
"""

from vllm_adadecode.heads.checkpoint import (
    check_weights,
    load_configured_heads,
    load_draft_vocab,
    load_heads,
    save_heads,
)
from vllm_adadecode.heads.config import HeadsConfig
from vllm_adadecode.heads.head import EarlyHead, Transform, head_tensors, make_heads
from vllm_adadecode.heads.resolve import check_fits, find_heads, find_mismatches
from vllm_adadecode.heads.target import target_fingerprint

__all__ = [
    "EarlyHead",
    "HeadsConfig",
    "Transform",
    "check_fits",
    "check_weights",
    "find_heads",
    "find_mismatches",
    "head_tensors",
    "load_configured_heads",
    "load_draft_vocab",
    "load_heads",
    "make_heads",
    "save_heads",
    "target_fingerprint",
]
