"""`benchmarks.head_variants`: what is trained, what is kept, what the table says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import head_variants
from benchmarks.demo import heads_prompts
from benchmarks.demo import prompts as demo_prompts
from benchmarks.head_variants import BASE, VARIANTS, Study
from vllm_adadecode.training.request import heads_config
from vllm_adadecode.training.sequences import Sequence, write_sequences

DEMO = Path(head_variants.__file__).parent / "demo" / "model"


def test_every_variant_is_a_valid_and_different_request(tmp_path: Path) -> None:
    study = Study(DEMO, tmp_path / "sequences.jsonl", tmp_path)
    trained = [name for name, variant in VARIANTS.items() if variant.weights is None]
    requests = [study.request(name, 8) for name in trained]
    for request in requests:
        heads_config(request, DEMO)
    settings = [json.dumps(r.settings(), sort_keys=True) for r in requests]
    assert len(set(settings)) == len(settings)
    assert len({study.heads_folder(name) for name in VARIANTS}) == len(VARIANTS)
    assert {VARIANTS[name].weights for name in VARIANTS} <= {None, *trained}


def test_a_run_measures_keeps_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stored = demo_prompts.load(heads_prompts.STORED)
    sequences = [
        Sequence((), tuple((7 * i + j) % 2048 for j in range(40)), "made up") for i in range(60)
    ]
    write_sequences(tmp_path / "sequences.jsonl", sequences)
    names = ["logit lens, gate", "without the gate"]
    # The second has the weights of the base, which here is as cheap as the first.
    monkeypatch.setitem(VARIANTS, BASE, VARIANTS["logit lens, gate"])
    command = [str(DEMO), "--sequences", str(tmp_path / "sequences.jsonl"), "--threads", "1"]
    command += ["--work", str(tmp_path / "work"), "--out", str(tmp_path / "out.json")]
    command += ["--prompts", "2", "--new-tokens", "8", "--only", *names]
    head_variants.main(command)
    found = json.loads((tmp_path / "out.json").read_text())["variants"]
    assert list(found) == names
    for part in head_variants.REPORTED:
        assert part in {p.files for p in stored}
        assert found[names[0]][part]["paper"]["ideal_speedup"] > 0
    with_gate, without = (found[name]["settings"] for name in names)
    assert "gate_threshold" in with_gate["calibrated"]
    assert "gate_threshold" not in without["calibrated"]
    assert found[names[0]]["unseen"]["paper"] == found[names[1]]["unseen"]["paper"]
    assert names[1] in capsys.readouterr().out

    def fails(*_: object) -> None:
        raise AssertionError("what is done was done again")

    monkeypatch.setattr(head_variants, "measure", fails)
    monkeypatch.setattr(head_variants, "run_training", fails)
    head_variants.main(command)
    assert json.loads((tmp_path / "out.json").read_text())["variants"] == found
