"""The table of twins: which function of ours stands in for which Triton kernel of vLLM.

Owns the ``twin`` decorator and the check that a kernel still has the arguments its twin was written
for. It knows nothing of what the kernels compute, and imports nothing of vLLM.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

Twin = TypeVar("Twin", bound=Callable[..., None])

# Kernel name ("module.attribute") -> twin, filled as the twin modules are imported.
TWINS: dict[str, Callable[..., None]] = {}


def twin(kernel: str) -> Callable[[Twin], Twin]:
    """Declare a function as the twin of a kernel below ``vllm.v1.worker.gpu``.

    vLLM's dispatcher calls a twin with the launch arguments but without the grid, so a twin takes
    the kernel's parameters under the kernel's names and derives the grid from its tensors.
    """

    def declare(function: Twin) -> Twin:
        name = f"vllm.v1.worker.gpu.{kernel}"
        assert name not in TWINS, name
        TWINS[name] = function
        return function

    return declare


def argument_mismatch(
    function: Callable[..., Any], kernel_arguments: Iterable[str]
) -> tuple[list[str], list[str]] | None:
    """The (expected, found) argument names where a kernel changed under its twin, else None."""
    # Launch options such as num_warps follow the kernel's own arguments.
    parameters = inspect.signature(function).parameters.values()
    expected = [p.name for p in parameters if p.kind is not p.KEYWORD_ONLY]
    found = list(kernel_arguments)
    return None if expected == found else (expected, found)
