"""Serving a heads folder by its own name: ``vllm serve HEADS_DIR``, ``LLM(HEADS_DIR)``.

vLLM reads the target's name out of a *speculators* config, which our config.json is. Owns what that
needs besides the file: the algorithm's registration, and the function behind the patch
"heads-folder" (see `wrap_override`).
"""

import functools
import logging
from collections.abc import Callable
from typing import Any

from vllm_adadecode.constants import METHOD
from vllm_adadecode.errors import AdaDecodeError
from vllm_adadecode.heads.config import HeadsConfig, is_heads_folder
from vllm_adadecode.heads.resolve import is_path, resolve_verifier

# Under vLLM's logger, whose level and format users know.
logger = logging.getLogger(f"vllm.{__name__}")

Override = Callable[..., tuple[str, str | None, dict[str, Any] | None]]


def register() -> None:
    """Teach vLLM the heads format. May be called any number of times."""
    from vllm.transformers_utils.configs.speculators.algos import register_speculator

    register_speculator(METHOD)(update_adadecode)


def update_adadecode(config_dict: dict[str, Any], pre_trained_config: dict[str, Any]) -> None:
    """What vLLM's `SpeculatorsConfig` of a heads folder holds besides its type."""
    pre_trained_config["architectures"] = config_dict.get("architectures", ["AdaDecodeHeads"])
    for key in (
        "exit_layers",
        "confidence_threshold",
        "transform",
        "rank",
        "norm",
        "gate",
        "gate_threshold",
        "draft_vocab_size",
        "lm_head_quantization",
    ):
        pre_trained_config[key] = config_dict.get(key)


def wrap_override(original: Override) -> Override:
    """``maybe_override_with_speculators`` that finds the target of a heads folder from there.

    Such a folder, which the user has named, may also name a target of this machine, which vLLM
    allows no speculators. All other models are vLLM's to resolve. Heads give ``(target, target,
    speculative_config)`` with ``method``, ``model`` (the heads) and ``num_speculative_tokens`` in
    the last, which options of the user's override, except for the first two.
    """

    @functools.wraps(original)
    def override(
        model: str, *args: Any, vllm_speculative_config: Any = None, **kwargs: Any
    ) -> tuple[str, str | None, dict[str, Any] | None]:
        if is_heads_folder(model):
            config = HeadsConfig.load(model)
            target = resolve_verifier(config, model)
            options: dict[str, Any] = {"num_speculative_tokens": config.num_speculative_tokens}
            if isinstance(vllm_speculative_config, dict):
                options |= vllm_speculative_config
            logger.info("The heads in %s name the target that is served: %s", model, target)
            return target, target, options | {"method": METHOD, "model": model}
        result = original(model, *args, vllm_speculative_config=vllm_speculative_config, **kwargs)
        target, _, found = result
        if target == model or not isinstance(found, dict) or found.get("method") != METHOD:
            return result
        if is_path(target):
            raise AdaDecodeError(
                f"the heads {model} name the target {target!r}, a path that means nothing on this "
                'machine: serve the target with --speculative-config \'{"method": '
                f'"adadecode", "model": "{model}"}}\''
            )
        logger.info("The heads %s name the target that is served: %s", model, target)
        return result

    return override
