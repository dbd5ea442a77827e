"""The small model's AdaDecode heads, made to fit the wide model.

A head's input is the wide hidden state (m copies times s, see the package's docstring), its output
what the LM head multiplies: the first channels, times `Plan.feature_scale`. Owns the factors that
follow for each kind of transform, gate and "other" logit.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from benchmarks.widen.plan import Plan
from vllm_adadecode.heads import HeadsConfig
from vllm_adadecode.heads.checkpoint import DRAFT_VOCAB
from vllm_adadecode.heads.head import tensor_name


def widen_config(plan: Plan, config: HeadsConfig, fingerprint: str | None) -> HeadsConfig:
    """The wide heads' config; exits keep their relative depth.

    Args:
        fingerprint: of the wide model.
    """
    data = config.model_dump()
    data["exit_layers"] = [plan.wide_layer(e) for e in config.exit_layers]
    if config.draft_vocab_size is not None:
        data["draft_vocab_size"] = plan.draft_vocab_size(config.draft_vocab_size)
    data["target"] = {
        "hidden_size": plan.wide.hidden_size,
        "vocab_size": plan.wide.vocab_size,
        "num_hidden_layers": plan.wide.num_hidden_layers,
        "fingerprint": fingerprint,
    }
    data["speculators_config"]["verifier"]["name_or_path"] = ".."
    data["provenance"] = config.provenance | {"widened_from": str(plan.small)}
    return HeadsConfig(**data)


def widen_tensors(
    plan: Plan, config: HeadsConfig, tensors: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """The wide heads' weights.

    Args:
        config: the small heads'.
        tensors: theirs, as `save_heads` takes them.

    Returns:
        The same in the wide shape and under the wide exits' names, in the same dtypes.
    """
    widened: dict[str, torch.Tensor] = {}
    for exit_layer in config.exit_layers:
        prefix = tensor_name(exit_layer, "")
        for name, tensor in tensors.items():
            if name.startswith(prefix):
                parameter = name.removeprefix(prefix)
                wide = _widen(plan, config, parameter, tensor.double()).to(tensor.dtype)
                widened[tensor_name(plan.wide_layer(exit_layer), parameter)] = wide
    if DRAFT_VOCAB in tensors:
        ids = tensors[DRAFT_VOCAB]
        # Added tokens have probability 0: they are read, and change nothing.
        more = plan.draft_vocab_size(len(ids)) - len(ids)
        added = plan.small.vocab_size + torch.arange(more, dtype=ids.dtype)
        widened[DRAFT_VOCAB] = torch.cat((ids, added))
    return widened


def _widen(plan: Plan, config: HeadsConfig, parameter: str, small: torch.Tensor) -> torch.Tensor:
    channels, features = plan.channels, plan.feature_scale
    d, wide, copies, scale = channels.small, channels.wide, 1, features
    # T before the norm works on hidden states, and must fill the copies that the norm counts.
    if config.norm == "after":
        copies, scale = channels.copies, channels.scale
    if parameter == "weight":
        matrix = torch.zeros(wide, wide, dtype=torch.float64)
        matrix[: copies * d, :d] = small.repeat(copies, 1)
        if channels.constant is not None:
            matrix[channels.constant, channels.constant] = 1.0
        return matrix
    if parameter == "down":
        matrix = torch.zeros(len(small), wide, dtype=torch.float64)
        matrix[:, :d] = small / scale
        return matrix
    if parameter == "up":
        matrix = torch.zeros(wide, small.shape[1], dtype=torch.float64)
        matrix[: copies * d] = (small * scale).repeat(copies, 1)
        return matrix
    if parameter.endswith("_bias"):
        return small
    vector = torch.zeros(wide, dtype=torch.float64)
    # The gate's norm has no gains: it divides by the wide state's root mean square.
    vector[:d] = small * plan.norm_gain if parameter == "gate_weight" else small / features
    return vector
