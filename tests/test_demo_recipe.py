"""The demo target's recipe: quick checks of the parts, and a tiny run of the training loop."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.progress import Progress
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.demo import corpus as text
from benchmarks.demo import prompts as demo_prompts
from benchmarks.demo import stages
from benchmarks.demo.files import write_file, write_folder
from benchmarks.demo.heads import Heads, hidden_states, load_heads, save_heads, train_heads
from benchmarks.demo.measure import Generation, generate, loops, report
from benchmarks.demo.recipe import HeadRecipe, Recipe, Shape, Stage, rate_factor
from benchmarks.demo.train import run

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
    heads=HeadRecipe(steps=3),
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


class TestFiles:
    def test_a_failed_file_leaves_the_old_one(self, tmp_path: Path) -> None:
        path = tmp_path / "file"
        path.write_text("old")

        def fails(unfinished: Path) -> None:
            unfinished.write_text("half")
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            write_file(path, fails)
        assert path.read_text() == "old"
        write_file(path, lambda unfinished: unfinished.write_text("new"))
        assert path.read_text() == "new"
        assert [p.name for p in tmp_path.iterdir()] == ["file"]

    def test_a_failed_folder_leaves_the_old_one(self, tmp_path: Path) -> None:
        path, scratch = tmp_path / "model", tmp_path / "build"
        for content in ("old", "new"):
            with write_folder(path, scratch) as folder:
                (folder / content).write_text(content)
            assert [p.name for p in path.iterdir()] == [content]

        def fails() -> None:
            with write_folder(path, scratch) as folder:
                (folder / "half").write_text("half")
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            fails()
        assert [p.name for p in path.iterdir()] == ["new"]


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


def test_a_whole_run_makes_a_loadable_folder(corpus: text.Corpus, tmp_path: Path) -> None:
    # Files long enough for every prompt length, few enough to be quick.
    small = text.Corpus(corpus.second_stage[:4], corpus.second_stage[:2], corpus.held_out[:4])
    recipe = replace(
        TINY,
        stages=tuple(replace(stage, epochs=0.001) for stage in TINY.stages),
        heads=HeadRecipe(steps=1, generations=4, length=16),
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
    assert load_heads(tmp_path / "model" / "adadecode").exit_layers == (1, 2)
    assert "layer passes a token" in (tmp_path / "model" / "README.md").read_text()


class TestHeads:
    def test_identity_is_the_target_s_own_readout(self) -> None:
        model = tiny_model()
        rows = torch.randint(1, 300, (2, 7))
        hidden, final = hidden_states(model, rows, (1, 2))
        assert Heads((1, 2)).logits(model, 2, hidden[2]).shape == final.shape
        same = Heads((1,), "after", {1: torch.eye(32)})
        torch.testing.assert_close(
            same.logits(model, 1, hidden[1]), Heads((1,)).logits(model, 1, hidden[1])
        )

    def test_trained_heads_survive_the_disk(self, tmp_path: Path) -> None:
        model = tiny_model()
        rows = torch.randint(1, 300, (8, 12))
        with Progress(disable=True) as progress:
            trained = train_heads(model, rows, rows, (1, 2), TINY.heads, 0, progress)
        assert [(h.norm, h.temperature) for h in trained] == list(TINY.heads.variants)
        for heads in (*trained, Heads((1, 2))):
            folder = tmp_path / heads.name
            save_heads(heads, folder, model, provenance={})
            loaded = load_heads(folder)
            assert (loaded.exit_layers, loaded.norm) == ((1, 2), heads.norm)
            for layer, transform in heads.transforms.items():
                torch.testing.assert_close(loaded.transforms[layer], transform)
        stored = load_file(tmp_path / trained[0].name / "model.safetensors")
        assert {name: t.dtype for name, t in stored.items()} == {
            "exit_1.weight": torch.bfloat16,
            "exit_2.weight": torch.bfloat16,
        }
        config = json.loads((tmp_path / trained[0].name / "config.json").read_text())
        assert "model_type" not in config, "speculators finds the type elsewhere"

    def test_a_head_on_the_last_but_one_layer_is_measured(self) -> None:
        model = tiny_model().eval()
        # The last layer adds nothing: the head at layer 2 is always right.
        for module in (model.model.layers[2].self_attn.o_proj, model.model.layers[2].mlp.down_proj):
            torch.nn.init.zeros_(module.weight)
        texts = [Generation(row, 5) for row in generate(model, torch.randint(1, 300, (2, 5)), 8)]
        found = report(model, Heads((1, 2)), texts, threshold=0.0, max_drafts=3)
        assert found.exits[1].agreement == 1.0
        assert found.exits[0].coverage == 1.0
        assert (found.prompts, found.new_tokens) == (2, 8)


def test_loops() -> None:
    rng = np.random.default_rng(0)
    assert loops(np.tile([1, 2, 3], 40))
    assert loops(np.concatenate([rng.permutation(200), np.ones(64, dtype=int)]))
    assert not loops(np.concatenate([np.ones(64, dtype=int), rng.permutation(200)]))
