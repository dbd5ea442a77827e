"""Writes safetensors files of any size in bounded memory.

The *safetensors* library writes tensors that are in memory whole. Here they come by blocks of rows;
blocks of zeros are not written but left as holes of the file, which read as zeros and take no disk.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from math import prod
from pathlib import Path

import torch

from benchmarks.widening.target import WideTensor

DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16"}
CHUNK_BYTES = 16 << 20


def num_bytes(tensor: WideTensor) -> int:
    return prod(tensor.shape) * tensor.dtype.itemsize


def write(
    file: Path, tensors: Sequence[WideTensor], advance: Callable[[int], object] = lambda _: None
) -> None:
    """Write a safetensors file.

    Args:
        advance: called with the bytes of tensors that were done since the last call.

    Raises:
        OSError: the disk refuses.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in tensors:
        begin, end = end, end + num_bytes(tensor)
        header[tensor.name] = {
            "dtype": DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors:
            row_bytes = tensor.row_length * tensor.dtype.itemsize
            step = max(1, CHUNK_BYTES // row_bytes)
            for start in range(0, tensor.shape[0], step):
                part = tensor.rows(start, min(start + step, tensor.shape[0]))
                size = len(part) * row_bytes
                if part.any():
                    stream.write(part.view(torch.uint8).numpy().data)
                else:
                    stream.seek(size, 1)
                advance(size)
        stream.truncate(8 + len(text) + end)
