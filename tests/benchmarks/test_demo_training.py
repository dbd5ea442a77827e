"""The demo target's recipe: quick checks of the parts, and a tiny run of the whole."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.progress import Progress
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.demo import corpus as text
from benchmarks.demo import target
from benchmarks.demo.recipe import HeadRecipe, Recipe, Shape, Stage, rate_factor
from benchmarks.demo.train import make_sequences, run
from benchmarks.workload import load_demo_prompts
from vllm_adadecode.heads import HeadsConfig

TINY = Recipe(
    batch_tokens=32,
    exit_layers=(1, 2),
    shape=Shape(
        vocab_size=300,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=256,
    ),
    stages=(
        Stage("stage1", files="train", epochs=1.0, length=16, weight_decay=0.1),
        Stage("stage2", files="second_stage", epochs=2.0, length=8, exit_weight=0.3),
    ),
    heads=HeadRecipe(
        text=4,
        generations=4,
        length=16,
        training=("--norm", "before", "--gate", "--draft-vocab", "100", "--epochs", "1"),
        choosing=4,
    ),
)


@pytest.fixture(scope="module")
def corpus() -> text.Corpus:
    return text.load_corpus()


def tiny_model() -> target.Any:
    torch.manual_seed(0)
    return target.new_model(TINY.shape)


def test_nothing_held_out_is_trained_on(corpus: text.Corpus) -> None:
    # The split depends on the path alone.
    assert text.is_held_out("difflib.py")
    assert not text.is_held_out("argparse.py")
    trained = {s.path for s in corpus.train}
    assert trained.isdisjoint(s.path for s in corpus.held_out)
    assert {s.path for s in corpus.second_stage} <= trained
    assert len(corpus.second_stage) == len(text.SECOND_STAGE_FILES)
    choosing, measured = text.split_held_out(corpus)
    assert set(choosing).isdisjoint(measured)
    assert set(choosing) | set(measured) == set(corpus.held_out)


def test_reads_distinct_files_only(tmp_path: Path) -> None:
    code = "x = 1  # a line\n" * 20
    (tmp_path / "test").mkdir()
    for name in ("a.py", "copy_of_a.py", "test/skipped.py"):
        (tmp_path / name).write_text(code)
    (tmp_path / "short.py").write_text("x = 1\n")
    (tmp_path / "table.py").write_text("x = '" + "0" * 600 + "'\n")
    assert [s.path for s in text.read_sources(tmp_path)] == ["a.py"]


def test_tokenizer_and_prompts(corpus: text.Corpus) -> None:
    """Text comes back; prompts are stable and whole tokens."""
    tokenizer = text.train_tokenizer([s.text for s in corpus.second_stage[:3]], 400)
    sample = corpus.second_stage[4].text + "\t\n  \N{SNOWMAN} 1234\r\n"
    assert tokenizer.decode(tokenizer.encode(sample).ids) == sample
    ids = text.encode(tokenizer, corpus.second_stage[:2])
    assert ids[0] == 0
    assert (ids == 0).sum() == 2
    prompts = text.draw(tokenizer, corpus.second_stage, "second_stage", 8, seed=3)
    assert prompts == text.draw(tokenizer, corpus.second_stage, "second_stage", 8, seed=3)
    for prompt in prompts:
        assert len(tokenizer.encode(prompt.text).ids) == prompt.tokens


def test_rate_rises_then_falls() -> None:
    factors = [rate_factor(step, 100) for step in range(100)]
    assert factors.index(max(factors)) in (9, 10)
    assert max(factors) == 1.0
    assert 0 < factors[-1] < 0.05
    assert all(0 < rate_factor(step, 3) <= 1 for step in range(3))


def test_an_epoch_sees_no_row_twice() -> None:
    counting = np.arange(1000)
    steps = target.steps_in_epoch(counting, TINY, TINY.stages[0])
    rows = torch.cat([target.batch(counting, TINY, 0, step) for step in range(steps)])
    assert len(rows) == steps * 2
    assert len(rows[:, :-1].unique()) == rows[:, :-1].numel()


def test_exit_losses_read_the_residual_stream() -> None:
    rows = torch.randint(1, 300, (2, 9))
    two_layers = tiny_model()
    del two_layers.model.layers[2:]
    expected = target.losses(two_layers, rows, ())[-1]
    torch.testing.assert_close(target.losses(tiny_model(), rows, (2,))[0], expected)


def test_a_stage_learns() -> None:
    tokens = np.tile(np.arange(1, 9), 40)
    model = tiny_model()
    longer = replace(TINY, stages=(TINY.stages[0], replace(TINY.stages[1], epochs=10.0)))
    rows = target.rows_at(tokens, np.arange(4), 9)
    before = target.losses(model, rows, (1, 2))
    with Progress(disable=True) as show:
        target.train_stage(model, tokens, longer, 1, show)
    assert all(a < b / 2 for a, b in zip(target.losses(model, rows, (1, 2)), before, strict=True))


def test_heads_learn_from_text_and_from_the_target_itself() -> None:
    model = tiny_model().eval()
    rng = np.random.default_rng(0)
    tokens = {name: rng.integers(1, 300, 100) for name in ("one", "two")}
    with Progress(disable=True) as show:
        found = make_sequences(model, tokens, TINY.heads, 0, show)
    assert [s.source for s in found] == ["own"] * 4 + ["one"] * 2 + ["two"] * 2
    assert {len(s.ids) for s in found} == {16}
    own = found[0]
    again = target.generate(model, torch.tensor([own.prompt_ids]), len(own.output_ids))
    assert tuple(again[0].tolist()) == own.ids
    assert "".join(map(chr, found[4].ids)) in "".join(map(chr, tokens["one"]))


@pytest.mark.slow
def test_a_whole_run_makes_a_loadable_folder(corpus: text.Corpus, tmp_path: Path) -> None:
    # Files long enough for every prompt length, few enough to be quick; one that heads may learn
    # from, one that chooses their setting.
    chosen = ("textwrap.py", text.HEADS_CHOOSE_FILES[0])
    second = tuple(s for s in corpus.second_stage if s.path in chosen)
    small = text.Corpus(corpus.second_stage[:4] + second, second, corpus.held_out[:4])
    recipe = replace(
        TINY,
        stages=tuple(replace(s, epochs=0.001) for s in TINY.stages),
        # Enough for a part that is held out.
        heads=replace(TINY.heads, text=80),
    )
    with Progress(disable=True) as show:
        run(recipe, small, tmp_path / "build", tmp_path / "model", tmp_path / "prompts.json", show)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert model.dtype == torch.bfloat16
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    chat = [{"role": "user", "content": "def f(x):\n"}, {"role": "user", "content": "    x"}]
    assert tokenizer.apply_chat_template(chat, tokenize=False) == "def f(x):\n    x"
    prompts = load_demo_prompts(path=tmp_path / "prompts.json")
    assert {p.source for p in prompts if p.files == "held_out"} == {
        s.path for s in text.split_held_out(small)[1]
    }
    assert all(len(tokenizer(p.text)["input_ids"]) == p.tokens for p in prompts)
    folder = tmp_path / "model" / "adadecode"
    heads = HeadsConfig.load(folder)
    assert (heads.exit_layers, heads.gate) == ((1, 2), True)
    assert heads.speculators_config.verifier.name_or_path == ".."
    # Calibrated with what a round costs beside its layers.
    calibration = json.loads((folder / "calibration.json").read_text())
    assert calibration["costs"]["verification"] == recipe.heads.round_cost
    # What was written names no folder of this machine.
    for name in ("README.md", "adadecode/README.md", "adadecode/config.json"):
        assert str(tmp_path) not in (tmp_path / "model" / name).read_text()
