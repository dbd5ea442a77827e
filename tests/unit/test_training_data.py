"""Data of the training: what is read, what is refused, how it is cut and split."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from tests.support.engines import DEMO_MODEL
from tests.support.training_samples import VOCAB, random_sequences, tiny_target
from vllm_adadecode.errors import AdaDecodeError
from vllm_adadecode.heads import target_fingerprint
from vllm_adadecode.heads.target import target_digest
from vllm_adadecode.training import json_lines
from vllm_adadecode.training.batches import TokenRow, micro_batches, step_rows, token_rows
from vllm_adadecode.training.prompts import cut_documents, load_data, prompts_of
from vllm_adadecode.training.records import RecordReader
from vllm_adadecode.training.sequences import (
    Sequence,
    check_vocabulary,
    choose_draft_vocab,
    read_sequences,
    sequences_digest,
    split_held_out,
    write_sequences,
)
from vllm_adadecode.training.target_model import load_tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    """Of the demo; its chat template writes the messages one after another."""
    return AutoTokenizer.from_pretrained(DEMO_MODEL)


@pytest.fixture
def reader(tokenizer: Any) -> RecordReader:
    return RecordReader(tokenizer, "demo")


def lines(path: Path, *values: Any) -> str:
    path.write_text("".join(v if isinstance(v, str) else json.dumps(v) + "\n" for v in values))
    return str(path)


# --- sequences ---------------------------------------------------------------------------------


def test_sequences_survive_the_disk(tmp_path: Path) -> None:
    written = [*random_sequences(5), Sequence((), (3, 4), ""), Sequence((1,), (), "ünïcode")]
    write_sequences(tmp_path / "new" / "s.jsonl", written)
    assert read_sequences(tmp_path / "new" / "s.jsonl") == written
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["s.jsonl"]


def test_malformed_lines_are_named_and_counted(tmp_path: Path) -> None:
    good = {"prompt_ids": [1], "output_ids": [2], "source": "a"}
    file = tmp_path / "s.jsonl"
    bad: list[Any] = [
        "{not json\n",
        [1, 2],
        good | {"output_ids": [1.5]},
        good | {"prompt_ids": [-1]},
        good | {"prompt_ids": [True]},
        {"prompt_ids": [], "output_ids": []},
        good | {"source": 3},
    ]
    lines(file, good, *bad, "\n", good)
    with pytest.raises(AdaDecodeError) as caught:
        read_sequences(file)
    message = str(caught.value)
    assert "\n" not in message
    assert "7 malformed lines" in message
    assert f"{file}:2: is not JSON" in message
    assert f"{file}:4: output_ids is no list of token ids" in message


def test_no_sequences(tmp_path: Path) -> None:
    for text in ("", "\n\n"):
        (tmp_path / "s.jsonl").write_text(text)
        with pytest.raises(AdaDecodeError, match="holds no sequences"):
            read_sequences(tmp_path / "s.jsonl")
    with pytest.raises(AdaDecodeError, match="can't be read"):
        read_sequences(tmp_path / "absent.jsonl")


def test_split_depends_on_the_prompt_alone() -> None:
    sequences = random_sequences(400)
    train, held_out = split_held_out(sequences, 0.25)
    assert len(train) + len(held_out) == 400
    # Binomial: 100 expected, 5 standard deviations are 43.
    assert 57 < len(held_out) < 143
    half_train, half_held_out = split_held_out(sequences[:200], 0.25)
    assert set(half_train) <= set(train)
    assert set(half_held_out) <= set(held_out)
    # A larger share only moves sequences over.
    assert set(held_out) <= set(split_held_out(sequences, 0.5)[1])
    for share, what in ((1e-9, "hold out"), (1 - 1e-9, "train on")):
        with pytest.raises(AdaDecodeError, match=f"leave none to {what}"):
            split_held_out(sequences, share)


def test_digest_and_vocabulary() -> None:
    a = [Sequence((1,), (2, 3), "x")]
    assert sequences_digest(a) == sequences_digest([Sequence((1,), (2, 3), "y")])
    assert sequences_digest(a) != sequences_digest([Sequence((1, 2), (3,), "x")])
    check_vocabulary(a, 4, "data")
    with pytest.raises(AdaDecodeError, match="token 3 is outside"):
        check_vocabulary(a, 3, "data")


# --- records -----------------------------------------------------------------------------------


def test_fields(tokenizer: Any, reader: RecordReader) -> None:
    def ids(text: str) -> tuple[int, ...]:
        return tuple(tokenizer.encode(text))

    assert reader.read({"prompt": "import os"}, "s") == Sequence(ids("import os"), (), "s")
    assert reader.read("import os", "s") == Sequence(ids("import os"), (), "s")
    for key in ("completion", "response", "answer"):
        record = reader.read({"prompt": "import", key: " os", "source": "t"}, "s")
        assert record == Sequence(ids("import"), ids(" os"), "t")
    assert reader.read({"text": "x = 1"}, "s") == Sequence((), ids("x = 1"), "s")
    assert reader.read({"prompt_ids": [1, 2]}, "s") == Sequence((1, 2), (), "s")
    ready = reader.read({"prompt_ids": [1], "output_ids": [2]}, "s")
    assert (ready, ready.own) == (Sequence((1,), (2,), "s"), True)
    other = RecordReader(tokenizer, "demo", field="question")
    assert other.read({"question": "x", "prompt": "y"}, "s").prompt_ids == ids("x")


def test_chats(tokenizer: Any, reader: RecordReader) -> None:
    asked = [{"role": "user", "content": "def f"}]
    answered = [*asked, {"role": "assistant", "content": "(x):"}]
    prompt = tuple(tokenizer.encode("def f"))
    assert reader.read({"messages": asked}, "s") == Sequence(prompt, (), "s")
    record = reader.read({"messages": answered}, "s")
    assert record.prompt_ids == prompt
    assert record.output_ids == tuple(tokenizer.encode("def f(x):"))[len(prompt) :]
    chat = RecordReader(tokenizer, "demo", chat=True)
    assert chat.read({"prompt": "def f", "completion": "(x):"}, "s") == record


@pytest.mark.parametrize(
    ("value", "complaint"),
    [
        (3, "is no JSON object"),
        ({"question": "x"}, "has none of the fields prompt"),
        ({"prompt": ""}, "prompt is empty"),
        ({"prompt": None}, "prompt is no text"),
        ({"prompt": "x", "answer": 3}, "completion is no text"),
        ({"messages": "x"}, "messages is no list"),
        ({"messages": [{"role": "user"}]}, "messages is no list"),
        ({"messages": []}, "messages has nothing to answer"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, "nothing to answer"),
        ({"prompt_ids": "x"}, "prompt_ids is no list"),
    ],
)
def test_what_is_no_record(reader: RecordReader, value: Any, complaint: str) -> None:
    with pytest.raises(json_lines.BadLineError, match=complaint):
        reader.read(value, "s")


def test_a_template_that_refuses(tmp_path: Path) -> None:
    refusing = AutoTokenizer.from_pretrained(DEMO_MODEL)
    refusing.chat_template = "{{ raise_exception('roles must\\nalternate') }}"
    file = lines(tmp_path / "d.jsonl", {"messages": [{"role": "user", "content": "x"}]})
    with pytest.raises(AdaDecodeError, match=r"d.jsonl:1: chat template: '?roles must") as caught:
        load_data([file], RecordReader(refusing, "demo"))
    assert "\n" not in str(caught.value)


def test_no_tokenizer_no_chat_template(tmp_path: Path) -> None:
    target = tiny_target(tmp_path / "target")
    without_template = RecordReader(load_tokenizer(target), "tiny")
    assert without_template.read({"prompt": "w3 w5"}, "s").prompt_ids == (3, 5)
    with pytest.raises(AdaDecodeError, match="has no chat template: give plain prompts"):
        without_template.read({"messages": [{"role": "user", "content": "w3"}]}, "s")
    for file in target.glob("tokenizer*"):
        file.unlink()
    assert load_tokenizer(target) is None
    without = RecordReader(None, "tiny")
    assert without.read({"prompt_ids": [3]}, "s").prompt_ids == (3,)
    with pytest.raises(AdaDecodeError, match="tiny has no tokenizer"):
        without.read({"prompt": "w3"}, "s")


def test_an_empty_tokenizer_is_none(tmp_path: Path) -> None:
    # transformers makes one for Qwen2 where there are no files.
    config = {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert load_tokenizer(tmp_path) is None


# --- sources -----------------------------------------------------------------------------------


def test_files(tmp_path: Path, reader: RecordReader) -> None:
    text = lines(tmp_path / "a.txt", "import os\n", "\n", "import sys\n")
    rows = lines(tmp_path / "b.jsonl", {"prompt": "x"}, "nonsense\n", {"text": "y"})
    found, malformed = load_data([text, rows], reader)
    assert [r.source for r in found] == ["a", "a", "b", "b"]
    assert malformed == [f"{rows}:2: is not JSON"]
    one, _ = load_data([text, rows], reader, max_records=1)
    assert [r.source for r in one] == ["a", "b"]


def test_refused_sources(tmp_path: Path, reader: RecordReader) -> None:
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "a.py").write_text("x")
    (tmp_path / "latin.txt").write_bytes(b"\xe9t\xe9")
    only_bad = lines(tmp_path / "bad.jsonl", "x\n")
    for spec, message in (
        (tmp_path / "empty.jsonl", "no data in"),
        (tmp_path / "a.py", "neither .jsonl"),
        (tmp_path / "latin.txt", "can't be read as UTF-8"),
        ("xsum:validation", "has no split 'validation'"),
    ):
        with pytest.raises(AdaDecodeError, match=message) as caught:
            load_data([str(spec)], reader)
        assert "\n" not in str(caught.value)
    with pytest.raises(AdaDecodeError, match=r"no data in .* \(1 malformed line"):
        load_data([only_bad], reader)


class Hub:
    """`datasets.load_dataset` on rows of our own."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, rows: Any) -> None:
        self.rows, self.asked = rows, []  # type: tuple[Any, list[Any]]
        module: Any = ModuleType("datasets")
        module.load_dataset = self.load
        monkeypatch.setitem(sys.modules, "datasets", module)

    def load(self, name: str, config: str | None, split: str) -> Any:
        self.asked.append((name, config, split))
        if isinstance(self.rows, Exception):
            raise self.rows
        return self.rows


def test_hub_data(reader: RecordReader, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = Hub(monkeypatch, [{"prompt": "x"}, {"prompt": None}, {"text": "y"}])
    found, malformed = load_data(["owner/name@part:validation"], reader)
    assert hub.asked == [("owner/name", "part", "validation")]
    assert [r.source for r in found] == ["name", "name"]
    assert malformed == ["owner/name, row 2: prompt is no text"]
    load_data(["owner/name"], reader)
    assert hub.asked[-1] == ("owner/name", None, "train")
    hub.rows = RuntimeError("no such\ndata set")
    with pytest.raises(AdaDecodeError, match=r"can be loaded: no such$"):
        load_data(["owner/name"], reader)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(AdaDecodeError, match="pip install datasets"):
        load_data(["owner/name"], reader)


ROWS = {
    "xsum": {"document": " A long story. "},
    "code": {"text": "Add.", "test_list": ["assert f(1)", "assert f(2)"], "prompt": "def g():\n"},
    "gsm8k": {"question": "How many? "},
}


@pytest.mark.parametrize(
    ("spec", "asked", "count", "text"),
    [
        ("xsum", ("EdinburghNLP/xsum", None, "train"), 10_000, "Article: A long story.\n"),
        ("xsum:test", ("EdinburghNLP/xsum", None, "test"), 1_000, "Article: A long story.\n"),
        (
            "code",
            ("google-research-datasets/mbpp", "full", "train+validation+test+prompt"),
            12_000,
            '"""\nAdd.\nassert f(1)\n"""\n',
        ),
        ("code:test", ("openai/openai_humaneval", None, "test"), 12_000, "def g():\n"),
        ("gsm8k", ("openai/gsm8k", "main", "train"), 12_000, "Question: How many?\nAnswer:"),
        ("gsm8k:test", ("openai/gsm8k", "main", "test"), 1_000, "Question: How many?\nAnswer:"),
    ],
)
def test_paper_sets(
    monkeypatch: pytest.MonkeyPatch, spec: str, asked: tuple[str, ...], count: int, text: str
) -> None:
    class Letters:
        def encode(self, text: str, add_special_tokens: bool) -> list[int]:
            return [ord(letter) for letter in text]

    name = spec.partition(":")[0]
    # More rows than the paper takes.
    hub = Hub(monkeypatch, [ROWS[name]] * 12_000)
    records, _ = load_data([spec], RecordReader(Letters(), "target"))
    assert hub.asked == [asked]
    assert len(records) == count
    assert {r.source for r in records} == {name}
    assert "".join(map(chr, records[0].prompt_ids)).startswith(text)


def test_prompts_and_documents() -> None:
    records = [
        Sequence((1, 2), (), "a"),
        Sequence((1, 2, 3, 4), (), "a"),
        Sequence((), (5, 6, 7, 8, 9), "doc"),
        Sequence((1,), (2,), "own", own=True),
    ]
    assert prompts_of(records, 3) == ([((1, 2), "a"), ((5, 6, 7), "doc")], 1)
    assert cut_documents(records[2:], 3) == [
        Sequence((), (5, 6, 7), "doc"),
        Sequence((), (8, 9), "doc"),
        Sequence((1,), (2,), "own"),
    ]
    # A last piece of less than an eighth is dropped.
    pieces = cut_documents([Sequence((), tuple(range(21)), "doc")], 20)
    assert [len(s.output_ids) for s in pieces] == [20]


# --- batches -----------------------------------------------------------------------------------


def test_trained_positions() -> None:
    sequences = [
        Sequence((1, 2, 3), (4, 5), "a"),
        Sequence((), (6, 7), "b"),
        Sequence((8,), (), ""),
    ]
    everywhere = token_rows(sequences, 10)
    assert everywhere == [TokenRow((1, 2, 3, 4, 5), 0), TokenRow((6, 7), 0)]
    outputs = token_rows(sequences, 10, outputs_only=True)
    # The last prompt token predicts the first output token.
    assert outputs == [TokenRow((1, 2, 3, 4, 5), 2), TokenRow((6, 7), 0)]
    assert token_rows(sequences, 3, outputs_only=True) == [TokenRow((6, 7), 0)]
    (batch,) = micro_batches(outputs, 100)
    assert batch.ids.tolist() == [[6, 7, 0, 0, 0], [1, 2, 3, 4, 5]]
    assert batch.trained.int().tolist() == [[1, 0, 0, 0, 0], [0, 0, 1, 1, 0]]


def test_an_epoch_sees_every_row_once_in_an_order_of_its_own() -> None:
    rows = [TokenRow((i, i), 0) for i in range(10)]
    epochs = []
    for epoch in range(2):
        seen = [step_rows(rows, 4, 7, epoch * 3 + step, 3) for step in range(3)]
        assert [len(part) for part in seen] == [4, 4, 2]
        epochs.append([row for part in seen for row in part])
        assert set(epochs[-1]) == set(rows)
    assert epochs[0] != epochs[1]
    assert step_rows(rows, 4, 7, 4, 3) == epochs[1][4:8]
    assert step_rows(rows, 4, 8, 0, 3) != epochs[0][:4]


def test_micro_batches_keep_to_the_limit() -> None:
    rows = [TokenRow(tuple(range(n)), 0) for n in (2, 9, 3, 30, 4, 5)]
    batches = list(micro_batches(rows, 20))
    assert sum(len(b.ids) for b in batches) == len(rows)
    # One row may be longer than the limit.
    assert [b.ids.numel() for b in batches if b.ids.numel() > 20] == [30]
    assert sum(int(b.trained.sum()) for b in batches) == sum(row.num_trained for row in rows)


# --- draft vocabulary, digest ------------------------------------------------------------------


def test_draft_vocabulary() -> None:
    sequences = [Sequence((9, 9, 9), (5, 5, 2, 7), "a"), Sequence((7, 3), (), "b")]
    tokens, share = choose_draft_vocab(sequences, 3, 10)
    # Counted: 5 twice, 7 twice, 2 and 3 once, of which the lower id wins.
    assert tokens.tolist() == [2, 5, 7]
    assert tokens.dtype == torch.int64
    assert share == 5 / 6
    assert choose_draft_vocab(sequences, 6, 10)[0].tolist() == [0, 1, 2, 3, 5, 7]


def test_a_digest_tells_targets_apart_that_a_fingerprint_does_not(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    target = tiny_target(tmp_path / "target")
    before, fingerprint = target_digest(target), target_fingerprint(target)
    assert target_digest(target) == before
    model = AutoModelForCausalLM.from_pretrained(target)
    with torch.no_grad():
        model.model.layers[2].mlp.down_proj.weight += 1e-3
    model.save_pretrained(target)
    assert target_fingerprint(target) == fingerprint
    after = target_digest(target)
    assert after != before
    (target / "generation_config.json").write_text("{}")
    assert target_digest(target) != after
    assert model.config.vocab_size == VOCAB
    with pytest.raises(AdaDecodeError, match="has no weights here"):
        target_digest(tmp_path)
