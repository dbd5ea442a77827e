"""Puts the twins in place of vLLM's Triton kernels, in the process that runs the model."""

from __future__ import annotations

from collections.abc import Callable

_installed = False


def import_twins() -> dict[str, Callable[..., None]]:
    """Every twin by the name of its kernel. Needs nothing of vLLM."""
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
    from vllm_adadecode.cpu.registry import TWINS

    return TWINS


def install_twins() -> None:
    """Register every twin with vLLM's kernel dispatcher. Safe to call again."""
    global _installed
    if _installed:
        return

    # vLLM's CPU stand-ins for streams, events and pinned memory are bound by name in the runner's
    # modules, so they must be in place before the twins' registration imports those.
    import vllm.v1.worker.cpu.shm  # noqa: F401  # isort: skip
    from vllm.triton_utils.dispatcher import _kernel_arg_names, _resolve_kernel, register_kernels

    from vllm_adadecode.cpu.registry import argument_mismatch
    from vllm_adadecode.errors import AdaDecodeError

    twins = import_twins()
    for name, twin in twins.items():
        try:
            kernel = getattr(*_resolve_kernel(name))
        except (ImportError, ValueError) as error:
            raise AdaDecodeError(f"CPU twin of {name}: the kernel has moved ({error})") from error
        if mismatch := argument_mismatch(twin, _kernel_arg_names(kernel)):
            expected, found = mismatch
            raise AdaDecodeError(
                f"CPU twin of {name}: the kernel takes {found}, the twin was written for {expected}"
            )
    register_kernels(twins)
    _installed = True
