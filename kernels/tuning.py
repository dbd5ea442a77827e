"""Block sizes of the fused head: tuned ones from JSON, per device and shape, or defaults.

Owns the choice, not the search (benchmarks/tune_kernels.py of commit 79bb807). As in vLLM's fused
MoE, a file is named after what it was tuned for, and ``VLLM_TUNED_CONFIG_FOLDER`` is looked into
first.

What decides in which order a row's numbers are added (vocabulary block, depth of a step, warps,
split) is one choice for all numbers of rows: a row's result does not depend on how many others are
in the batch. Only the tile's width in rows and the pipeline's stages follow the batch.
"""

import functools
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from vllm_adadecode.errors import AdaDecodeError

CONFIGS = Path(__file__).resolve().parent / "configs"

# Numbers of rows that get a tile of their own; more rows than the last take several tiles.
ROW_BUCKETS = (16, 32, 64, 128)

SHARED_KEYS = ("BLOCK_V", "BLOCK_K", "num_warps", "tiles_per_split")
ROW_KEYS = ("BLOCK_R", "num_stages")


@dataclass(frozen=True)
class HeadBlocks:
    """How one launch of the fused head is cut.

    Attributes:
        BLOCK_V: tokens of the vocabulary in a tile.
        BLOCK_K: elements of the hidden size in a step.
        BLOCK_R: rows in a tile.
        tiles_per_split: vocabulary tiles that one program takes in turn.
        num_warps, num_stages: Triton's launch options.
    """

    BLOCK_V: int
    BLOCK_K: int
    BLOCK_R: int
    tiles_per_split: int
    num_warps: int
    num_stages: int


def dtype_name(weight: torch.Tensor) -> str:
    """The weights' dtype as it stands in file names, e.g. ``bfloat16`` or ``int8``."""
    return str(weight.dtype).removeprefix("torch.")


def config_file_name(vocab_size: int, hidden_size: int, dtype: str, device: str) -> str:
    """Name of a tuned file: ``V=128256,d=4096,device_name=NVIDIA_H200,dtype=bfloat16.json``."""
    device = device.replace(" ", "_").replace("/", "_")
    return f"V={vocab_size},d={hidden_size},device_name={device},dtype={dtype}.json"


def parse_config(data: dict[str, Any], source: str) -> dict[str, Any]:
    """Check a config's keys and values.

    Raises:
        AdaDecodeError: a key is missing or a value is no positive integer.
    """
    rows = data.get("rows")
    if not isinstance(rows, dict) or not rows:
        raise AdaDecodeError(f"{source}: no 'rows': correct or remove it")
    found = [(key, data.get(key)) for key in SHARED_KEYS]
    found += [(key, row.get(key)) for row in rows.values() for key in ROW_KEYS]
    for key, value in found:
        if not isinstance(value, int) or value < 1:
            raise AdaDecodeError(
                f"{source}: {key} is {value!r}, not a positive integer: correct or remove it"
            )
    return data


def select(config: dict[str, Any], num_rows: int) -> HeadBlocks:
    """The blocks of a config for a number of rows: the smallest row entry that holds them."""
    entries = sorted((int(key), value) for key, value in config["rows"].items())
    row = next((value for key, value in entries if num_rows <= key), entries[-1][1])
    return HeadBlocks(
        **{key: config[key] for key in SHARED_KEYS}, **{key: row[key] for key in ROW_KEYS}
    )


@functools.cache
def _default_configs() -> dict[str, Any]:
    path = CONFIGS / "default.json"
    return {k: parse_config(v, str(path)) for k, v in json.loads(path.read_text()).items()}


def default_config(vocab_size: int, element_size: int) -> dict[str, Any]:
    """Untuned blocks, by the size of a weight in bytes.

    A small draft vocabulary gets smaller tiles, so that its few rows spread over more programs.
    """
    config = _default_configs()[str(element_size)]
    if vocab_size < 16384:
        config = {**config, "BLOCK_V": config["BLOCK_V"] // 2, "num_warps": 4}
    return config


@functools.lru_cache(maxsize=64)
def load_config(
    vocab_size: int, hidden_size: int, dtype: str, element_size: int, device: str | None
) -> dict[str, Any]:
    """The tuned config of a shape on a device, else the default."""
    if device is not None:
        name = config_file_name(vocab_size, hidden_size, dtype, device)
        chosen = os.environ.get("VLLM_TUNED_CONFIG_FOLDER")
        for folder in (Path(chosen), CONFIGS) if chosen else (CONFIGS,):
            path = folder / name
            if path.exists():
                return parse_config(json.loads(path.read_text()), str(path))
    return default_config(vocab_size, element_size)


def head_blocks(weight: torch.Tensor, num_rows: int) -> HeadBlocks:
    """How to cut the projection of ``num_rows`` rows on ``[vocab_size, hidden_size]``."""
    device = torch.cuda.get_device_name(weight.device) if weight.is_cuda else None
    vocab_size, hidden_size = weight.shape
    config = load_config(vocab_size, hidden_size, dtype_name(weight), weight.element_size(), device)
    return select(config, num_rows)
