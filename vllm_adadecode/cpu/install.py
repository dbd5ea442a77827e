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
    from vllm.triton_utils.dispatcher import register_kernels

    register_kernels(fitted_replacements())
    _installed = True


def fitted_replacements() -> dict[str, Callable[..., None]]:
    """Every replacement as it fits the kernels of this vLLM.

    Raises:
        AdaDecodeError: one line that names the kernel that no replacement fits.
    """
    from vllm.triton_utils.dispatcher import _kernel_arg_names, _resolve_kernel

    from vllm_adadecode.cpu.registry import fitted
    from vllm_adadecode.errors import AdaDecodeError

    replacements: dict[str, Callable[..., None]] = {}
    for name, replacement in import_replacements().items():
        try:
            arguments = _kernel_arg_names(getattr(*_resolve_kernel(name)))
        except (ImportError, ValueError) as error:
            raise AdaDecodeError(
                f"CPU replacement of {name}: the kernel has moved ({error})"
            ) from error
        if (launch := fitted(replacement, arguments)) is None:
            raise AdaDecodeError(
                f"CPU replacement of {name}: written for other arguments than {list(arguments)}"
            )
        replacements[name] = launch
    return replacements
