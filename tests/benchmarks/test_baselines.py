"""Drafters of other methods: they start where they should, learn, and are what vLLM loads."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.progress import Progress
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.baselines import __main__ as command
from benchmarks.baselines import medusa
from benchmarks.baselines.draft import DraftModel
from benchmarks.baselines.eagle3 import Eagle3
from benchmarks.baselines.medusa import Medusa
from benchmarks.baselines.training import (
    Data,
    Drafter,
    Seen,
    distil,
    evaluate,
    look,
    make_data,
    train,
)
from benchmarks.demo import corpus as text
from benchmarks.demo.recipe import HeadRecipe, Recipe
from tests.support.engines import DEMO_MODEL
from tests.support.tiny_models import save_tiny_model
from vllm_adadecode.errors import AdaDecodeError
from vllm_adadecode.heads import target_fingerprint
from vllm_adadecode.training.batches import TokenRow
from vllm_adadecode.training.target_model import FrozenTarget, load_target

VOCABULARY = 64


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("target")
    return save_tiny_model(path, vocab_size=VOCABULARY, num_hidden_layers=3)


@pytest.fixture
def target(folder: Path) -> FrozenTarget:
    return load_target(folder, torch.float32)


@pytest.fixture
def data() -> Data:
    """Two sets of rows; no row is in both, nor held out."""
    tokens = torch.randint(1, VOCABULARY, (30, 24), generator=torch.Generator().manual_seed(0))
    rows = [TokenRow(tuple(row), 3) for row in tokens.tolist()]
    return Data((tuple(rows[:12]), tuple(rows[12:24])), tuple(rows[24:]))


def learn(target: FrozenTarget, drafter: Drafter, data: Data, steps: int, rate: float) -> Any:
    with Progress(disable=True) as show:
        return train(target, drafter, data, steps=steps, rate=rate, seed=0, progress=show)


def loss(target: FrozenTarget, drafter: Drafter, data: Data) -> float:
    with torch.no_grad():
        return float(drafter.learn(look(target, data.batch(0, 0, 24), drafter.layers))[0])


def test_a_batch_takes_as_much_of_each_set(data: Data) -> None:
    batch = data.batch(3, 1, 8)
    rows = [tuple(row) for row in batch.ids.tolist()]
    for of in data.sets:
        assert sum(row in {r.ids for r in of} for row in rows) == 4
    # The state before an output token is learned, that of the last token is not.
    assert batch.trained.sum(-1).tolist() == [24 - 1 - 3] * 8
    assert torch.equal(batch.ids, data.batch(3, 1, 8).ids)
    assert not torch.equal(batch.ids, data.batch(4, 1, 8).ids)


def test_distillation_compares_the_last_positions() -> None:
    """A draft that speaks for fewer positions is held against those at the end of the row."""
    logits = torch.randn(1, 6, 8, generator=torch.Generator().manual_seed(0))
    trained = torch.tensor([[False, True, True, True, True, False]])
    seen = Seen(torch.zeros(1, 6, dtype=torch.int64), trained, {}, logits, logits)
    total, agreement = distil(seen, [logits, logits[:, 2:]], 0.5)
    assert float(total) == pytest.approx(0, abs=1e-6)
    assert agreement == [1.0, 1.0]
    _, shifted = distil(seen, [logits[:, :-2]], 0.5)
    assert shifted[0] < 1
    other = torch.zeros_like(logits)
    once, _ = distil(seen, [other], 0.5)
    twice, _ = distil(seen, [other, other], 0.5)
    assert float(twice) == pytest.approx(1.5 * float(once))


def test_medusa_starts_as_the_targets_lm_head(
    target: FrozenTarget, data: Data, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[torch.Tensor] = []
    monkeypatch.setattr(medusa, "distil", lambda seen, guesses, decay: given.extend(guesses))
    seen = look(target, data.batch(0, 0, 8), ())
    Medusa(target, heads=2).learn(seen)
    # Head k speaks, from each position, for the one k + 1 further on.
    assert [guess.shape[1] for guess in given] == [23, 22]
    for k, guess in enumerate(given):
        torch.testing.assert_close(guess, seen.logits[:, : 23 - k])


def test_medusa_learns_and_is_what_vllm_loads(
    target: FrozenTarget, data: Data, tmp_path: Path
) -> None:
    heads = Medusa(target, heads=2)
    before = loss(target, heads, data)
    agreement = learn(target, heads, data, steps=40, rate=1e-2)
    assert loss(target, heads, data) < 0.7 * before
    assert len(agreement) == 2
    heads.save(tmp_path, {"tokens": 1})

    from vllm.model_executor.models.medusa import ResidualBlock
    from vllm.transformers_utils.configs.medusa import MedusaConfig

    config = MedusaConfig.from_pretrained(tmp_path)
    assert (config.num_heads, config.num_hidden_layers) == (2, 1)
    stored = load_file(tmp_path / "model.safetensors")
    x = look(target, data.batch(0, 0, 4), ()).normed
    for k in range(config.num_heads):
        block = ResidualBlock(config, config.hidden_size, config.num_hidden_layers)
        prefix = f"blocks.{k}."
        weights = {n.removeprefix(prefix): w for n, w in stored.items() if n.startswith(prefix)}
        block.load_state_dict(weights)
        mine = heads.lm_heads[k](x + torch.nn.functional.silu(heads.blocks[k](x)))
        theirs = block(x) @ stored[f"lm_heads.{k}.weight"].float().T
        torch.testing.assert_close(theirs, mine, atol=0.05, rtol=0.05)  # stored in bfloat16


def test_draft_model_starts_as_the_targets_first_layers(target: FrozenTarget, data: Data) -> None:
    draft = DraftModel(target, num_layers=2)
    batch = data.batch(0, 0, 8)
    seen = look(target, batch, (2,))
    lens = target.lm_head(target.norm(seen.hidden[2]))
    with torch.no_grad():
        torch.testing.assert_close(draft.model(batch.ids).logits, lens)


def test_draft_model_learns_and_can_be_served(
    target: FrozenTarget, data: Data, tmp_path: Path
) -> None:
    draft = DraftModel(target, num_layers=1)
    weight = target.lm_head_weight.clone()
    before = loss(target, draft, data)
    learn(target, draft, data, steps=40, rate=3e-3)
    assert loss(target, draft, data) < 0.7 * before
    assert torch.equal(target.lm_head_weight, weight)  # the target is only read
    shares = evaluate(target, draft, data)
    draft.save(tmp_path, {"tokens": 1})
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert model.config.num_hidden_layers == 1
    draft.model = model
    assert evaluate(target, draft, data) == pytest.approx(shares, abs=0.05)
    assert AutoTokenizer.from_pretrained(tmp_path)("w5 w7").input_ids == [5, 7]
    assert json.loads((tmp_path / "config.json").read_text())["provenance"] == {"tokens": 1}


def test_eagle3_learns_and_is_what_vllm_loads(
    target: FrozenTarget, data: Data, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    drafter = Eagle3(target, in_a_row=2)
    frozen = [p for p in drafter.model.parameters() if not p.requires_grad]
    embedding = target.model.get_input_embeddings().weight
    assert any(torch.equal(p, embedding) for p in frozen)
    before = loss(target, drafter, data)
    agreement = learn(target, drafter, data, steps=20, rate=3e-3)
    assert loss(target, drafter, data) < 0.7 * before
    assert len(agreement) == 2
    drafter.save(tmp_path, {"tokens": 1})

    from vllm.transformers_utils.configs.speculators import SpeculatorsConfig

    config = SpeculatorsConfig.from_pretrained(tmp_path)
    assert config.architectures == ["Eagle3LlamaForCausalLM"]
    assert config.eagle_aux_hidden_state_layer_ids == list(drafter.aux)
    assert (config.norm_before_fc, config.norm_before_residual) == (True, True)
    assert config.norm_output
    stored = load_file(tmp_path / "model.safetensors")
    assert torch.equal(stored["fc.weight"], drafter.model.fc.weight)


def test_eagle3_without_speculators_says_what_to_do(
    target: FrozenTarget, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "speculators", None)
    with pytest.raises(AdaDecodeError, match="make setup"):
        Eagle3(target)


def test_data_is_what_the_demos_heads_see(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of it the target's own text, of which some is held out."""
    whole = text.load_corpus()
    small = text.Corpus(whole.train[:3], whole.second_stage[:3], ())
    monkeypatch.setattr(text, "load_corpus", lambda: small)
    recipe = Recipe(heads=HeadRecipe(text=20, generations=40, length=16))
    with Progress(disable=True) as show:
        found = make_data(load_target(DEMO_MODEL, torch.float32), recipe, show)
        assert [len(of) for of in (*found.sets, found.held_out)] == [19, 38, 2]
        assert not set(found.held_out) & {row for of in found.sets for row in of}
        assert {len(row.ids) for row in found.held_out} == {16}
        bare = save_tiny_model(tmp_path / "bare", vocab_size=VOCABULARY)
        (bare / "tokenizer.json").unlink()
        with pytest.raises(AdaDecodeError, match=r"no tokenizer\.json"):
            make_data(load_target(bare, torch.float32), recipe, show)


def test_the_command_writes_beside_the_target(
    folder: Path,
    data: Data,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    target = Path(shutil.copytree(folder, tmp_path / "target"))
    monkeypatch.setattr(command, "make_data", lambda *_: data)
    options = [str(target), "--steps", "2", "--heads", "2"]
    assert command.main(["medusa", *options]) == 0
    made_with = json.loads((target / "medusa" / "config.json").read_text())["provenance"]
    assert made_with["tokens"] == 2 * 16 * 256
    assert made_with["rate"] == command.RATES["medusa"]
    assert made_with["target_fingerprint"] == target_fingerprint(target)
    assert len(made_with["held_out_agreement"]) == 2

    # What is there stays: with it another method goes on.
    weights = (target / "medusa" / "model.safetensors").read_bytes()
    assert command.main(["medusa,draft", *options, "--layers", "1"]) == 0
    assert "remove it to train it again" in capsys.readouterr().out
    assert (target / "medusa" / "model.safetensors").read_bytes() == weights
    assert (target / "draft" / "config.json").is_file()

    # A run that is stopped leaves nothing half-written.
    def stopped(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "train", stopped)
    assert command.main(["medusa", *options, "--output", str(tmp_path / "mine")]) == 130
    assert "the same command goes on" in capsys.readouterr().err
    assert not (tmp_path / "mine").exists()
