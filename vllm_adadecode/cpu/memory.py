"""Views on tables that kernels are handed as bare addresses.

Owns which tensor lies at an address, as it was noted where vLLM takes that address: a view has the
tensor's own shape, whatever an index asks for. A replacement works on NumPy views: they share the
tensors' memory, and one NumPy operation on a few elements costs a fraction of a torch operation.
"""

from __future__ import annotations

from collections.abc import Iterable
from weakref import WeakValueDictionary

import numpy as np
import numpy.typing as npt
import torch

Int32Array = npt.NDArray[np.int32]

_tables: WeakValueDictionary[int, torch.Tensor] = WeakValueDictionary()


def note_tables(tables: Iterable[torch.Tensor]) -> None:
    """Tables ``[num_rows, row_stride]`` whose addresses kernels will be handed."""
    _tables.update((table.data_ptr(), table) for table in tables)


def int32_table(address: int, row_stride: int) -> Int32Array:
    """The int32 table ``[num_rows, row_stride]`` that lies at an address.

    Raises:
        KeyError: no table was noted there.
    """
    table = _tables[address]
    assert table.stride(0) == row_stride, f"a row of {row_stride} in a table of {table.stride(0)}"
    view: Int32Array = table.numpy()
    return view
