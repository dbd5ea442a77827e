"""What all kernels share: how a reference takes a kernel's place, and checks on inputs.

Owns the registration of torch references with vLLM's kernel dispatcher on platforms without Triton,
and the checks on inputs that every wrapper makes. It knows no kernel.
"""

import sys
from collections.abc import Callable, Mapping

import torch
from vllm.triton_utils import HAS_TRITON
from vllm.triton_utils.dispatcher import KernelOverride

from vllm_adadecode.errors import AdaDecodeError

# A reference: takes a kernel's launch arguments, and ignores launch options such as `num_warps`.
Reference = Callable[..., None]

# Every kernel of this package by its full name, and its reference.
REFERENCES: dict[str, Reference] = {}


def register_references(module: str, references: Mapping[str, Reference]) -> None:
    """Declare the references of a module's kernels; without Triton they run in the kernels' place.

    Called at the end of each kernel module, so importing the module is all that a caller does.
    What launches a kernel then meets the stand-in of vLLM's dispatcher. `register_kernels` would
    also search every module of the process for copies; at this moment there are none.

    Args:
        module: the module's ``__name__``.
        references: kernel attribute of that module -> function that takes its launch arguments.
    """
    namespace = vars(sys.modules[module])
    for kernel, reference in references.items():
        REFERENCES[f"{module}.{kernel}"] = reference
        if not HAS_TRITON:
            namespace[kernel] = KernelOverride(namespace[kernel], reference)


def rows_contiguous(x: torch.Tensor) -> torch.Tensor:
    """``x`` with the elements of a row side by side; its rows may be strided."""
    return x if x.stride(-1) == 1 or x.numel() == 0 else x.contiguous()


def check_matrix(name: str, x: torch.Tensor, width: int) -> None:
    """Refuse what is not ``[rows, width]``.

    Raises:
        AdaDecodeError: in one line, with the shape found.
    """
    if x.dim() != 2 or x.shape[1] != width:
        raise AdaDecodeError(f"{name} must be [rows, {width}], but is {list(x.shape)}")
