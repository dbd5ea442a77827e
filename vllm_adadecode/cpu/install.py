"""Puts the twins in place of vLLM's Triton kernels, in the process that runs the model."""

from __future__ import annotations

_installed = False


def install_twins() -> None:
    """Register every twin with vLLM's kernel dispatcher. Safe to call again."""
    global _installed
    if _installed:
        return

    # vLLM's CPU stand-ins for streams, events and pinned memory are bound by name in the runner's
    # modules, so they must be in place before the twins' registration imports those.
    import vllm.v1.worker.cpu.shm  # noqa: F401  # isort: skip
    from vllm.triton_utils.dispatcher import _kernel_arg_names, _resolve_kernel, register_kernels

    from vllm_adadecode.cpu import (  # noqa: F401
        block_table,
        buffer_utils,
        gumbel,
        input_batch,
        rejection,
    )
    from vllm_adadecode.cpu.registry import TWINS, argument_mismatch

    for name, twin in TWINS.items():
        try:
            kernel = getattr(*_resolve_kernel(name))
        except (ImportError, ValueError) as error:
            raise RuntimeError(f"CPU twin of {name}: the kernel has moved ({error})") from error
        if mismatch := argument_mismatch(twin, _kernel_arg_names(kernel)):
            expected, found = mismatch
            raise RuntimeError(
                f"CPU twin of {name}: the kernel takes {found}, the twin was written for {expected}"
            )
    register_kernels(TWINS)
    _installed = True
