"""Runs every case with vLLM's Triton kernels under Triton's interpreter, and with the twins.

A process of its own: the interpreter must be chosen, and Triton be told of a CPU, before vLLM is
imported. Prints one JSON object: ``differences`` maps each case to what differs (empty: nothing);
``noticed`` lists the twins that the comparison is known to see, because some case differs once
that twin does nothing.

    python -m tests.cpu_kernels.compare
"""

from __future__ import annotations

import json
import os
import traceback
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any
from unittest.mock import patch

os.environ["TRITON_INTERPRET"] = "1"

import torch
import triton.backends


def _pretend_cpu_backend() -> None:
    """The least of a Triton backend by which vLLM takes Triton for usable on a CPU."""
    driver = type("Driver", (), {"is_active": staticmethod(lambda: True)})
    triton.backends.backends["cpu"] = type("Backend", (), {"driver": driver, "compiler": None})()


def _interpretable() -> None:
    """Make up for what the interpreter lacks of a GPU's device library."""
    import numpy as np
    from triton.runtime.interpreter import TensorHandle

    def elementwise(function: Any, dtype: Any = None) -> Any:
        def apply(x: Any, *_: Any, **__: Any) -> Any:
            import triton.language as tl

            kind = tl.int1 if dtype is bool else x.dtype
            data = function(x.handle.data)
            return tl.tensor(TensorHandle(np.asarray(data), kind), _with(x.type, kind))

        return apply

    def _with(kind: Any, scalar: Any) -> Any:
        import triton.language as tl

        return tl.block_type(scalar, kind.shape) if kind.is_block() else scalar

    def with_bool_mask(function: Any, position: int) -> Any:
        # A boolean computed from a loaded one is held as an integer, which memory access refuses.
        def apply(*args: Any) -> Any:
            return function(*args[:position], args[position].astype(bool), *args[position + 1 :])

        return apply

    memory = triton.runtime.interpreter._interpreter
    memory.load = with_bool_mask(memory.load, 1)
    memory.store = with_bool_mask(memory.store, 2)

    import vllm.v1.worker.gpu.metrics.logits as nans
    import vllm.v1.worker.gpu.spec_decode.rejection_sampler_utils as rejection

    class Device:
        log1p = staticmethod(elementwise(np.log1p))
        isnan = staticmethod(elementwise(np.isnan, bool))

    rejection.tldevice = Device
    nans.libdevice = Device


def _difference(expected: torch.Tensor, found: torch.Tensor, tolerance: float) -> str:
    if expected.dtype != found.dtype or expected.shape != found.shape:
        return f"{found.dtype}{list(found.shape)} for {expected.dtype}{list(expected.shape)}"
    if not expected.is_floating_point():
        tolerance = 0
    try:
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance, equal_nan=True)
    except AssertionError as error:
        return str(error)
    return ""


def _run(case: Any, twins: Mapping[str, Callable[..., None]]) -> tuple[Any, set[str]]:
    """A case's outputs, with these twins in place of their kernels, and the twins it launched."""
    from vllm.triton_utils.dispatcher import KernelOverride, _resolve_kernel

    launched: set[str] = set()
    with ExitStack() as stack, torch.inference_mode():
        for name, twin in twins.items():

            def launch(*args: Any, _name: str = name, _twin: Any = twin, **kwargs: Any) -> None:
                launched.add(_name)
                _twin(*args, **kwargs)

            owner, attribute = _resolve_kernel(name)
            override = KernelOverride(getattr(owner, attribute), launch)
            stack.enter_context(patch.object(owner, attribute, override))
        return case.run(torch.Generator().manual_seed(1)), launched


def _idle(*args: Any, **kwargs: Any) -> None:
    """A twin that does nothing."""


def _problems(case: Any, expected: Any, twins: Mapping[str, Callable[..., None]]) -> str:
    try:
        found, launched = _run(case, twins)
    except Exception:
        return traceback.format_exc()
    problems = [
        f"{key}: {text}"
        for key in expected
        if (text := _difference(expected[key], found[key], case.tolerance))
    ]
    problems += [f"{name} was not launched" for name in twins if name not in launched]
    return "\n".join(problems)


def main() -> None:
    _pretend_cpu_backend()
    import vllm.v1.worker.cpu.shm  # noqa: F401

    from tests.cpu_kernels.cases import CASES
    from vllm_adadecode.cpu.install import import_twins

    all_twins = import_twins()
    _interpretable()
    differences: dict[str, str] = {}
    noticed: set[str] = set()
    for case_name, case in CASES.items():
        names = [f"vllm.v1.worker.gpu.{kernel}" for kernel in case.kernels]
        twins = {name: all_twins[name] for name in names}
        expected, _ = _run(case, {})
        differences[case_name] = _problems(case, expected, twins)
        # Fresh memory may hold what the run before left there, which is the right answer: fill it.
        torch.use_deterministic_algorithms(True, warn_only=True)
        for kernel in twins.keys() - noticed:
            if _problems(case, expected, {**twins, kernel: _idle}):
                noticed.add(kernel)
        torch.use_deterministic_algorithms(False)
    print(json.dumps({"differences": differences, "noticed": sorted(noticed)}))


if __name__ == "__main__":
    main()
