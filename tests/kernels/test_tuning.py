"""Block sizes from JSON, and the meeting with vLLM's warm-up registry."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from vllm.model_executor.warmup.jit_warmup import JitWarmupRegistry

from vllm_adadecode.engine import warmup
from vllm_adadecode.errors import AdaDecodeError
from vllm_adadecode.kernels import tuning

TUNED = {
    "BLOCK_V": 256,
    "BLOCK_K": 32,
    "num_warps": 4,
    "tiles_per_split": 2,
    "rows": {"16": {"BLOCK_R": 16, "num_stages": 5}, "64": {"BLOCK_R": 64, "num_stages": 2}},
}


def load(device: str | None = "NVIDIA H200") -> dict[str, Any]:
    tuning.load_config.cache_clear()
    return tuning.load_config(128256, 4096, "bfloat16", 2, device)


def test_a_tuned_file_is_found_by_shape_and_device(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_TUNED_CONFIG_FOLDER", str(tmp_path))
    name = tuning.config_file_name(128256, 4096, "bfloat16", "NVIDIA H200")
    assert name == "V=128256,d=4096,device_name=NVIDIA_H200,dtype=bfloat16.json"
    (tmp_path / name).write_text(json.dumps(TUNED))
    config = load()
    assert tuning.select(config, 1) == tuning.HeadBlocks(256, 32, 16, 2, 4, 5)
    assert tuning.select(config, 17).BLOCK_R == 64
    assert tuning.select(config, 1000).BLOCK_R == 64
    assert load("NVIDIA A100") == tuning.default_config(128256, 2)
    assert load(None) == tuning.default_config(128256, 2)


@pytest.mark.parametrize("change", [{"BLOCK_V": 0}, {"num_warps": "4"}, {"rows": {}}])
def test_a_broken_file_is_refused_in_one_line(
    change: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_TUNED_CONFIG_FOLDER", str(tmp_path))
    name = tuning.config_file_name(128256, 4096, "bfloat16", "NVIDIA H200")
    (tmp_path / name).write_text(json.dumps({**TUNED, **change}))
    with pytest.raises(AdaDecodeError, match="correct or remove it") as error:
        load()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("element_size", [1, 2, 4])
@pytest.mark.parametrize("vocab_size", [512, 32000, 151936])
def test_what_orders_a_sum_does_not_follow_the_batch(vocab_size: int, element_size: int) -> None:
    config = tuning.default_config(vocab_size, element_size)
    chosen = [tuning.select(config, rows) for rows in (1, 16, 17, 64, 256, 1000)]
    shared = {(b.BLOCK_V, b.BLOCK_K, b.num_warps, b.tiles_per_split) for b in chosen}
    assert len(shared) == 1
    assert {b.BLOCK_R for b in chosen} != {chosen[0].BLOCK_R}


def test_blocks_of_a_weight() -> None:
    blocks = tuning.head_blocks(torch.empty(512, 64, dtype=torch.bfloat16), 3)
    assert (blocks.BLOCK_V, blocks.BLOCK_R) == (64, 16)


@pytest.mark.parametrize(
    ("max_num_rows", "expected"), [(3, [3]), (40, [16, 32, 40]), (300, [16, 32, 64, 128, 256, 300])]
)
def test_warm_up_runs_once_for_each_kernel(
    monkeypatch: pytest.MonkeyPatch, max_num_rows: int, expected: list[int]
) -> None:
    """A kernel for each row tile, and one for each power of two of rows behind a gate."""
    monkeypatch.setattr(warmup, "HAS_TRITON", True)
    registry = JitWarmupRegistry(vllm_config=None)
    ran: list[int] = []
    with registry.activate():
        warmup.register_warmup(ran.append, max_num_rows=max_num_rows)
    assert ran == []
    registry.warmup()
    assert ran == expected


def test_nothing_to_warm_up_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(warmup, "HAS_TRITON", False)
    registry = JitWarmupRegistry(vllm_config=None)
    with registry.activate():
        warmup.register_warmup(lambda rows: None, max_num_rows=40)
    assert len(registry) == 0
