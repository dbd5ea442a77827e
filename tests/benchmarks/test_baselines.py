"""Drafters of other methods: they start where they should, learn, and are what vLLM loads."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.progress import Progress
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.baselines import __main__ as command
from benchmarks.baselines import drafter as drafter_module
from benchmarks.baselines import medusa
from benchmarks.baselines.checkpoint import Checkpoint
from benchmarks.baselines.data import Data, file_data
from benchmarks.baselines.draft import DraftModel
from benchmarks.baselines.drafter import Drafter, Seen, distil, evaluate, look, train
from benchmarks.baselines.eagle3 import Eagle3
from benchmarks.baselines.medusa import Medusa
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


def learn(
    target: FrozenTarget,
    drafter: Drafter,
    data: Data,
    steps: int,
    rate: float,
    kept: Checkpoint | None = None,
) -> Any:
    with Progress(disable=True) as show:
        return train(
            target, drafter, data, steps=steps, rows=8, rate=rate, seed=0, progress=show, kept=kept
        )


class Watch:
    """Counts the batches that the target looks at; `stop_at` ends a run as Ctrl-C would."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, stop_at: int | None = None) -> None:
        self.batches, self.stop_at = 0, stop_at
        monkeypatch.setattr(drafter_module, "look", self.look)

    def look(self, *args: Any) -> Seen:
        self.batches += 1
        if self.batches == self.stop_at:
            raise KeyboardInterrupt
        return look(*args)

    def start_anew(self) -> None:
        self.batches, self.stop_at = 0, None


def loss(target: FrozenTarget, drafter: Drafter, data: Data) -> float:
    with torch.no_grad():
        return float(drafter.learn(look(target, data.batch(0, 24, 0), drafter.layers))[0])


def test_a_batch_takes_as_much_of_each_set(data: Data) -> None:
    batch = data.batch(3, 8, seed=1)
    rows = [tuple(row) for row in batch.ids.tolist()]
    for of in data.sets:
        assert sum(row in {r.ids for r in of} for row in rows) == 4
    # The state before an output token is learned, that of the last token is not.
    assert batch.trained.sum(-1).tolist() == [24 - 1 - 3] * 8
    assert torch.equal(batch.ids, data.batch(3, 8, seed=1).ids)
    assert not torch.equal(batch.ids, data.batch(4, 8, seed=1).ids)


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
    seen = look(target, data.batch(0, 8, 0), ())
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
    x = look(target, data.batch(0, 4, 0), ()).normed
    for k in range(config.num_heads):
        block = ResidualBlock(config, config.hidden_size, config.num_hidden_layers)
        prefix = f"blocks.{k}."
        weights = {n.removeprefix(prefix): w for n, w in stored.items() if n.startswith(prefix)}
        block.load_state_dict(weights)
        mine = heads.lm_heads[k](x + torch.nn.functional.silu(heads.blocks[k](x)))
        theirs = block(x) @ stored[f"lm_heads.{k}.weight"].float().T
        torch.testing.assert_close(theirs, mine, atol=0.05, rtol=0.05)  # stored in bfloat16


def test_a_stopped_training_goes_on(
    target: FrozenTarget, data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And ends where it would have, in what was learned and in what is said of it."""
    whole = Medusa(target, heads=2)
    expected = learn(target, whole, data, steps=45, rate=1e-2)
    watch = Watch(monkeypatch, stop_at=30)
    path = tmp_path / "kept.pt"
    with pytest.raises(KeyboardInterrupt):
        learn(target, Medusa(target, heads=2), data, 45, 1e-2, Checkpoint(path))
    # 25 steps behind the last that was kept, and the evaluation; then nothing is left to do.
    for batches in (26, 0):
        watch.start_anew()
        heads, kept = Medusa(target, heads=2), Checkpoint(path)
        assert learn(target, heads, data, 45, 1e-2, kept) == expected
        assert watch.batches == batches
        assert kept.seconds > 0
        for mine, other in zip(heads.parameters(), whole.parameters(), strict=True):
            assert torch.equal(mine, other)


def test_draft_model_starts_as_the_targets_first_layers(target: FrozenTarget, data: Data) -> None:
    draft = DraftModel(target, num_layers=2)
    batch = data.batch(0, 8, 0)
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


def test_other_data_comes_from_files(target: FrozenTarget, tmp_path: Path) -> None:
    path = tmp_path / "own.jsonl"
    lines = [{"prompt_ids": [i + 1, 2], "output_ids": [3, 4, 5]} for i in range(20)]
    path.write_text("\n".join(map(json.dumps, lines)))
    data = file_data(target, [str(path)], length=16)
    assert (len(data.sets[0]), len(data.held_out)) == (19, 1)
    assert all(row.first == 1 for row in data.sets[0])
    path.write_text("\n".join(map(json.dumps, lines[:3])))
    with pytest.raises(AdaDecodeError, match="3 sequences are too few"):
        file_data(target, [str(path)], length=16)


def test_the_command_writes_beside_the_target(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    path = tmp_path / "own.jsonl"
    lines = [{"prompt_ids": [i + 1, 2], "output_ids": [3, 4, 5, 6]} for i in range(20)]
    path.write_text("\n".join(map(json.dumps, lines)))
    options = [str(folder), "--data", str(path), "--steps", "2", "--length", "16", "--heads", "2"]
    options += ["--rate", "1e-3", "1e-9"]
    monkeypatch.setattr(sys, "argv", ["baselines", "medusa", *options])
    assert command.main() == 0
    config = json.loads((folder / "medusa" / "config.json").read_text())
    assert config["provenance"]["tokens"] == 2 * 16 * 16
    tried = config["provenance"]["held_out_agreement_by_rate"]
    assert [len(tried[rate]) for rate in ("0", "0.001", "1e-09")] == [2, 2, 2]
    assert [p.name for p in folder.iterdir() if "unfinished" in p.name] == []

    # From here on the folder holds something else, which must stay.
    (folder / "medusa" / "config.json").unlink()
    assert command.main() == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("baselines: error: output ")


def test_a_stopped_command_goes_on(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    path, output = tmp_path / "own.jsonl", tmp_path / "mine"
    lines = [{"prompt_ids": [i + 1, 2], "output_ids": [3, 4, 5, 6]} for i in range(20)]
    path.write_text("\n".join(map(json.dumps, lines)))
    options = ["--data", str(path), "--length", "16", "--heads", "2", "--rate", "1e-3", "1e-2"]
    options += ["--output", str(output), "--steps"]
    monkeypatch.setattr(sys, "argv", ["baselines", "medusa", str(folder), *options, "2"])
    # The untrained heads and the first rate take 1 + 2 + 1 batches.
    watch = Watch(monkeypatch, stop_at=6)
    assert command.main() == 130
    said = capsys.readouterr().err.splitlines()
    assert said[-1] == "baselines: stopped; the same command goes on"
    assert not output.exists()

    watch.start_anew()
    assert command.main() == 0
    assert watch.batches == 1 + 3
    made_with = json.loads((output / "config.json").read_text())["provenance"]
    assert list(made_with["held_out_agreement_by_rate"]) == ["0", "0.001", "0.01"]
    assert made_with["target_fingerprint"] == target_fingerprint(folder)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["mine", "own.jsonl"]


def test_other_settings_do_not_go_on(folder: Path, target: FrozenTarget, data: Data) -> None:
    def identity(*more: str, of: Data = data) -> str:
        options = command.parse(["medusa", str(folder), *more])
        return command.identity(options, "medusa", target, of)

    assert identity() == identity("--rate", "1", "--threads", "1")
    different = [("--steps", "7"), ("--rows", "7"), ("--heads", "2"), ("--seed", "1")]
    keys = {identity(), identity(of=Data(data.sets, data.held_out[1:]))}
    keys |= {identity(*more) for more in different}
    assert len(keys) == 6


@pytest.mark.parametrize(("untrained", "kept"), [([0.4, 0.4], 2), ([0.6, 0.6], 0)])
def test_the_best_rate_is_kept(
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    untrained: list[float],
    kept: int,
) -> None:
    """By what its drafts would be worth in a row, not by their mean."""
    assert command.worth([0.5, 0.5, 1.0]) == pytest.approx(0.5 + 0.25 + 0.25)
    found = {1e-3: [0.2, 0.9], 3e-3: [0.5, 0.5], 1e-2: [0.1, 0.1]}
    saved: list[Any] = []
    made: list[Any] = []
    monkeypatch.setattr(command, "train", lambda *args, rate, **options: found[rate])
    monkeypatch.setattr(command, "evaluate", lambda *args: untrained)
    monkeypatch.setattr(command, "file_data", lambda *args: None)
    original = command.make

    def make(*args: Any) -> Any:
        made.append(original(*args))
        return made[-1]

    monkeypatch.setattr(command, "make", make)
    monkeypatch.setattr(Medusa, "save", lambda self, folder, provenance: saved.append(self))
    options = command.parse(["medusa", str(folder), "--data", "x", "--output", str(tmp_path / "o")])
    with Progress(disable=True) as progress:
        prepared = command.prepare(options, progress)
        made.clear()
        command.run(options, "medusa", prepared, progress)
    assert len(made) == 4  # the untrained one, and one for each rate
    assert saved == [made[kept]]


def test_eagle3_learns_and_is_what_vllm_loads(
    target: FrozenTarget, data: Data, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    drafter = Eagle3(target, drafts=2)
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
