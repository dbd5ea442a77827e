"""The GPU suite as it runs without a GPU: every part, with real engines, at its tiny size."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.gpu_suite import __main__ as command


def test_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    out = tmp_path / "result.json"
    arguments = ["--device", "cpu", "--out", str(out)]
    code = command.main(arguments)
    written = json.loads(out.read_text())
    assert written["missing"] == {}
    assert {part["status"] for part in written["parts"].values()} == {"done"}
    assert code == 0

    assert written["bit_identical"] is True
    assert written["gpu"] is None
    batches = {"1", "4"}
    for name in ("efficiency", "speedup", "ideal_speedup"):
        assert written[name].keys() == batches
    for batch in batches:
        ratio = written["speedup"][batch] / written["ideal_speedup"][batch]
        assert written["efficiency"][batch] == pytest.approx(ratio)
        assert written["draft_acceptance_rate"][batch] > 0.5
    # Of counts; the wall clock of a busy machine is not asserted on.
    assert written["ideal_speedup"]["1"] > 1
    assert all(ratio > 0 for ratio in written["ratio_by_concurrency"].values())

    waits = written["parts"]["host_syncs"]["data"]
    assert waits["1"]["adadecode"]["rounds"] > 0
    assert waits["1"]["adadecode"]["syncs_per_round"] > waits["1"]["vanilla"]["syncs_per_round"]
    assert any("vllm_adadecode" in place for place in waits["1"]["adadecode"]["places"])

    for name, cell in written["parts"]["traces"]["data"].items():
        assert cell["coverage"] == pytest.approx(0.8, abs=0.15), name
    assert written["engines"]["adadecode"]["runner"].startswith("AdaDecode")
    assert written["target"]["reads"]["in_layers"]["head_check"] > 0

    # Everything is there: nothing is made or started again.
    monkeypatch.setattr(command, "Clock", lambda *_: pytest.fail("measured again"))
    assert command.main(arguments) == 0
    assert json.loads(out.read_text()) == written
