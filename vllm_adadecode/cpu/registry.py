"""The table of replacements: which function of ours stands in for which Triton kernel of vLLM.

Owns the ``replacement`` decorator and the check that a kernel still has the arguments its
replacement was written for. It knows nothing of what the kernels compute, and imports nothing of
vLLM.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

Replacement = TypeVar("Replacement", bound=Callable[..., None])

# Kernel name ("module.attribute") -> replacement, filled as the replacement modules are imported.
REPLACEMENTS: dict[str, Callable[..., None]] = {}


def replacement(kernel: str) -> Callable[[Replacement], Replacement]:
    """Declare a function as the replacement of a kernel below ``vllm.v1.worker.gpu``.

    vLLM's dispatcher calls a replacement with the launch arguments but without the grid, so a
    replacement takes the kernel's parameters under the kernel's names and derives the grid from its
    tensors.
    """

    def declare(function: Replacement) -> Replacement:
        name = f"vllm.v1.worker.gpu.{kernel}"
        assert name not in REPLACEMENTS, name
        REPLACEMENTS[name] = function
        return function

    return declare


def argument_mismatch(
    function: Callable[..., Any], kernel_arguments: Iterable[str]
) -> tuple[list[str], list[str]] | None:
    """(expected, found) argument names where a kernel differs from its replacement, else None."""
    # Launch options such as num_warps follow the kernel's own arguments.
    parameters = inspect.signature(function).parameters.values()
    expected = [p.name for p in parameters if p.kind is not p.KEYWORD_ONLY]
    found = list(kernel_arguments)
    return None if expected == found else (expected, found)
