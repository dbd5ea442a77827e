"""What the kernels' command decides, without a GPU."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.kernels.__main__ import describe, main
from benchmarks.kernels.head import ROTATED_BYTES, HeadShape, summarise


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


def test_one_line_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(SystemExit, match=r"kernels times measures on a GPU, and no CUDA device"):
        main(["times"])


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
