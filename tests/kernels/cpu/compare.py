"""Runs every case with vLLM's Triton kernels under Triton's interpreter, and with the replacements.

A process of its own: the interpreter must be chosen, and Triton be told of a CPU, before vLLM is
imported. Prints one JSON object: ``differences`` maps each case to what differs (empty: nothing);
``noticed`` lists the replacements that the comparison is known to see, because some case differs
once that replacement does nothing.

    python -m tests.kernels.cpu.compare
"""

from __future__ import annotations

import json
import os
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"

import triton.backends

from tests.kernels.cpu.running import compare_all


def _pretend_cpu_backend() -> None:
    """The least of a Triton backend by which vLLM takes Triton for usable on a CPU."""
    driver = type("Driver", (), {"is_active": staticmethod(lambda: True)})
    triton.backends.backends["cpu"] = type("Backend", (), {"driver": driver, "compiler": None})()


def take_any_mask() -> None:
    """Have the interpreter take masks of integers, as it holds booleans that follow from loads."""

    def with_bool_mask(function: Any, position: int) -> Any:
        def apply(*args: Any) -> Any:
            return function(*args[:position], args[position].astype(bool), *args[position + 1 :])

        return apply

    memory = triton.runtime.interpreter._interpreter
    memory.load = with_bool_mask(memory.load, 1)
    memory.store = with_bool_mask(memory.store, 2)


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

    take_any_mask()

    import vllm.v1.worker.gpu.metrics.logits as nans
    import vllm.v1.worker.gpu.spec_decode.rejection_sampler_utils as rejection

    class Device:
        log1p = staticmethod(elementwise(np.log1p))
        isnan = staticmethod(elementwise(np.isnan, bool))

    rejection.tldevice = Device
    nans.libdevice = Device


def main() -> None:
    _pretend_cpu_backend()
    import vllm.v1.worker.cpu.shm  # noqa: F401

    from tests.kernels.cpu.cases import CASES
    from vllm_adadecode.cpu.install import fitted_replacements
    from vllm_adadecode.vllm_patches.cpu_runner import TABLE_ADDRESSES

    TABLE_ADDRESSES.apply()
    _interpretable()
    replacements = fitted_replacements()
    differences, noticed = compare_all(CASES, replacements, "vllm.v1.worker.gpu")
    print(json.dumps({"differences": differences, "noticed": noticed}))


if __name__ == "__main__":
    main()
