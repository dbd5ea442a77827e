"""Widened models compute the small model's function, and so do their heads."""

from __future__ import annotations

import contextlib
import json
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from speculators import Eagle3DraftModel, Eagle3SpeculatorConfig
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks import widen as command
from benchmarks.baselines.eagle3 import Eagle3
from benchmarks.compare import methods
from benchmarks.widening import build, files, plan
from benchmarks.widening.plan import Channels, Plan, choose_channels
from benchmarks.widening.shape import PRESETS, Shape
from benchmarks.widening.target import Block, WideTensor
from tests.support.engines import (
    DEMO_MODEL,
    EnginePool,
    generate,
    greedy,
    speculative,
    stats,
    token_ids,
)
from tests.support.tiny_models import save_tiny_model
from vllm_adadecode.errors import AdaDecodeError
from vllm_adadecode.heads import (
    HeadsConfig,
    check_fits,
    head_tensors,
    load_draft_vocab,
    load_heads,
    make_heads,
    save_heads,
    target_fingerprint,
)
from vllm_adadecode.training.target_model import load_target

VOCAB, EXITS = 256, (1, 3, 4)
# float32 sums in another order; logits are of order 1 to 10.
TOLERANCE = {"rtol": 1e-4, "atol": 1e-4}


_small_models: dict[str, Path] = {}


def small_model(path: Path, **options: Any) -> Path:
    """Random, with gains that are not ones and an eps that counts."""
    key = repr(sorted(options.items()))
    if key not in _small_models:
        save_tiny_model(path, vocab_size=VOCAB, rms_norm_eps=0.01, **options)
        model = AutoModelForCausalLM.from_pretrained(path)
        for name, parameter in model.named_parameters():
            if "norm" in name:
                torch.nn.init.uniform_(parameter, 0.5, 2.0)
        model.save_pretrained(path)
        _small_models[key] = Path(tempfile.mkdtemp()) / "small"
        shutil.copytree(path, _small_models[key])
    return Path(shutil.copytree(_small_models[key], path, dirs_exist_ok=True))


@pytest.fixture(scope="module", autouse=True)
def _remove_small_models() -> Iterator[None]:
    yield
    while _small_models:
        shutil.rmtree(_small_models.popitem()[1].parent)


def small_heads(target: Path, **fields: Any) -> HeadsConfig:
    """Random heads beside a target."""
    config = HeadsConfig(
        exit_layers=EXITS,
        target={
            "hidden_size": 128,
            "vocab_size": VOCAB,
            "num_hidden_layers": 6,
            "fingerprint": target_fingerprint(target),
        },
        speculators_config={"verifier": {"name_or_path": ".."}},
        **fields,
    )
    tensors = {
        name: tensor + torch.randn_like(tensor) / 16
        for name, tensor in head_tensors(make_heads(config, torch.float32, "cpu")).items()
    }
    if config.draft_vocab_size is not None:
        tensors["draft_vocab"] = torch.arange(VOCAB)[:: VOCAB // config.draft_vocab_size]
    save_heads(target / "adadecode", config, tensors)
    return config


def widened(source: Path, output: Path, dtype: torch.dtype | None = None, **shape: Any) -> Path:
    wide = Shape.of(build.read_config(source)).change(**shape)
    build.widen(source, output, wide, dtype)
    return output


@torch.no_grad()
def logits(folder: Path, rows: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)(rows).logits


@torch.no_grad()
def head_outputs(folder: Path, rows: torch.Tensor) -> list[dict[str, torch.Tensor]]:
    """At each exit: logits over the tokens that the heads predict, gate and "other" logit."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    config = HeadsConfig.load(folder / "adadecode")
    ids = load_draft_vocab(folder / "adadecode", config)
    states = model.model(rows, output_hidden_states=True).hidden_states
    found = []
    for exit_layer, head in load_heads(folder / "adadecode", config, torch.float32, "cpu").items():
        hidden = states[exit_layer].flatten(0, 1)
        x = head.features(hidden, model.model.norm)
        outputs = {"logits": model.lm_head(x) if ids is None else model.lm_head(x)[:, ids]}
        parts = {"gate": head.gate_logit(hidden), "other": head.other_logit(x)}
        found.append(outputs | {k: v for k, v in parts.items() if v is not None})
    return found


def random_rows(length: int = 24) -> torch.Tensor:
    return torch.randint(0, VOCAB, (3, length), generator=torch.Generator().manual_seed(1))


def assert_same_logits(small: torch.Tensor, wide: torch.Tensor) -> None:
    size = small.shape[-1]
    torch.testing.assert_close(wide[..., :size], small, **TOLERANCE)
    assert (wide[..., size:] < -1e4).all(), "an added token can be predicted"


GQA = {"num_attention_heads": 4, "num_key_value_heads": 2}
MHA = {"num_attention_heads": 4, "num_key_value_heads": 4}
TARGETS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    # small, wide
    "tied, whole copies": (
        GQA | {"tie_word_embeddings": True},
        {"hidden_size": 256, "intermediate_size": 300},
    ),
    "untied, more tokens": (GQA, {"hidden_size": 512, "vocab_size": 700}),
    "tied, more tokens": (
        GQA | {"tie_word_embeddings": True},
        {"hidden_size": 1024, "vocab_size": 700},
    ),
    "tied to untied": (
        GQA | {"tie_word_embeddings": True},
        {"hidden_size": 512, "vocab_size": 300, "tie_word_embeddings": False},
    ),
    "no whole copies": (GQA, {"hidden_size": 448, "vocab_size": 257}),
    "no whole copies, tied": (GQA | {"tie_word_embeddings": True}, {"hidden_size": 200}),
    "more layers": (GQA, {"num_hidden_layers": 10, "hidden_size": 256}),
    "more heads": (
        GQA,
        {"hidden_size": 384, "num_attention_heads": 12, "num_key_value_heads": 3},
    ),
    "key-value heads twice": (
        GQA,
        {"hidden_size": 384, "num_attention_heads": 6, "num_key_value_heads": 6},
    ),
    "one query each": (MHA, {"num_attention_heads": 8, "num_key_value_heads": 8}),
    "queries share": (
        MHA,
        {"hidden_size": 384, "num_attention_heads": 12, "num_key_value_heads": 4},
    ),
    "heads twice as wide": (GQA, {"head_dim": 64, "hidden_size": 512}),
    "heads half as wide again": (GQA, {"head_dim": 48, "hidden_size": 256}),
    "llama3 scaling": (
        GQA
        | {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 5000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            }
        },
        {"head_dim": 96, "hidden_size": 384},
    ),
}


@pytest.mark.parametrize(("small", "wide"), TARGETS.values(), ids=TARGETS)
def test_same_function(tmp_path: Path, small: dict[str, Any], wide: dict[str, Any]) -> None:
    """Logits of a text, and tokens that follow it."""
    source = small_model(tmp_path / "small", **small)
    output = widened(source, tmp_path / "wide", **wide)
    rows = random_rows()
    assert_same_logits(logits(source, rows), logits(output, rows))
    mine, theirs = (
        AutoModelForCausalLM.from_pretrained(folder).generate(
            rows, max_new_tokens=16, do_sample=False, eos_token_id=None
        )
        for folder in (output, source)
    )
    assert torch.equal(mine, theirs)


WRONG: dict[str, tuple[str, Any, dict[str, Any]]] = {
    "norms not corrected": ("norm_gain", 0.5, {"hidden_size": 448}),
    "softmax scale not corrected": ("query_scale", 1.0, {"head_dim": 64}),
    "rotary pairs in other places": ("rotary_stride", 1, {"head_dim": 64}),
    "LM head not corrected": ("feature_scale", 1.0, {"hidden_size": 1024}),
}


@pytest.mark.parametrize(("name", "value", "wide"), WRONG.values(), ids=WRONG)
def test_each_correction_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, value: Any, wide: dict[str, Any]
) -> None:
    source = small_model(tmp_path / "small", **GQA, tie_word_embeddings=True)
    small = logits(source, random_rows())
    right = logits(widened(source, tmp_path / "right", **wide), random_rows())
    assert_same_logits(small, right)
    monkeypatch.setattr(Plan, name, value)
    wrong = logits(widened(source, tmp_path / "wrong", **wide), random_rows())
    with pytest.raises(AssertionError, match="not close"):
        assert_same_logits(small, wrong)


def test_eps_is_corrected(tmp_path: Path) -> None:
    source = small_model(tmp_path / "small", **GQA)
    output = widened(source, tmp_path / "wide", hidden_size=448)
    config = json.loads((output / "config.json").read_text())
    (output / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.01}))
    with pytest.raises(AssertionError, match="not close"):
        assert_same_logits(logits(source, random_rows()), logits(output, random_rows()))


def test_rounded_weights_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """bfloat16 weights: where widths are multiples, no rounding of a weight is seen."""
    source = small_model(tmp_path / "small", **GQA)
    AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16).save_pretrained(source)
    rows = random_rows()
    reference = logits(source, rows, torch.float64)

    def error(name: str) -> float:
        shape = {"hidden_size": 2048, "head_dim": 64, "vocab_size": 300}
        output = widened(source, tmp_path / name, **shape)
        assert build.read_config(output).dtype == torch.bfloat16
        wide = logits(output, rows, torch.float64)
        return float((wide[..., :VOCAB] - reference).abs().max())

    exact = error("exact")
    # With a single copy of the state, what rounding drops of the query projection has no place.
    single = Channels(128, 2048, copies=1, scale=4.0, constant=128)
    assert single.energy == 1.0
    monkeypatch.setattr(plan, "choose_channels", lambda *_: single)
    rounded = error("rounded")
    assert exact < 1e-3
    assert rounded > 20 * exact


HEADS: dict[str, dict[str, Any]] = {
    "full, before": {"transform": "full", "norm": "before", "gate": True},
    "full, after": {"transform": "full", "norm": "after", "gate": True},
    "identity, after": {"transform": "identity", "norm": "after", "gate": True},
    "low rank, after": {"transform": "low_rank", "rank": 8, "norm": "after"},
    "low rank, before": {"transform": "low_rank", "rank": 8, "norm": "before", "gate": True},
    "draft vocabulary": {
        "transform": "full",
        "norm": "before",
        "gate": True,
        "draft_vocab_size": 64,
    },
}
EXACT = {"hidden_size": 1024, "vocab_size": 300, "num_hidden_layers": 9}
INEXACT = {"hidden_size": 448, "vocab_size": 300, "num_hidden_layers": 7}
HEAD_CASES = [
    *(pytest.param(fields, EXACT, True, id=f"{name}; tied") for name, fields in HEADS.items()),
    *(pytest.param(fields, INEXACT, False, id=f"{name}; untied") for name, fields in HEADS.items()),
]


@pytest.mark.parametrize(("fields", "wide", "tied"), HEAD_CASES)
def test_same_heads(
    tmp_path: Path, fields: dict[str, Any], wide: dict[str, Any], tied: bool
) -> None:
    source = small_model(tmp_path / "small", **GQA, tie_word_embeddings=tied)
    small = small_heads(source, **fields)
    output = widened(source, tmp_path / "wide", **wide)
    config = HeadsConfig.load(output / "adadecode")
    check_fits(
        config,
        hidden_size=wide["hidden_size"],
        vocab_size=wide["vocab_size"],
        num_hidden_layers=wide["num_hidden_layers"],
        target_path=output,
    )
    depth = wide["num_hidden_layers"]
    assert config.exit_layers == tuple(e * depth // 6 for e in EXITS)
    assert (config.thresholds, config.transform) == (small.thresholds, small.transform)
    for mine, theirs in zip(
        head_outputs(output, random_rows()), head_outputs(source, random_rows()), strict=True
    ):
        assert mine.keys() == theirs.keys()
        assert_same_logits(theirs.pop("logits"), mine.pop("logits"))
        for name in mine:
            torch.testing.assert_close(mine[name], theirs[name], **TOLERANCE, msg=name)


def test_draft_vocabulary_keeps_its_share(tmp_path: Path) -> None:
    """The same head outputs for the small one's tokens, from a quarter of the wide LM head."""
    source = small_model(tmp_path / "small", **GQA, tie_word_embeddings=True)
    small_heads(source, **HEADS["draft vocabulary"])
    kept = widened(source, tmp_path / "kept", **EXACT)
    grown = tmp_path / "grown"
    wide = Shape.of(build.read_config(source)).change(**EXACT)
    build.widen(source, grown, wide, grow_draft_vocab=True)
    ids = []
    for folder, size in ((kept, 64), (grown, 75)):
        config = HeadsConfig.load(folder / "adadecode")
        found = load_draft_vocab(folder / "adadecode", config)
        assert found is not None
        assert (config.draft_vocab_size, len(found)) == (size, size)
        ids.append(found.tolist())
    assert ids[1] == ids[0] + list(range(VOCAB, VOCAB + 11))
    for mine, theirs in zip(
        head_outputs(grown, random_rows()), head_outputs(source, random_rows()), strict=True
    ):
        assert_same_logits(theirs.pop("logits"), mine.pop("logits"))
        for name in mine:
            torch.testing.assert_close(mine[name], theirs[name], **TOLERANCE, msg=name)


# --- the demo target, in the engine ------------------------------------------------------------


def test_demo_target(tmp_path: Path, engines: EnginePool, prompts: list[str]) -> None:
    """Same tokens, and the same drafts with the same fate, on a wider and deeper copy."""
    small_depth = build.read_config(DEMO_MODEL).num_hidden_layers
    output = widened(
        DEMO_MODEL,
        tmp_path / "wide",
        torch.float32,
        hidden_size=1024,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=128,
        vocab_size=3000,
        num_hidden_layers=3 * small_depth // 2,
    )
    small = engines.get(DEMO_MODEL, speculative_config=speculative())
    wide = engines.get(output, speculative_config=speculative())
    results = []
    for engine in (small, wide):
        stats(engine, reset=True)
        results.append((token_ids(generate(engine, prompts[:6], greedy(32), 1)), stats(engine)))
    (tokens, small_stats), (wide_tokens, wide_stats) = results
    assert wide_tokens == tokens
    counts = [list(s["exits"].values()) for s in (small_stats, wide_stats)]
    assert counts[0] == counts[1]
    assert small_stats["accepted_tokens"] > 50
    tokenizer = AutoTokenizer.from_pretrained(output)
    assert tokenizer.encode(prompts[0]) == AutoTokenizer.from_pretrained(DEMO_MODEL).encode(
        prompts[0]
    )


# --- layout and files --------------------------------------------------------------------------


def _medusa_logits(folder: Path, rows: torch.Tensor) -> list[torch.Tensor]:
    """What vLLM's Medusa computes, of each head."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    weights = {k: v.float() for k, v in load_file(folder / "medusa" / "model.safetensors").items()}
    found = []
    with torch.no_grad():
        x = model.model(rows).last_hidden_state
        for k in range(json.loads((folder / "medusa" / "config.json").read_text())["num_heads"]):
            name = f"blocks.{k}.layers.0"
            inside = torch.nn.functional.linear(
                x, weights[f"{name}.weight"], weights[f"{name}.bias"]
            )
            y = x + torch.nn.functional.silu(inside)
            found.append(y @ weights[f"lm_heads.{k}.weight"].T)
    return found


def _save_medusa(target: Path) -> None:
    """Two heads of random weights."""
    torch.manual_seed(3)
    folder = target / "medusa"
    folder.mkdir()
    tensors = {}
    for k in range(2):
        tensors[f"blocks.{k}.layers.0.weight"] = torch.randn(128, 128) / 8
        tensors[f"blocks.{k}.layers.0.bias"] = torch.randn(128)
        tensors[f"lm_heads.{k}.weight"] = torch.randn(VOCAB, 128) / 8
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"model_type": "medusa", "num_heads": 2}))


@pytest.mark.parametrize(
    ("tied", "wide"),
    [
        (True, {"hidden_size": 512, "vocab_size": 700}),
        (True, {"hidden_size": 1024}),
        (False, {"hidden_size": 300, "vocab_size": 257}),
    ],
    ids=["tied, more tokens", "tied", "one copy"],
)
def test_same_drafters(tmp_path: Path, tied: bool, wide: dict[str, Any]) -> None:
    source = small_model(tmp_path / "small", **GQA, tie_word_embeddings=tied)
    _save_medusa(source)
    same: dict[str, Any] = {"vocab_size": VOCAB, "tie_word_embeddings": tied}
    save_tiny_model(source / "draft", **(same | GQA | {"num_hidden_layers": 2}))
    shape = Shape.of(build.read_config(source)).change(**wide, num_hidden_layers=12)
    build.widen(source, tmp_path / "wide", shape)
    rows = random_rows()
    for mine, theirs in zip(
        _medusa_logits(tmp_path / "wide", rows), _medusa_logits(source, rows), strict=True
    ):
        assert_same_logits(theirs, mine)
    assert_same_logits(*(logits(path / "draft", rows) for path in (source, tmp_path / "wide")))
    config = json.loads((tmp_path / "wide" / "draft" / "config.json").read_text())
    assert config["num_hidden_layers"] == 4, "2 of 6 are 4 of 12"
    # Comparisons refuse drafters of other targets.
    for name in ("medusa", "draft_model"):
        methods.arguments(name, str(tmp_path / "wide"))


def _save_eagle3(target: Path) -> None:
    """Of random weights, with gains that are not ones."""
    torch.manual_seed(4)
    drafter = Eagle3(load_target(target, torch.float32), drafts=3)
    for name, parameter in drafter.model.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(parameter, 0.5, 2.0)
        elif "embed" not in name:
            torch.nn.init.normal_(parameter, std=0.1)
    folder = target / "eagle3"
    folder.mkdir()
    drafter.save(folder, {})


@torch.no_grad()
def _eagle3_logits(folder: Path, rows: torch.Tensor) -> list[torch.Tensor]:
    """What speculators' model computes of the target's states, for each draft in a row."""
    states = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).model(
        rows, output_hidden_states=True
    )
    with contextlib.chdir(folder / "eagle3"):  # its verifier is ".."
        config = Eagle3SpeculatorConfig.from_pretrained(".")
        config.transformer_layer_config._attn_implementation = "eager"
        model = Eagle3DraftModel.from_pretrained(".", config=config).float()
    found: list[torch.Tensor] = []
    model.lm_head.register_forward_hook(lambda module, args, output: found.append(output))
    chosen = [states.hidden_states[layers] for layers in model.target_layer_ids]
    for row, hidden in zip(rows, torch.cat(chosen, -1), strict=True):
        ids = row[None, 1:]
        model(hidden[None, :-1], ids, torch.zeros_like(ids), ttt_steps=3)
    return found


@pytest.mark.parametrize(
    ("tied", "wide"),
    [
        (True, {"hidden_size": 512, "vocab_size": 700}),
        (True, {"hidden_size": 1024}),
        (False, {"hidden_size": 300, "head_dim": 40, "vocab_size": 257}),
        (False, {"num_attention_heads": 8, "num_key_value_heads": 8, "intermediate_size": 300}),
    ],
    ids=["tied, more tokens", "tied", "one copy", "more heads"],
)
def test_same_eagle3_drafter(tmp_path: Path, tied: bool, wide: dict[str, Any]) -> None:
    source = small_model(tmp_path / "small", **GQA, tie_word_embeddings=tied)
    _save_eagle3(source)
    shape = Shape.of(build.read_config(source)).change(**wide, num_hidden_layers=12)
    build.widen(source, tmp_path / "wide", shape)
    rows = random_rows()
    theirs, mine = (_eagle3_logits(path, rows) for path in (source, tmp_path / "wide"))
    assert len(theirs) == len(mine) == 9, "three rows, three drafts"
    for small, large in zip(theirs, mine, strict=True):
        assert_same_logits(small, large)
    methods.arguments("eagle3", str(tmp_path / "wide"))  # refuses drafters of other targets


def test_another_eagle3_drafter_is_refused(tmp_path: Path) -> None:
    source = small_model(tmp_path / "small", **GQA)
    _save_eagle3(source)
    path = source / "eagle3" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"norm_output": False}))
    shape = Shape.of(build.read_config(source)).change(hidden_size=512)
    with pytest.raises(AdaDecodeError, match="norm_output differs"):
        build.widen(source, tmp_path / "wide", shape)
    assert not (tmp_path / "wide").exists()


def test_no_room_for_medusa(tmp_path: Path) -> None:
    source = small_model(tmp_path / "small", **GQA)
    _save_medusa(source)
    shape = Shape.of(build.read_config(source)).change(hidden_size=200)
    with pytest.raises(AdaDecodeError, match="Medusa"):
        build.widen(source, tmp_path / "wide", shape)
    build.widen(source, tmp_path / "wide", shape, other_drafters=False)
    assert not (tmp_path / "wide" / "medusa").exists()


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_exact_from_the_demo_target(name: str) -> None:
    """No gain is rounded, and there is room for the constant."""
    small = Shape.of(build.read_config(DEMO_MODEL))
    channels = choose_channels(small.hidden_size, PRESETS[name].hidden_size, True)
    assert channels.energy == 1.0
    assert channels.constant is not None
    assert channels.copies * small.hidden_size <= channels.constant < channels.wide


def test_preset_sizes() -> None:
    """Llama 3.2 3B and Llama 3.1 8B have these numbers of parameters."""
    assert PRESETS["3b"].weights == 3_212_749_824
    assert PRESETS["8b"].weights == 8_030_261_248


def test_shape_counts_what_is_stored(tmp_path: Path) -> None:
    source = small_model(tmp_path / "small", **GQA)
    output = widened(source, tmp_path / "wide", hidden_size=256, vocab_size=300)
    model = AutoModelForCausalLM.from_pretrained(output)
    shape = Shape.of(model.config)
    assert shape.weights == model.num_parameters()
    assert shape.layer_weights == sum(p.numel() for p in model.model.layers[0].parameters())
    index = json.loads((output / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == build.total_bytes(shape, torch.float32)
    stored = {n: t for f in output.glob("*.safetensors") for n, t in load_file(f).items()}
    assert stored.keys() == index["weight_map"].keys()


def test_file_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks across the pieces in which a file is written, and holes."""
    monkeypatch.setattr(files, "CHUNK_BYTES", 100)
    values = torch.randn(9, 3, dtype=torch.float64)
    rows, columns = torch.arange(4, 40, 4), torch.tensor([0, 6, 3])
    matrix = WideTensor("m", (50, 7), torch.bfloat16, (Block(rows, columns, values),))
    vector = WideTensor(
        "v", (30,), torch.bfloat16, (Block(rows[:7], torch.tensor([0]), values[:7, :1]),)
    )
    empty = WideTensor("e", (60, 4), torch.bfloat16, ())
    done: list[int] = []
    files.write(tmp_path / "file", [matrix, vector, empty], done.append)
    stored = load_file(tmp_path / "file")
    expected = torch.zeros(50, 7, dtype=torch.bfloat16)
    expected[rows[:, None], columns] = values.bfloat16()
    assert torch.equal(stored["m"], expected)
    assert torch.equal(stored["v"][rows[:7]], values[:7, 0].bfloat16())
    assert (stored["v"] != 0).sum() == 7
    assert stored["e"].shape == (60, 4)
    assert not stored["e"].any()
    assert sum(done) == 2 * (50 * 7 + 30 + 60 * 4)


def test_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = small_model(tmp_path / "small", **GQA)

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    for broken in ("files.write", "_card"):
        with monkeypatch.context() as patched:
            patched.setattr(f"benchmarks.widening.build.{broken}", full)
            with pytest.raises(OSError, match="No space"):
                widened(source, tmp_path / "out" / "wide", hidden_size=256)
        assert not list((tmp_path / "out").iterdir())


# --- what can't be done ------------------------------------------------------------------------

REFUSED: dict[str, tuple[dict[str, Any], list[str], str]] = {
    "narrower": (GQA, ["--hidden-size", "64"], "hidden size 64 is too small"),
    "no room": (GQA, ["--vocab-size", "300"], "a larger vocabulary one more"),
    "shallower": (GQA, ["--num-hidden-layers", "5"], "num_hidden_layers 5 is less than"),
    "odd heads": (GQA, ["--head-dim", "33"], "head_dim 33 is odd"),
    "uneven heads": (GQA, ["--num-attention-heads", "5"], "is no multiple of"),
    "unheard of": (GQA, ["--num-attention-heads", "6"], "no multiple of num_attention_heads 6"),
    "few kv heads": (
        GQA | {"num_attention_heads": 8},
        ["--num-attention-heads", "9", "--num-key-value-heads", "3", "--hidden-size", "288"],
        "too few: with 3 queries to each, the source needs 4",
    ),
    "tied": ({}, ["--tie"], "add --no-tie"),
    "biases": ({"attention_bias": True}, ["--hidden-size", "256"], "attention_bias"),
    "rotary": (
        {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
        ["--head-dim", "64"],
        "keep head_dim 32",
    ),
}


@pytest.mark.parametrize(("small", "arguments", "message"), REFUSED.values(), ids=REFUSED)
def test_refused(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    small: dict[str, Any],
    arguments: list[str],
    message: str,
) -> None:
    source = small_model(tmp_path / "small", **small)
    assert command.main([str(source), str(tmp_path / "wide"), *arguments]) == 1
    line = next(x for x in capsys.readouterr().err.splitlines() if x.startswith("widen: error"))
    assert message in line
    assert [p.name for p in tmp_path.iterdir()] == ["small"]


def test_refused_source_and_place(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    qwen = save_tiny_model(tmp_path / "qwen", "Qwen2ForCausalLM")
    source = small_model(tmp_path / "small", **GQA)
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").touch()
    for folder, output, message in (
        (qwen, "new", "only Llama can be widened"),
        (tmp_path, "new", "config.json does not exist"),
        (source, "taken", "exists already"),
    ):
        assert command.main([str(folder), str(tmp_path / output)]) == 1
        assert message in capsys.readouterr().err


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [str(DEMO_MODEL), str(tmp_path / "wide"), "--hidden-size", "512"]
    assert command.main([*arguments, "--dtype", "float32", "--no-tie"]) == 0
    assert "8 layers of 512" in capsys.readouterr().out
    config = json.loads((tmp_path / "wide" / "config.json").read_text())
    assert (config["dtype"], config["tie_word_embeddings"]) == ("float32", False)
    card = (tmp_path / "wide" / "README.md").read_text()
    assert f"source_fingerprint: `{target_fingerprint(DEMO_MODEL)}`" in card
    for name in ("tokenizer.json", "generation_config.json", "chat_template.jinja"):
        assert (tmp_path / "wide" / name).read_bytes() == (DEMO_MODEL / name).read_bytes()
