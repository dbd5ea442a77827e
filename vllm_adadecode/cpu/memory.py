"""Views on the memory that kernels are handed as tensors or as bare addresses.

A replacement works on NumPy views: they share the tensors' memory, and one NumPy operation on a few
elements costs a fraction of a torch operation.
"""

from __future__ import annotations

import ctypes
from functools import lru_cache

import numpy as np
import numpy.typing as npt

Int32Array = npt.NDArray[np.int32]

# Kernels are not told how many rows a table behind an address has; no view reads past the rows
# that its caller indexes.
_UNKNOWN_ROWS = 1 << 20


@lru_cache(maxsize=256)
def int32_table(address: int, row_stride: int, num_rows: int = _UNKNOWN_ROWS) -> Int32Array:
    """An int32 table [num_rows, row_stride] that lies at an address, without owning it."""
    buffer = (ctypes.c_int32 * (num_rows * row_stride)).from_address(address)
    return np.frombuffer(memoryview(buffer), dtype=np.int32).reshape(num_rows, row_stride)
