"""`make heads-report`: which files its parts are about, and what it writes."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from benchmarks.demo import heads_report
from benchmarks.demo import prompts as demo_prompts
from benchmarks.demo.corpus import SECOND_STAGE_FILES, is_held_out, load_corpus
from benchmarks.demo.heads_prompts import CHOOSING, COUNT, OUT_OF_DOMAIN, STORED


def test_parts_share_no_files() -> None:
    prompts = demo_prompts.load(STORED)
    files = {p.files: {q.source for q in prompts if q.files == p.files} for p in prompts}
    assert set(files) == {*CHOOSING, *CHOOSING.values(), *OUT_OF_DOMAIN}
    assert set(Counter(p.files for p in prompts).values()) == {COUNT}
    for part, choosing in CHOOSING.items():
        assert not files[part] & files[choosing]
    # Nothing was trained on the unseen ones; of the others, only the target.
    for name in ("unseen", "unseen_choose"):
        assert all(map(is_held_out, files[name]))
    corpus = load_corpus()
    trained_on = {s.path for n in ("train", "second_stage") for s in corpus.for_heads(n)}
    assert trained_on
    for name in ("head_held_out", "head_choose"):
        assert files[name] <= set(SECOND_STAGE_FILES)
        assert not files[name] & trained_on


def test_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    out = tmp_path / "heads.json"
    heads_report.main(["--prompts", "3", "--new-tokens", "16", "--threads", "1", "--out", str(out)])
    result = json.loads(out.read_text())
    for part in ("head_held_out", "unseen"):
        found = result[part]
        assert found["sequences"] == 3
        for setting in (found, found["paper"], found["calibrated"]):
            for name in (
                "ideal_speedup",
                "ideal_speedup_with_head_cost",
                "draft_acceptance_rate",
                "mean_acceptance_length",
            ):
                assert name in setting
            assert set(setting["exits"]) == {"2", "4", "6"}
            assert {"coverage", "precision"} <= set(setting["exits"]["2"])
    assert result["unseen"]["paper"]["ideal_speedup"] > 1.0
    assert set(result["calibrated_on"]) == set(CHOOSING.values())
    assert "calibrated_accepting" in capsys.readouterr().out
