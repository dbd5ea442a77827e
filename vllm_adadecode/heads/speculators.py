"""Serving a heads folder by its own name: ``vllm serve HEADS_DIR``, ``LLM(HEADS_DIR)``.

vLLM reads the target's name out of a *speculators* config, which our config.json is. Owns what that
needs besides the file: the algorithm's registration, and the function behind the patch
"heads-folder" (see `wrap_override`).
"""

import functools
from collections.abc import Callable
from typing import Any

from vllm_adadecode.constants import METHOD
from vllm_adadecode.errors import AdaDecodeError
from vllm_adadecode.heads.config import HeadsConfig, is_heads_folder
from vllm_adadecode.heads.resolve import is_relative, resolve_verifier

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
    """``maybe_override_with_speculators`` that checks heads, and finds their target from there.

    Models that are not heads pass through. Heads give ``(target, target, speculative_config)``
    with ``method``, ``model`` (the heads) and ``num_speculative_tokens`` in the last, which options
    of the user's override, except for the first two.
    """

    @functools.wraps(original)
    def override(model: str, *args: Any, **kwargs: Any) -> Any:
        target = None
        if is_heads_folder(model):
            # Before vLLM's own check, which does not say what is wrong.
            target = resolve_verifier(HeadsConfig.load(model), model)
        result = original(model, *args, **kwargs)
        new_model, _, speculative_config = result
        if target is not None:
            return target, target, speculative_config
        if (
            isinstance(speculative_config, dict)
            and speculative_config.get("method") == METHOD
            and new_model != model
            and is_relative(new_model)
        ):
            raise AdaDecodeError(
                f"the heads {model} name the target {new_model!r}, relative to a folder that is "
                'not on this machine: serve the target with --speculative-config \'{"method": '
                f'"adadecode", "model": "{model}"}}\''
            )
        return result

    return override
