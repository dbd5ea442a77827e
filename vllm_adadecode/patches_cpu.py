"""What we change in vLLM so that Model Runner V2 runs on a CPU: the whole list.

Each patch names the attribute that it replaces and why. A patch whose attribute is gone fails with
one line that says so, instead of leaving vLLM half changed.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vllm.config import VllmConfig

SUPPORTED_VLLM = "0.32"

_applied: set[str] = set()


@dataclass(frozen=True)
class Patch:
    name: str
    # "module:attribute" or "module:Class.attribute"
    target: str
    why: str
    # From the attribute's present value to its new one.
    apply: Callable[[Any], Any]
    # The attribute is missing upstream; where it is there, nothing is to be done.
    adds: bool = False


class PatchError(RuntimeError):
    """An attribute that we patch is not where it was."""


def apply_patch(patch: Patch) -> None:
    """Apply a patch once a process."""
    if patch.target in _applied:
        return
    module_name, _, path = patch.target.partition(":")
    *owners, attribute = path.split(".")
    try:
        owner = importlib.import_module(module_name)
        for name in owners:
            owner = getattr(owner, name)
        original = None
        if not patch.adds:
            original = getattr(owner, attribute)
    except (ImportError, AttributeError) as error:
        raise PatchError(
            f"vllm-adadecode patch '{patch.name}' does not fit this vLLM: {patch.target} not found "
            f"({error}); supported: {SUPPORTED_VLLM}"
        ) from error
    if not (patch.adds and hasattr(owner, attribute)):
        setattr(owner, attribute, patch.apply(original))
    _applied.add(patch.target)


def _yes(original: bool) -> bool:
    return True


def _next_power_of_2(original: None) -> Any:
    from vllm.utils.math_utils import next_power_of_2

    return staticmethod(next_power_of_2)


def _with_cpu_limits(
    original: Callable[[VllmConfig], list[str]],
) -> Callable[[VllmConfig], list[str]]:
    from vllm_adadecode.cpu.support import unsupported_features

    def _get_v2_model_runner_unsupported_features(self: VllmConfig) -> list[str]:
        return original(self) + unsupported_features(self)

    return _get_v2_model_runner_unsupported_features


def _with_twins(original: Callable[[], None]) -> Any:
    def register_triton_kernel_overrides(cls: type) -> None:
        from vllm_adadecode.cpu.install import install_twins

        original()
        install_twins()

    return classmethod(register_triton_kernel_overrides)


PATCHES = [
    Patch(
        name="model runner V2 without Triton",
        target="vllm.config.vllm:HAS_TRITON",
        why="VllmConfig refuses the V2 runner without Triton; the twins make that needless. The "
        "module reads the name for nothing else.",
        apply=_yes,
    ),
    Patch(
        name="CPU limits of model runner V2",
        target="vllm.config.vllm:VllmConfig._get_v2_model_runner_unsupported_features",
        why="Models whose kernels have no twin must stay on the V1 runner, as without the plugin.",
        apply=_with_cpu_limits,
    ),
    Patch(
        name="next_power_of_2 of the Triton placeholder",
        target="vllm.triton_utils.importing:TritonPlaceholder.next_power_of_2",
        why="The functions around the kernels use it to choose block sizes.",
        apply=_next_power_of_2,
        adds=True,
    ),
    Patch(
        name="CPU twins of the Triton kernels",
        target="vllm.platforms.cpu:CpuPlatform.register_triton_kernel_overrides",
        why="vLLM's own place to replace kernels, called in the worker before it loads the runner.",
        apply=_with_twins,
    ),
]
