"""What the kernels' benchmark and tuning decide, without a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from benchmarks.kernel_report import describe
from benchmarks.kernel_shapes import ROTATED_BYTES, HeadShape, head_shapes, summarise
from benchmarks.tune_kernels import SHARED, Measurements, choose, row_candidates
from vllm_adadecode.kernels.tuning import parse_config, select

ROOT = Path(__file__).parents[2]


def test_bytes_and_operations() -> None:
    shape = HeadShape(rows=16, vocab_size=128256, hidden_size=4096)
    assert shape.weight_bytes == 128256 * 4096 * 2 == 1_050_673_152
    assert shape.bytes_read == 1_050_673_152 + 16 * 4096 * 2
    assert shape.flops == 2 * 16 * 128256 * 4096
    small = HeadShape(1, 32000, 2048, "int8")
    assert small.weight_bytes == 32000 * 2048 + 32000 * 4
    # No set is still in a cache when its turn comes again.
    assert small.num_input_sets * small.weight_bytes >= ROTATED_BYTES
    assert HeadShape(1, 151936, 8192).num_input_sets == 2


def test_all_shapes_are_measured() -> None:
    shapes = list(head_shapes())
    assert len(shapes) == len(set(shapes)) == 7 * 3 * 3
    heads = [(s.vocab_size, s.hidden_size) for s in shapes]
    changes = sum(a != b for a, b in pairwise(heads))
    assert changes == 8, "shapes of one LM head must follow each other"


@pytest.mark.parametrize(
    ("rows", "fused", "goals"),
    [
        (1, 1.0, {"reads_fast_enough": True, "not_slower_than_compiled": True}),
        (16, 1.1, {"reads_fast_enough": False, "not_slower_than_compiled": True}),
        (16, 2.1, {"reads_fast_enough": False, "not_slower_than_compiled": False}),
        (64, 9.0, {}),
        (256, 1.2, {"multiplies_fast_enough": True}),
        (256, 1.3, {"multiplies_fast_enough": False}),
    ],
)
def test_goals(rows: int, fused: float, goals: dict[str, bool]) -> None:
    ms = {"fused": fused, "torch": 3.0, "compiled": 2.0, "copy": 0.9, "matmul": 1.0}
    found = summarise(HeadShape(rows, 128256, 4096), ms)
    assert {name: value for name, value in found.items() if isinstance(value, bool)} == goals
    assert found["of_copy"] == pytest.approx(0.9 / fused)
    assert found["gb_per_s"] == pytest.approx((1_050_673_152 + rows * 8192) / fused / 1e6)


def test_tuning_chooses_one_order_of_sums_for_all_rows() -> None:
    best_for_few, best_for_all, broken = (64, 64, 4, 1), (128, 64, 8, 1), (256, 128, 8, 1)
    measured = {
        best_for_few: {16: {(16, 4): 1.0}, 256: {(128, 3): 4.0}},
        best_for_all: {16: {(16, 4): 1.2, (16, 3): 1.1}, 256: {(128, 3): 2.0}},
        broken: {16: {(16, 4): 0.9}, 256: {(128, 3): float("inf")}},
    }
    config = parse_config(choose(measured), "test")
    assert (config["BLOCK_V"], config["num_warps"]) == (128, 8)
    assert config["rows"]["16"] == {"BLOCK_R": 16, "num_stages": 3}
    assert select(config, 200).BLOCK_R == 128
    with pytest.raises(ValueError, match="no block sizes"):
        choose({broken: measured[broken]})


def test_tuning_candidates() -> None:
    assert {width for width, _ in row_candidates(16)} == {16}
    assert {width for width, _ in row_candidates(256)} == {64, 128}
    assert len(set(SHARED)) == len(SHARED) > 20


def test_tuning_goes_on_where_it_stopped(tmp_path: Path) -> None:
    kept = Measurements(tmp_path / "times.json")
    kept.put("a", 1.5)
    kept.put("b", float("inf"))
    again = Measurements(tmp_path / "times.json")
    assert (again.get("a"), again.get("b"), again.get("c")) == (1.5, float("inf"), None)


@pytest.mark.parametrize("module", ["benchmarks.kernels", "benchmarks.tune_kernels"])
def test_one_line_without_a_gpu(module: str) -> None:
    run = subprocess.run(
        [sys.executable, "-m", module],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
    )
    assert run.returncode == 1
    assert run.stderr.splitlines() == [
        f"python -m {module} measures on a GPU, and no CUDA device answers here"
    ]


def test_report_of_a_kernel() -> None:
    comparison = {
        "kernels": {"good": ["a.x"], "other": ["a.x", "a.y"], "third": ["a.z"]},
        "differences": {"good": "", "other": "differs", "third": ""},
    }
    fine: dict[str, Any] = {"variant": "v", "registers": 40, "shared_memory": 16, "spilled": 0}
    launches: list[dict[str, Any]] = [
        {**fine, "architecture": "sm_80"},
        {**fine, "architecture": "sm_80", "registers": 90},
        {**fine, "architecture": "sm_90"},
        {"architecture": "sm_90", "variant": "w", "error": "ValueError: no"},
    ]
    assert not describe("a.x", comparison, launches)["equal"]
    found = describe("a.z", comparison, launches)
    assert (found["equal"], found["cases"]) == (True, ["third"])
    assert (found["compiled"], found["registers"]) == (["sm_80"], {"sm_80": 90})
    # A kernel without a case was not compared.
    assert not describe("a.none", comparison, launches)["equal"]
