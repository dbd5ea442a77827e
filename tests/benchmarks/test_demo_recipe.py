"""The demo target's recipe: quick checks of the parts, and a tiny run of the training loop."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.progress import Progress
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.demo import corpus as text
from benchmarks.demo import heads_prompts, stages
from benchmarks.demo import prompts as demo_prompts
from benchmarks.demo.heads import generate, make_sequences
from benchmarks.demo.measure import loops
from benchmarks.demo.recipe import HeadRecipe, Recipe, Shape, Stage, rate_factor
from benchmarks.demo.train import run
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
    heads=HeadRecipe(text=4, generations=4, length=16, epochs=1.0, draft_vocab_size=100),
)


@pytest.fixture(scope="module")
def corpus() -> text.Corpus:
    return text.load_corpus()


@pytest.fixture
def tokens() -> dict[str, stages.Tokens]:
    rng = np.random.default_rng(0)
    return {"train": rng.integers(1, 300, 200), "second_stage": rng.integers(1, 300, 120)}


def tiny_model() -> stages.Any:
    torch.manual_seed(0)
    return stages.new_model(TINY.shape)


class TestCorpus:
    def test_split_depends_on_the_path_alone(self) -> None:
        assert text.is_held_out("difflib.py")
        assert not text.is_held_out("argparse.py")

    def test_nothing_held_out_is_trained_on(self, corpus: text.Corpus) -> None:
        trained = {s.path for s in corpus.train}
        assert trained.isdisjoint(s.path for s in corpus.held_out)
        assert {s.path for s in corpus.second_stage} <= trained
        assert len(corpus.second_stage) == len(text.SECOND_STAGE_FILES)
        choosing, measured = demo_prompts.split_held_out(corpus)
        assert set(choosing).isdisjoint(measured)
        assert set(choosing) | set(measured) == set(corpus.held_out)

    def test_reads_distinct_files_only(self, tmp_path: Path) -> None:
        code = "x = 1  # a line\n" * 20
        (tmp_path / "test").mkdir()
        for name in ("a.py", "copy_of_a.py", "test/skipped.py"):
            (tmp_path / name).write_text(code)
        (tmp_path / "short.py").write_text("x = 1\n")
        (tmp_path / "table.py").write_text("x = '" + "0" * 600 + "'\n")
        assert [s.path for s in text.read_sources(tmp_path)] == ["a.py"]

    def test_tokenizer_gives_the_text_back(self, corpus: text.Corpus) -> None:
        tokenizer = text.train_tokenizer([s.text for s in corpus.second_stage[:3]], 400)
        sample = corpus.second_stage[4].text + "\t\n  \N{SNOWMAN} 1234\r\n"
        assert tokenizer.decode(tokenizer.encode(sample).ids) == sample
        ids = text.encode(tokenizer, corpus.second_stage[:2])
        assert ids[0] == 0
        assert (ids == 0).sum() == 2

    def test_prompts_are_stable_and_whole_tokens(self, corpus: text.Corpus) -> None:
        tokenizer = text.train_tokenizer([s.text for s in corpus.second_stage[:3]], 400)
        prompts = demo_prompts.draw(tokenizer, corpus.second_stage, "second_stage", 8, seed=3)
        assert prompts == demo_prompts.draw(tokenizer, corpus.second_stage, "second_stage", 8, 3)
        for prompt in prompts:
            assert len(tokenizer.encode(prompt.text).ids) == prompt.tokens


class TestTraining:
    def test_key_names_what_the_weights_depend_on(self) -> None:
        other = Recipe(stages=(Recipe().stages[0], Stage("stage2", "second_stage", epochs=1.0)))
        assert Recipe().key(0, "corpus") == other.key(0, "corpus")
        assert Recipe().key(1, "corpus") != other.key(1, "corpus")
        assert Recipe().key(0, "corpus") != Recipe().key(0, "another corpus")

    def test_rate_rises_then_falls(self) -> None:
        factors = [rate_factor(step, 100) for step in range(100)]
        assert factors.index(max(factors)) in (9, 10)
        assert max(factors) == 1.0
        assert 0 < factors[-1] < 0.05
        assert all(0 < rate_factor(step, 3) <= 1 for step in range(3))

    def test_an_epoch_sees_no_row_twice(self) -> None:
        counting = np.arange(1000)
        steps = stages.steps_in_epoch(counting, TINY, TINY.stages[0])
        rows = torch.cat([stages.batch(counting, TINY, 0, step) for step in range(steps)])
        assert len(rows) == steps * 2
        assert len(rows[:, :-1].unique()) == rows[:, :-1].numel()

    def test_exit_losses_read_the_residual_stream(self) -> None:
        model = tiny_model()
        rows = torch.randint(1, 300, (2, 9))
        two_layers = tiny_model()
        del two_layers.model.layers[2:]
        expected = stages.losses(two_layers, rows, ())[-1]
        torch.testing.assert_close(stages.losses(model, rows, (2,))[0], expected)

    def test_a_killed_run_ends_as_an_unbroken_one(
        self, tmp_path: Path, tokens: dict[str, stages.Tokens], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(stages, "SAVE_EVERY", 2)

        def train(build: Path) -> stages.Any:
            model = tiny_model()
            with Progress(disable=True) as progress:
                stages.train_target(model, tokens, TINY, "corpus", build, progress)
            return model

        unbroken = train(tmp_path / "unbroken")

        batch, calls = stages.batch, 0

        def killed(*args: stages.Any) -> torch.Tensor:
            nonlocal calls
            calls += 1
            if calls in (4, 9):  # once in each stage, behind a checkpoint and a lost step
                raise KeyboardInterrupt
            return batch(*args)

        monkeypatch.setattr(stages, "batch", killed)
        for _ in range(2):
            with pytest.raises(KeyboardInterrupt):
                train(tmp_path / "killed")
        resumed = train(tmp_path / "killed")
        for name, value in unbroken.state_dict().items():
            torch.testing.assert_close(resumed.state_dict()[name], value, msg=name)

        before = calls
        train(tmp_path / "killed")
        assert calls == before, "finished stages ran again"


def test_a_whole_run_makes_a_loadable_folder(
    corpus: text.Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Files long enough for every prompt length, few enough to be quick; one that heads may learn
    # from, one that chooses their setting.
    chosen = ("textwrap.py", text.HEADS_CHOOSE_FILES[0])
    second = tuple(s for s in corpus.second_stage if s.path in chosen)
    small = text.Corpus(corpus.second_stage[:4] + second, second, corpus.held_out[:4])
    monkeypatch.setattr(heads_prompts, "CHOOSING_COUNT", 4)
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
    prompts = demo_prompts.load(tmp_path / "prompts.json")
    assert {p.source for p in prompts if p.files == "held_out"} == {
        s.path for s in demo_prompts.split_held_out(small)[1]
    }
    assert all(len(tokenizer(p.text)["input_ids"]) == p.tokens for p in prompts)
    heads = HeadsConfig.load(tmp_path / "model" / "adadecode")
    assert heads.exit_layers == (1, 2)
    assert heads.gate
    assert heads.speculators_config.verifier.name_or_path == ".."
    assert set(text.HEADS_MEASURE_FILES) <= set(heads.provenance["heads_left_out"])
    assert str(tmp_path) not in (tmp_path / "model" / "adadecode" / "config.json").read_text()
    for card in ("README.md", "adadecode/README.md"):
        written = (tmp_path / "model" / card).read_text()
        assert str(tmp_path) not in written
        assert "peed-up" in written


def test_heads_learn_from_text_and_from_the_target_itself() -> None:
    model = tiny_model().eval()
    rng = np.random.default_rng(0)
    tokens = {name: rng.integers(1, 300, 100) for name in ("one", "two")}
    with Progress(disable=True) as show:
        found = make_sequences(model, tokens, TINY.heads, 0, show)
    assert [s.source for s in found] == ["own"] * 4 + ["one"] * 2 + ["two"] * 2
    assert {len(s.ids) for s in found} == {16}
    own = found[0]
    again = generate(model, torch.tensor([own.prompt_ids]), len(own.output_ids))
    assert tuple(again[0].tolist()) == own.ids
    assert "".join(map(chr, found[4].ids)) in "".join(map(chr, tokens["one"]))


def test_a_plain_target_shares_nothing_but_the_recipe() -> None:
    plain = Recipe().plain()
    assert all(stage.exit_weight == 0 for stage in plain.stages)
    assert plain.key(0, "corpus") != Recipe().key(0, "corpus")
    assert plain.plain() == plain


def test_loops() -> None:
    rng = np.random.default_rng(0)
    assert loops(np.tile([1, 2, 3], 40))
    assert loops(np.concatenate([rng.permutation(200), np.ones(64, dtype=int)]))
    assert not loops(np.concatenate([np.ones(64, dtype=int), rng.permutation(200)]))
