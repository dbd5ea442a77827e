"""``adadecode train`` as a whole: what it writes, what it refuses, what survives a kill."""

from __future__ import annotations

import errno
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file

from tests.support.training_samples import data_file, random_sequences, tiny_target
from vllm_adadecode.cli import main
from vllm_adadecode.heads import HeadsConfig, check_weights, load_draft_vocab, load_heads
from vllm_adadecode.heads.resolve import resolve_verifier
from vllm_adadecode.training import run as training_run
from vllm_adadecode.training.provenance import public
from vllm_adadecode.training.sequences import Sequence

Capture = pytest.CaptureFixture[str]
ROOT = Path(__file__).parents[2]
QUICK = ["--held-out", "0.2", "--batch-size", "8", "--epochs", "2", "--exit-layers", "1", "3"]


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_target(tmp_path_factory.mktemp("target") / "tiny")


@pytest.fixture
def arguments(target: Path, tmp_path: Path) -> list[str]:
    """A whole command without its output."""
    data = str(data_file(tmp_path / "data.jsonl"))
    return ["train", str(target), "--data", data, "--cache", str(tmp_path / "cache"), *QUICK]


def train(arguments: list[str], output: Path, *more: str) -> int:
    return main([*arguments, "--output", str(output), *more])


def refused(arguments: list[str], output: Path, capsys: Capture, *more: str) -> str:
    """The complaint; nothing is there that was not there before."""
    before = sorted(p for p in output.parent.iterdir() if p.name != "cache")
    assert train(arguments, output, *more) == 1
    assert sorted(p for p in output.parent.iterdir() if p.name != "cache") == before
    lines = capsys.readouterr().err.splitlines()
    complaints = [line for line in lines if line.startswith("adadecode: error: ")]
    assert len(complaints) == 1
    assert lines[-1] == complaints[0]
    return complaints[0]


# --- what it writes ----------------------------------------------------------------------------


def test_a_run(
    target: Path,
    arguments: list[str],
    tmp_path: Path,
    capsys: Capture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    output = tmp_path / "new" / "heads"
    more = ["--gate", "--draft-vocab", "32", "--transform", "low_rank", "--rank", "4"]
    more += ["--num-speculative-tokens", "7", "--confidence-threshold", "0.6"]
    more += ["--engine-args", '{"hf_token": "hf_secret"}']
    command = [*arguments, "--output", str(output), *more]
    monkeypatch.setattr(sys, "argv", ["/usr/bin/adadecode", *command])
    assert train(arguments, output, *more) == 0
    assert "written: " in capsys.readouterr().out
    assert sorted(p.name for p in output.iterdir()) == [
        "README.md",
        "config.json",
        "model.safetensors",
    ]
    assert list(output.parent.iterdir()) == [output]
    assert output.stat().st_mode & 0o077 == target.stat().st_mode & 0o077

    config = HeadsConfig.load(output)
    assert config.exit_layers == (1, 3)
    assert (config.transform, config.rank, config.norm) == ("low_rank", 4, "after")
    assert (config.gate, config.draft_vocab_size) == (True, 32)
    assert (config.num_speculative_tokens, config.thresholds) == (7, (0.6, 0.6))
    assert resolve_verifier(config, output) == str(target)
    check_weights(output, config)
    heads = load_heads(output, config, torch.float32, "cpu")
    for head in heads.values():
        assert all(p.abs().max() > 0 for p in head.parameters())
    vocab = load_draft_vocab(output, config)
    assert vocab is not None
    assert len(vocab) == 32

    made = config.provenance
    # What is uploaded says nothing of this machine, nor of what a JSON argument may hold.
    published = (output / "config.json").read_text() + (output / "README.md").read_text()
    assert "hf_secret" not in published
    assert str(tmp_path) not in published
    assert str(target.parent) not in published
    kept = [{"{": "{...}", "/": Path(word).name}.get(word[0], word) for word in command]
    assert made["command"] == shlex.join(["adadecode", *kept])
    assert (made["target"], made["data"]["from"]) == ("tiny", ["data.jsonl"])
    assert made["versions"]["torch"] == torch.__version__
    assert made["data"]["sequences"] == {"random": 40}
    assert made["data"]["digest"].startswith("sha256:")
    held_out = made["held_out"]
    assert set(held_out) == {"sequences", "positions", "exits", "before_training"}
    measured = {"loss", "agreement", "coverage", "precision"}
    assert {frozenset(e) for e in held_out["before_training"].values()} == {frozenset(measured)}
    assert set(held_out["exits"]["3"]) == measured | {"gate_passed", "gate_recall"}
    assert held_out["sequences"] < 20
    assert main(["info", str(output)]) == 0
    assert not list((tmp_path / "cache" / "runs").iterdir())


@pytest.mark.parametrize(
    ("argument", "shown"),
    [
        ("owner/model", "owner/model"),
        ("owner/data@part:train", "owner/data@part:train"),
        ("/home/me/model/", "model"),
        ("/home/me/a.jsonl:in-domain", "a.jsonl:in-domain"),
        ("~/model", "model"),
        ("../model", "model"),
        ("..", ".."),
        ("--output=/home/me/heads", "--output=heads"),
        ('--engine-args={"hf_token": "a=b"}', "--engine-args={...}"),
        (' {"hf_token": "a"}', "{...}"),
        ("--seed", "--seed"),
        ("1e-3", "1e-3"),
    ],
)
def test_what_may_be_published(argument: str, shown: str) -> None:
    assert public(argument) == shown


def test_the_model_card(target: Path, arguments: list[str], tmp_path: Path) -> None:
    more = ["--gate", "--target-name", "owner/model"]
    assert train(arguments, tmp_path / "heads", *more) == 0
    card = ModelCard.load(tmp_path / "heads" / "README.md")
    assert card.data.base_model == "owner/model"
    assert card.data.library_name == "vllm"
    config = HeadsConfig.load(tmp_path / "heads")
    assert config.speculators_config.verifier.name_or_path == "owner/model"
    for e, figures in config.provenance["held_out"]["exits"].items():
        before = config.provenance["held_out"]["before_training"][e]
        row = next(line for line in card.text.splitlines() if line.startswith(f"| {e} | "))
        assert f"{figures['loss']:.4f} ({before['loss']:.4f})" in row
        assert f"{figures['agreement']:.1%}" in row
    assert "vllm serve owner/model" in card.text
    assert config.provenance["data"]["digest"] in card.text
    assert "The gates" in card.text


def test_beside_the_target(arguments: list[str], tmp_path: Path) -> None:
    target = tiny_target(tmp_path / "own")
    output = target / "adadecode"
    assert train([*arguments[:1], str(target), *arguments[2:]], output) == 0
    config = HeadsConfig.load(output)
    assert config.speculators_config.verifier.name_or_path == ".."
    # A path of this machine is no base_model that the hub would find.
    assert ModelCard.load(output / "README.md").data.base_model is None


def test_identity_has_nothing_to_train(arguments: list[str], tmp_path: Path) -> None:
    assert train(arguments, tmp_path / "heads", "--transform", "identity") == 0
    assert sorted(p.name for p in (tmp_path / "heads").iterdir()) == ["README.md", "config.json"]
    held_out = HeadsConfig.load(tmp_path / "heads").provenance["held_out"]
    assert held_out["exits"] == held_out["before_training"]


def test_weights_are_stored_in_the_target_s_dtype(arguments: list[str], tmp_path: Path) -> None:
    target = tiny_target(tmp_path / "bf16")
    config = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(config | {"dtype": "bfloat16"}))
    assert train([*arguments[:1], str(target), *arguments[2:]], tmp_path / "heads", "--gate") == 0
    stored = load_file(tmp_path / "heads" / "model.safetensors")
    assert stored["exit_1.weight"].dtype == torch.bfloat16
    assert stored["exit_1.gate_weight"].dtype == torch.float32


def test_overwriting_heads(arguments: list[str], tmp_path: Path, capsys: Capture) -> None:
    output = tmp_path / "heads"
    assert train(arguments, output) == 0
    (output / "notes.txt").write_text("mine")
    before = {p.name: p.read_bytes() for p in output.iterdir()}
    assert "--overwrite" in refused(arguments, output, capsys)
    assert {p.name: p.read_bytes() for p in output.iterdir()} == before
    assert train(arguments, output, "--overwrite", "--seed", "1") == 0
    after = {p.name: p.read_bytes() for p in output.iterdir()}
    assert after.keys() == before.keys()
    assert [n for n in after if after[n] == before[n]] == ["notes.txt"]


# --- what it refuses ---------------------------------------------------------------------------


def test_outputs_that_are_something_else(
    target: Path, arguments: list[str], tmp_path: Path, capsys: Capture
) -> None:
    (tmp_path / "file").write_text("x")
    assert "is a file" in refused(arguments, tmp_path / "file", capsys)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("x")
    for more in ([], ["--overwrite"]):
        complaint = refused(arguments, tmp_path / "full", capsys, *more)
        assert "holds something else than heads" in complaint
        assert "holds something else" in refused(arguments, target, capsys, *more)
    (tmp_path / "empty").mkdir()
    assert train(arguments, tmp_path / "empty") == 0


@pytest.mark.parametrize(
    ("more", "complaint"),
    [
        (["--exit-layers", "2", "4"], "exit layer 4 is out of range"),
        (["--transform", "low_rank", "--rank", "48"], "rank 48 must be below the hidden size"),
        (["--draft-vocab", "96"], "must be smaller than the target's 96"),
        (["--data", "absent.jsonl"], "absent.jsonl is no file here"),
        (["--held-out", "1e-9"], "leave none to hold out"),
        (["--learning-rate", "nan"], "--learning-rate must be above 0"),
        (["--learning-rate", "1e37", "--norm", "before", "--epochs", "9"], "lower --learning-rate"),
    ],
)
def test_bad_values(
    arguments: list[str], tmp_path: Path, capsys: Capture, more: list[str], complaint: str
) -> None:
    assert complaint in refused(arguments, tmp_path / "heads", capsys, *more)


def test_bad_data(target: Path, arguments: list[str], tmp_path: Path, capsys: Capture) -> None:
    data = tmp_path / "data.jsonl"
    good = data.read_text()
    data.write_text("{}\n" + good)
    assert f"{data}:1: has none of the fields" in refused(arguments, tmp_path / "h", capsys)
    assert train(arguments, tmp_path / "h", "--skip-malformed") == 0
    assert f"left out 1 malformed line: {data}:1" in capsys.readouterr().out.replace("\n", "")
    data.write_text("")
    assert "no data in" in refused(arguments, tmp_path / "heads", capsys)
    data_file(data, [Sequence((1,), (96,), "x"), *random_sequences(9)])
    assert "token 96 is outside" in refused(arguments, tmp_path / "heads", capsys)
    data_file(data, [Sequence((1,), (), str(i)) for i in range(9)])
    data.write_text(data.read_text().replace("[]", "[2]"))
    complaint = refused(arguments, tmp_path / "heads", capsys, "--max-length", "1")
    assert "leave none" in complaint or "has a position to learn" in complaint
    data.write_text('{"messages": [{"role": "user", "content": "w1"}]}\n')
    assert "has no chat template" in refused(arguments, tmp_path / "heads", capsys)
    data.write_text('{"prompt_ids": [1, 2, 3]}\n')
    complaint = refused(arguments, tmp_path / "heads", capsys, "--max-prompt-tokens", "2")
    assert "every prompt is longer than 2 tokens" in complaint


def test_bad_targets(arguments: list[str], tmp_path: Path, capsys: Capture) -> None:
    absent = [*arguments[:1], str(tmp_path / "absent"), *arguments[2:]]
    assert "is no folder and can't be had" in refused(absent, tmp_path / "heads", capsys)
    target = tiny_target(tmp_path / "other")
    other = [*arguments[:1], str(target), *arguments[2:]]
    (tmp_path / "data.jsonl").write_text('{"prompt": "w1 w2"}\n')
    for file in target.glob("tokenizer*"):
        file.unlink()
    assert "has no tokenizer" in refused(other, tmp_path / "heads", capsys)
    config = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(config | {"architectures": ["GPT2LMHeadModel"]}))
    assert "can't cut GPT2LMHeadModel" in refused(other, tmp_path / "heads", capsys)


def test_usage_errors(capsys: Capture) -> None:
    for bad in (["--rank", "0"], ["--held-out", "1"], ["--engine-args", "[]"], ["--epochs", "x"]):
        with pytest.raises(SystemExit) as stop:
            main(["train", "t", "--data", "d", "--output", "o", *bad])
        assert stop.value.code == 2
        assert f"argument {bad[0]}: " in capsys.readouterr().err


# --- full disks and kills ----------------------------------------------------------------------


def test_no_space_left(
    arguments: list[str], tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every write of a run fails in turn; the next command then goes on."""
    arguments += ["--checkpoint-every", "4"]
    fsync, writes, broken = os.fsync, 0, -1

    def full(descriptor: int) -> None:
        nonlocal writes
        writes += 1
        if writes == broken:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    assert train(arguments, tmp_path / "whole") == 0
    total = writes
    # States at steps 4, 8 and the end; config, weights, card.
    assert total >= 5
    capsys.readouterr()
    for broken in range(1, total + 1):
        writes = 0
        cache = ["--cache", str(tmp_path / f"cache{broken}")]
        before = sorted(tmp_path.iterdir())
        assert train(arguments, tmp_path / "heads", *cache) == 1
        complaint = capsys.readouterr().err.splitlines()[-1]
        assert complaint.startswith("adadecode: error: no space left on the disk")
        left = sorted(p for p in tmp_path.iterdir() if p.name != f"cache{broken}")
        assert left == before
    monkeypatch.setattr(os, "fsync", fsync)
    assert train(arguments, tmp_path / "heads", *cache) == 0
    capsys.readouterr()
    whole, found = (load_file(tmp_path / n / "model.safetensors") for n in ("whole", "heads"))
    assert all(torch.equal(whole[name], found[name]) for name in whole)


def steps_done(cache: Path) -> int:
    states = [torch.load(file, weights_only=True) for file in cache.glob("runs/*/state.pt")]
    return states[0]["run"]["step"] if states else 0


def test_kill_minus_nine(arguments: list[str], tmp_path: Path) -> None:
    arguments += ["--checkpoint-every", "3", "--epochs", "15", "--eval-every", "7", "--gate"]
    arguments += ["--transform", "low_rank", "--rank", "4", "--patience", "1000"]
    assert train(arguments, tmp_path / "whole", "--cache", str(tmp_path / "other")) == 0
    command = [sys.executable, "-m", "vllm_adadecode.cli", *arguments]
    child = subprocess.Popen(
        [*command, "--output", str(tmp_path / "heads")], cwd=ROOT, stdout=subprocess.DEVNULL
    )
    try:
        while steps_done(tmp_path / "cache") < 6:
            assert child.poll() is None, "the run ended before it was killed"
            time.sleep(0.01)
    finally:
        child.send_signal(signal.SIGKILL)
        child.wait()
    killed_at = steps_done(tmp_path / "cache")
    assert 6 <= killed_at < 60
    assert not (tmp_path / "heads").exists()
    assert train(arguments, tmp_path / "heads") == 0
    whole, found = (load_file(tmp_path / n / "model.safetensors") for n in ("whole", "heads"))
    assert whole.keys() == found.keys()
    assert all(torch.equal(whole[name], found[name]) for name in whole)


def test_another_run_does_not_go_on_from_this_one(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    def refuse(*args: Any) -> None:
        raise OSError(errno.EIO, "broken")

    with monkeypatch.context() as patch:
        patch.setattr(training_run, "save_heads", refuse)
        assert train(arguments, tmp_path / "heads") == 1
    assert "broken" in capsys.readouterr().err
    runs = set((tmp_path / "cache" / "runs").iterdir())
    assert len(runs) == 1
    assert train(arguments, tmp_path / "other", "--seed", "1") == 0
    assert "goes on" not in capsys.readouterr().out
    assert set((tmp_path / "cache" / "runs").iterdir()) == runs
    assert train(arguments, tmp_path / "heads", "--checkpoint-every", "7") == 0
    assert "training goes on at step" in capsys.readouterr().out
