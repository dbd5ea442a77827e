"""Views on tables that lie at an address: of their own rows, for as long as they are there."""

import pytest
import torch

from vllm_adadecode.cpu.memory import int32_table, note_tables


def test_a_view_has_the_tables_own_rows() -> None:
    table = torch.zeros(3, 4, dtype=torch.int32)
    address = table.data_ptr()
    note_tables([torch.zeros(5, 4, dtype=torch.int32), table])
    view = int32_table(address, 4)
    view[2, 1] = 7
    assert table[2, 1] == 7
    with pytest.raises(IndexError, match="out of bounds"):
        view[3, 0] = 1
    with pytest.raises(AssertionError, match="a row of 8 in a table of 4"):
        int32_table(address, 8)
    del table, view
    with pytest.raises(KeyError):
        int32_table(address, 4)
