"""Runs every case with our kernels under Triton's interpreter, and with their references.

A process of its own: the interpreter must be chosen, and Triton be told of a CPU, before vLLM is
imported. Prints one JSON object: ``differences`` maps each case to what differs (empty: nothing);
``kernels`` says which kernels each launches; ``noticed`` lists those whose reference's doing
nothing makes a case differ; ``checks`` maps what is asked of the kernels alone to what is wrong.

    python -m tests.kernels.compare [PART OF A CASE'S NAME]
"""

from __future__ import annotations

import json
import os
import sys

os.environ["TRITON_INTERPRET"] = "1"

from typing import Any
from unittest.mock import patch

import numpy as np
import torch

from tests.kernels.cpu.compare import _pretend_cpu_backend, take_any_mask
from tests.kernels.cpu.running import compare_all

PACKAGE = "vllm_adadecode.kernels"


def _interpretable() -> None:
    """Make up for what Triton's interpreter lacks: it holds bfloat16 as bits.

    It multiplies those bits as if they were integers, makes none from integers, and cuts where a
    GPU rounds to nearest.
    """
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    create_dot, cast = InterpreterBuilder.create_dot, InterpreterBuilder.cast_impl

    def widened(handle: Any) -> Any:
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        data = (handle.data.astype(np.uint32) << np.uint32(16)).view(np.float32)
        return TensorHandle(data, tl.float32)

    def dot(self: Any, a: Any, b: Any, d: Any, *rest: Any) -> Any:
        return create_dot(self, widened(a), widened(b), d, *rest)

    def cast_impl(self: Any, source: Any, kind: Any) -> Any:
        source = widened(source)
        if kind.scalar != tl.bfloat16:
            return cast(self, source, kind)
        values = torch.from_numpy(np.ascontiguousarray(source.data, dtype=np.float32))
        bits = values.to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)
        return TensorHandle(bits.reshape(source.data.shape), tl.bfloat16)

    take_any_mask()
    InterpreterBuilder.create_dot = dot
    InterpreterBuilder.cast_impl = cast_impl


def main() -> None:
    _pretend_cpu_backend()
    import vllm.v1.worker.cpu.shm  # noqa: F401

    import tests.kernels.loop_cases  # noqa: F401
    from tests.kernels.checks import CHECKS, INTERPRETER_CHECKS
    from tests.kernels.registry import CASES
    from vllm_adadecode.kernels import projection_reference
    from vllm_adadecode.kernels.launch import REFERENCES

    _interpretable()
    # The interpreter warns where a hash overflows, as it is meant to.
    np.seterr(all="ignore")

    def exact(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.linear(x.float(), weight.float())

    chosen = {name: case for name, case in CASES.items() if all(a in name for a in sys.argv[1:])}
    with patch.object(projection_reference, "project", exact):
        differences, noticed = compare_all(chosen, REFERENCES, PACKAGE)
    found = {
        "differences": differences,
        "kernels": {name: case.kernels for name, case in chosen.items()},
        "noticed": noticed,
        "checks": {name: check() for name, check in {**CHECKS, **INTERPRETER_CHECKS}.items()},
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
