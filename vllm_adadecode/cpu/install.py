"""Puts the replacements in place of vLLM's Triton kernels, in the process that runs the model."""

from __future__ import annotations

from collections.abc import Callable

_installed = False


def import_replacements() -> dict[str, Callable[..., None]]:
    """Every replacement by the name of its kernel. Needs nothing of vLLM."""
    from vllm_adadecode.cpu import (  # noqa: F401
        block_table,
        buffer_utils,
        constraints,
        gumbel,
        input_batch,
        outputs,
        penalties,
        rejection,
        thinking_budget,
    )
    from vllm_adadecode.cpu.registry import REPLACEMENTS

    return REPLACEMENTS


def install_replacements() -> None:
    """Register every replacement with vLLM's kernel dispatcher. Safe to call again."""
    global _installed
    if _installed:
        return

    # vLLM's CPU stand-ins for streams, events and pinned memory are bound by name in the runner's
    # modules, so they must be in place before the replacements' registration imports those.
    import vllm.v1.worker.cpu.shm  # noqa: F401  # isort: skip
    from vllm.triton_utils.dispatcher import _kernel_arg_names, _resolve_kernel, register_kernels

    from vllm_adadecode.cpu.registry import argument_mismatch
    from vllm_adadecode.errors import AdaDecodeError

    replacements = import_replacements()
    for name, replacement in replacements.items():
        try:
            kernel = getattr(*_resolve_kernel(name))
        except (ImportError, ValueError) as error:
            raise AdaDecodeError(
                f"CPU replacement of {name}: the kernel has moved ({error})"
            ) from error
        if mismatch := argument_mismatch(replacement, _kernel_arg_names(kernel)):
            expected, found = mismatch
            raise AdaDecodeError(
                f"CPU replacement of {name}: the kernel takes {found}, "
                f"the replacement was written for {expected}"
            )
    register_kernels(replacements)
    _installed = True
