"""The table of replacements: which function of ours stands in for which Triton kernel of vLLM.

Owns the ``replacement`` decorator, and the check that a kernel has the arguments its replacement
was written for, which differ between versions of vLLM. It knows nothing of what the kernels
compute, and imports nothing of vLLM.
"""

from __future__ import annotations

import functools
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


def fitted(function: Replacement, kernel_arguments: Iterable[str]) -> Replacement | None:
    """The function as it stands in for a kernel with these arguments; None if it can't.

    Arguments are matched by name: a parameter with a default is for a version of the kernel that
    has it. Launch options such as ``num_warps`` are keyword-only, and no arguments of the kernel.
    """
    parameters = inspect.signature(function).parameters.values()
    known = {p.name: p for p in parameters if p.kind is not p.KEYWORD_ONLY}
    names = tuple(kernel_arguments)
    required = {name for name, p in known.items() if p.default is p.empty}
    if not required <= set(names) <= set(known):
        return None
    if names == tuple(known):
        return function

    @functools.wraps(function)
    def launch(*args: Any, **options: Any) -> None:
        function(**dict(zip(names, args, strict=False)), **options)

    return launch  # type: ignore[return-value]
