"""Traces, data and measured costs on small targets; `adadecode eval` and `calibrate` on them."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests.support.heads_samples import VOCAB, make_heads, make_target
from vllm_adadecode.cli import main
from vllm_adadecode.errors import AdaDecodeError
from vllm_adadecode.evaluation.costs import choose_costs, measure_costs
from vllm_adadecode.evaluation.data import continue_prompts, load_sets, split_spec
from vllm_adadecode.evaluation.session import Session, open_session
from vllm_adadecode.evaluation.simulate import Setting
from vllm_adadecode.evaluation.trace import make_trace
from vllm_adadecode.heads import HeadsConfig
from vllm_adadecode.model.lm_head_rows import quantize_rows
from vllm_adadecode.training.sequences import Sequence, write_sequences

Capture = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def wide_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return make_target(tmp_path / "target")


@pytest.fixture
def session(target: Path) -> Session:
    make_heads(target / "adadecode")
    return open_session(str(target))


def sequences(session: Session, count: int, tokens: int = 12) -> list[Sequence]:
    """The target's own text behind random prompts."""
    rng = np.random.default_rng(0)
    prompts = [rng.integers(1, VOCAB, 3 + i % 3).tolist() for i in range(count)]
    return continue_prompts(session.target, prompts, tokens, "own")


def costs_file(folder: Path, head: float, lm_head: float, num_layers: int = 4) -> str:
    file = folder / f"costs-{num_layers}.json"
    file.write_text(json.dumps({"num_layers": num_layers, "head": head, "lm_head": lm_head}))
    return str(file)


def full(*_: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


class TestTraces:
    def test_by_hand(self, session: Session) -> None:
        (sequence,) = sequences(session, 1)
        trace = make_trace(session.target, session.readout, sequence)
        assert trace.num_positions == len(sequence.output_ids) - 1
        model, head = session.target.model, session.readout.heads[3]
        ids = torch.tensor([sequence.ids])
        states = model.model(ids, output_hidden_states=True).hidden_states[3][0]
        # The first output token says something about the second.
        at = len(sequence.prompt_ids)
        x = model.model.norm(head.transform(states[at]))
        p, token = torch.softmax(model.lm_head(x), -1).max(-1)
        assert trace.token[1, 0] == token
        assert trace.confidence[1, 0] == pytest.approx(p.item(), rel=1e-5)
        assert trace.generated.tolist() == list(sequence.output_ids[1:])
        np.testing.assert_array_equal(trace.final, trace.generated)
        assert (trace.gate == 1).all()

    def test_chunks_change_nothing(self, session: Session) -> None:
        (sequence,) = sequences(session, 1, 20)
        whole, chunked = (
            make_trace(session.target, session.readout, sequence, chunk) for chunk in (999, 3)
        )
        np.testing.assert_array_equal(whole.token, chunked.token)
        np.testing.assert_allclose(whole.confidence, chunked.confidence, rtol=1e-5)

    def test_gates_are_read(self, target: Path) -> None:
        make_heads(target / "adadecode", gate=True)
        session = open_session(str(target))
        (sequence,) = sequences(session, 1)
        trace = make_trace(session.target, session.readout, sequence)
        states, _ = session.target.hidden_states(torch.tensor([sequence.ids]), [1])
        logit = session.readout.heads[1].gate_logit(states[1][0, len(sequence.prompt_ids)])
        assert logit is not None
        assert trace.gate[0, 0] == pytest.approx(logit.sigmoid().item(), rel=1e-5)
        assert session.setting.gate_thresholds == (0.5, 0.5)

    @pytest.mark.parametrize("quantization", [None, "int8"])
    @pytest.mark.parametrize("draft_vocab_size", [None, 40])
    def test_cheap_lm_heads(
        self, target: Path, quantization: str | None, draft_vocab_size: int | None
    ) -> None:
        make_heads(
            target / "adadecode",
            lm_head_quantization=quantization,
            draft_vocab_size=draft_vocab_size,
        )
        session = open_session(str(target))
        readout, weight = session.readout, session.target.lm_head_weight
        hidden = torch.randn(9, weight.shape[1])
        token, confidence = readout.head(1, hidden)
        x = readout.heads[1].features(hidden, session.target.norm)
        ids = readout.draft_vocab if readout.draft_vocab is not None else torch.arange(VOCAB)
        rows = weight[ids]
        if quantization is not None:
            values, scales = quantize_rows(rows)
            rows = values.float() * scales[:, None]
        logits = x @ rows.T
        other = readout.heads[1].other_logit(x)
        if other is not None:
            logits = torch.cat([logits, other[:, None]], 1)
        p = logits.softmax(-1)[:, : len(ids)]
        torch.testing.assert_close(confidence, p.max(-1).values)
        assert token.tolist() == ids[p.argmax(-1)].tolist()

    def test_outputs_of_one_token_have_no_position(self, session: Session) -> None:
        trace = make_trace(session.target, session.readout, Sequence((1, 2), (3,), "a"))
        assert trace.num_positions == 0

    def test_tokens_of_another_target(self, session: Session) -> None:
        with pytest.raises(AdaDecodeError, match="outside of the target's vocabulary"):
            make_trace(session.target, session.readout, Sequence((1,), (VOCAB, 1), "a"))


class TestData:
    def test_names(self, tmp_path: Path) -> None:
        file = tmp_path / "a.b.jsonl"
        assert split_spec(f"{file}:in-domain") == (f"{file}:in-domain", "a.b")
        file.touch()
        assert split_spec(f"{file}:in-domain") == (str(file), "in-domain")
        assert split_spec(str(file)) == (str(file), "a.b")
        assert split_spec("gsm8k:test") == ("gsm8k:test", "gsm8k")

    def test_prompts_are_continued_and_sequences_taken(
        self, session: Session, tmp_path: Path
    ) -> None:
        ready = sequences(session, 2)
        lines = [{"prompt_ids": s.prompt_ids, "output_ids": s.output_ids} for s in ready]
        lines.insert(1, {"prompt_ids": ready[0].prompt_ids})
        file = tmp_path / "data.jsonl"
        file.write_text("\n".join(map(json.dumps, lines)))
        (found,) = load_sets([f"{file}:x"], session.target, max_tokens=12)
        assert found.name == "x"
        assert [s.output_ids for s in found.sequences] == [
            ready[0].output_ids,
            ready[1].output_ids,
            ready[0].output_ids,
        ]

    def test_an_end_of_text_ends_an_output(self, session: Session) -> None:
        (whole,) = sequences(session, 1)
        end = whole.output_ids[4]
        session.target.model.generation_config.eos_token_id = [end]
        (cut,) = sequences(session, 1)
        assert cut.output_ids == whole.output_ids[: whole.output_ids.index(end) + 1]

    def test_bad_data(self, session: Session, tmp_path: Path) -> None:
        file = tmp_path / "data.jsonl"

        def refused(content: str, message: str, **options: Any) -> None:
            file.write_text(content)
            with pytest.raises(AdaDecodeError, match=message) as error:
                load_sets([str(file)], session.target, **({"max_tokens": 8} | options))
            assert "\n" not in str(error.value)

        good = '{"prompt_ids": [1, 2]}'
        refused("", "no data in")
        refused(f"{good}\nnonsense", "1 malformed line: .*data.jsonl:2: is not JSON")
        refused('{"prompt_ids": [1], "output_ids": [999, 1]}', "outside of the target's vocabulary")
        refused('{"prompt_ids": [1], "output_ids": [2]}', "at least two output tokens in data")
        refused('{"prompt": "text"}', "has no tokenizer")
        refused(good, "do not fit into the target's context of 64", max_tokens=64)
        file.write_text(f"{good}\nnonsense")
        options = {"max_tokens": 8, "skip_malformed": True}
        (found,) = load_sets([str(file)], session.target, **options)  # type: ignore[arg-type]
        assert len(found.sequences) == 1
        assert "is not JSON" in found.notes[0]


class TestMeasuredCosts:
    def test_all_parts_take_time(self, target: Path) -> None:
        make_heads(target / "adadecode", gate=True)
        session = open_session(str(target))
        costs = measure_costs(session.target, session.readout, context=8, repeats=3)
        assert costs.num_layers == 4
        assert min(costs.head, costs.gate, costs.lm_head) > 0
        assert costs.source.startswith("measured on ")
        # Hooks are gone.
        layers = session.target.model.model.layers
        assert not layers[0]._forward_pre_hooks
        assert not layers[-1]._forward_hooks

    def test_by_name(self, session: Session, tmp_path: Path) -> None:
        def chosen(which: str) -> float:
            return choose_costs(which, session.config, session.target, session.readout).lm_head

        layer = 2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 96
        assert chosen("bytes") == pytest.approx(64 * VOCAB / layer)
        assert chosen(costs_file(tmp_path, 1.0, 2.0)) == 2.0
        for file, message in (
            (costs_file(tmp_path, 1.0, 2.0, num_layers=8), "of a target of 8 layers, this one has"),
            ("absent.json", "does not exist"),
        ):
            with pytest.raises(AdaDecodeError, match=message):
                chosen(file)


class TestCommands:
    @pytest.fixture
    def data(self, session: Session, tmp_path: Path) -> Path:
        file = tmp_path / "own.jsonl"
        write_sequences(file, sequences(session, 8, 24))
        return file

    def test_eval(self, target: Path, data: Path, capsys: Capture) -> None:
        args = ["eval", str(target / "adadecode"), "--data", f"{data}:in-domain"]
        args += ["--data", f"{data}:out-of-domain"]
        assert main(args) == 0
        out = capsys.readouterr().out
        for text in ("in-domain", "out-of-domain", "exits 1 at 0.5, 3 at 0.75; K = 5"):
            assert text in out
        assert main([*args, "--json"]) == 0
        result = json.loads(capsys.readouterr().out)
        found = result["sets"]["in-domain"]
        assert found == result["sets"]["out-of-domain"]
        assert found["own_text"] == 1.0
        assert set(found["exits"]) == {"1", "3"}
        assert result["setting"]["confidence_threshold"] == [0.5, 0.75]

    def test_tables_in_a_narrow_terminal(
        self, target: Path, data: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("COLUMNS", "80")
        names = [f"{data}:{name}" for name in ("head_held_out", "unseen", "python_docs")]
        assert main(["eval", str(target / "adadecode"), "--data", *names]) == 0
        out = capsys.readouterr().out
        assert "\N{HORIZONTAL ELLIPSIS}" not in out
        assert max(map(len, out.splitlines())) <= 80
        # Words stay whole.
        words = out.split()
        for word in (*names, "agreement", "coverage", "precision", "acceptance", "evaluated"):
            assert word.rpartition(":")[2] in words

    def test_calibrate_turns_useless_heads_off(
        self, target: Path, data: Path, tmp_path: Path, capsys: Capture
    ) -> None:
        heads, output = target / "adadecode", tmp_path / "calibrated"
        costs = costs_file(tmp_path, 0.4, 0.3)
        args = ["calibrate", str(heads), "--data", str(data), "--costs", costs]
        (heads / "README.md").write_text("# Card\n")
        for _ in range(2):
            assert main([*args, "--output", str(output), "--overwrite"]) == 0
            assert main([*args, "--output", str(output)]) == 1
        assert "drafting is turned off" in capsys.readouterr().out
        # Nothing that is uploaded says where things lie on this machine.
        for file in output.glob("*[dn]"):
            assert str(tmp_path) not in file.read_text()
        config = HeadsConfig.load(output)
        assert config.thresholds == (1.0, 1.0)
        before, after = (load_file(f / "model.safetensors") for f in (heads, output))
        assert before.keys() == after.keys()
        assert all(torch.equal(before[name], after[name]) for name in before)
        result = json.loads((output / "calibration.json").read_text())
        assert result["pays"] is False
        prediction = result["predictions"]["own"]
        assert prediction["calibrated"]["ideal_speedup_with_head_cost"] == 1.0
        assert prediction["paper"]["ideal_speedup_with_head_cost"] <= 1.0
        assert config.provenance["calibration"]["predicted_speedup"] == {"own": 1.0}
        card = (output / "README.md").read_text()
        assert card.startswith("# Card\n")
        assert card.count("| own | 1.000 |") == 1
        # The folder stands for itself: its target is found from there.
        assert open_session(str(output)).setting == Setting((1.0, 1.0), 5)

    def test_calibrate_keeps_what_pays(self, target: Path, tmp_path: Path, capsys: Capture) -> None:
        # A target whose upper half adds nothing: the exit after it is always right.
        from transformers import LlamaForCausalLM

        model = LlamaForCausalLM.from_pretrained(target)
        for layer in model.model.layers[1:]:
            torch.nn.init.zeros_(layer.self_attn.o_proj.weight)
            torch.nn.init.zeros_(layer.mlp.down_proj.weight)
        # Sharp enough to be confident.
        model.model.norm.weight.data *= 60
        model.save_pretrained(target)
        heads, _, _ = make_heads(
            target / "adadecode", transform="identity", rank=None, norm="after"
        )
        session = open_session(str(heads))
        data = tmp_path / "own.jsonl"
        write_sequences(data, sequences(session, 8, 30))
        output = target / "calibrated"
        costs = costs_file(tmp_path, 0.07, 0.06)
        args = ["calibrate", str(heads), "--data", str(data), "--costs", costs, "--json"]
        assert main([*args, "--output", str(output), "--least-acceptance", "0.9"]) == 0
        result = json.loads(capsys.readouterr().out)
        assert result["pays"] is True
        assert result["setting"]["exit_layers"] == [1]
        assert result["setting"]["num_speculative_tokens"] > 5
        prediction = result["predictions"]["own"]
        assert prediction["calibrated"]["draft_acceptance_rate"] >= 0.9
        better = prediction["calibrated"]["ideal_speedup_with_head_cost"]
        assert better > prediction["paper"]["ideal_speedup_with_head_cost"] > 1.0
        config = HeadsConfig.load(output)
        # Beside its source the target has the same relative name.
        assert config.speculators_config.verifier.name_or_path == ".."
        assert config.num_speculative_tokens == result["setting"]["num_speculative_tokens"]

    def test_bad_input(
        self,
        target: Path,
        data: Path,
        tmp_path: Path,
        capsys: Capture,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        heads, other = str(target / "adadecode"), tmp_path / "other"
        other.mkdir()
        (other / "notes.txt").write_text("mine")
        one = tmp_path / "one.jsonl"
        one.write_text(data.read_text().splitlines()[0])
        output = tmp_path / "new"

        def refused(message: str, *args: str) -> None:
            assert main(list(args)) == 1
            captured = capsys.readouterr()
            assert captured.out == ""
            lines = [x for x in captured.err.splitlines() if x.startswith("adadecode: error: ")]
            assert len(lines) == 1
            assert message in lines[0]

        refused("is no file here", "eval", heads, "--data", "absent.jsonl:x.jsonl")
        refused("there is no such folder", "eval", str(tmp_path / "absent"), "--data", str(data))
        refused("holds no heads", "eval", str(make_target(tmp_path / "plain")), "--data", str(data))
        into = ("--output", str(output), "--costs", "bytes")
        refused("own has 1 usable", "calibrate", heads, "--data", f"{one}:own", *into)
        assert not output.exists()
        args = ("calibrate", heads, "--data", str(data), "--costs", "bytes", "--output")
        refused("holds something else", *args, str(other))
        refused("is a file", *args, str(other / "notes.txt"))
        refused("must lie in [0, 1]", *args, str(output), "--least-acceptance", "2")
        assert not output.exists()
        assert [p.name for p in other.iterdir()] == ["notes.txt"]
        monkeypatch.setattr(os, "rename", full)
        refused("No space left", *args, str(output))
        assert not [p for p in tmp_path.iterdir() if output.name in p.name]
        make_target(tmp_path / "wider", hidden_size=32)
        refused("not for", "eval", heads, "--target", str(tmp_path / "wider"), "--data", str(data))
