"""Widened models compute the small model's function, and so do their heads."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.widen import __main__ as command
from benchmarks.widen import build, plan
from benchmarks.widen import target as widen_target
from benchmarks.widen.plan import PRESETS, Channels, Plan, Shape, choose_channels
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
    grow = shape.pop("grow_draft_vocab", False)
    wide = Shape(**vars(Shape.of(build.read_config(source))) | shape)
    build.widen(source, output, wide, dtype, grow_draft_vocab=grow)
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


def assert_same_heads(source: Path, output: Path) -> None:
    small, wide = (head_outputs(folder, random_rows()) for folder in (source, output))
    for theirs, mine in zip(small, wide, strict=True):
        assert mine.keys() == theirs.keys()
        assert_same_logits(theirs.pop("logits"), mine.pop("logits"))
        for name in mine:
            torch.testing.assert_close(mine[name], theirs[name], **TOLERANCE, msg=name)


TIED = {"tie_word_embeddings": True}
GQA = {"num_attention_heads": 4, "num_key_value_heads": 2}
MHA = {"num_attention_heads": 4, "num_key_value_heads": 4}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
TARGETS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    # small, wide
    "tied": (GQA | TIED, {"hidden_size": 256, "intermediate_size": 300}),
    "untied, more tokens": (GQA, {"hidden_size": 512, "vocab_size": 700}),
    "tied, more tokens": (GQA | TIED, {"hidden_size": 1024, "vocab_size": 700}),
    "tied to untied": (
        GQA | TIED,
        {"hidden_size": 512, "vocab_size": 300, "tie_word_embeddings": False},
    ),
    "more layers": (GQA, {"num_hidden_layers": 10, "hidden_size": 256}),
    "more heads": (
        GQA,
        {"hidden_size": 384, "num_attention_heads": 12, "num_key_value_heads": 3},
    ),
    "key-value heads twice": (
        GQA,
        {"hidden_size": 384, "num_attention_heads": 6, "num_key_value_heads": 6},
    ),
    "queries share": (
        MHA,
        {"hidden_size": 384, "num_attention_heads": 12, "num_key_value_heads": 4},
    ),
    "heads twice as wide": (GQA, {"head_dim": 64, "hidden_size": 512}),
    "llama3 scaling": (GQA | {"rope_parameters": LLAMA3}, {"head_dim": 96, "hidden_size": 384}),
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
    "norms not corrected": ("norm_gain", 1.0, {"hidden_size": 1024}),
    "softmax scale not corrected": ("query_scale", 1.0, {"head_dim": 64}),
    "rotary pairs in other places": ("rotary", torch.arange(32), {"head_dim": 64}),
    "LM head not corrected": ("feature_scale", 1.0, {"hidden_size": 1024}),
}


@pytest.mark.parametrize(("name", "value", "wide"), WRONG.values(), ids=WRONG)
def test_each_correction_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, value: Any, wide: dict[str, Any]
) -> None:
    source = small_model(tmp_path / "small", **GQA, **TIED)
    wide |= {"vocab_size": 300, "hidden_size": 1024}
    small = logits(source, random_rows())
    right = logits(widened(source, tmp_path / "right", **wide), random_rows())
    assert_same_logits(small, right)
    monkeypatch.setattr(Plan, name, value)
    wrong = logits(widened(source, tmp_path / "wrong", **wide), random_rows())
    with pytest.raises(AssertionError, match="not close"):
        assert_same_logits(small, wrong)


def test_rounded_weights_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """bfloat16 weights: no rounding of a weight is seen."""
    source = small_model(tmp_path / "small", **GQA)
    AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16).save_pretrained(source)
    rows = random_rows()
    reference = logits(source, rows, torch.float64)

    def error(name: str) -> float:
        shape: dict[str, Any] = {"hidden_size": 2048, "head_dim": 64, "vocab_size": 300}
        output = widened(source, tmp_path / name, **shape)
        assert build.read_config(output).dtype == torch.bfloat16
        wide = logits(output, rows, torch.float64)
        return float((wide[..., :VOCAB] - reference).abs().max())

    exact = error("exact")
    # With a single copy of the state, what rounding drops of the query projection has no place.
    single = Channels(128, 2048, copies=1, scale=4.0, constant=128)
    monkeypatch.setattr(plan, "choose_channels", lambda *_: single)
    rounded = error("rounded")
    assert exact < 1e-3
    assert rounded > 20 * exact


HEADS: dict[str, dict[str, Any]] = {
    "full, before": {"transform": "full", "norm": "before", "gate": True},
    "full, after": {"transform": "full", "norm": "after", "gate": True},
    "identity, after": {"transform": "identity", "norm": "after", "gate": True},
    "low rank, after": {"transform": "low_rank", "rank": 8, "norm": "after"},
    "low rank, before": {"transform": "low_rank", "rank": 8, "norm": "before"},
    "draft vocabulary": {
        "transform": "full",
        "norm": "before",
        "gate": True,
        "draft_vocab_size": 64,
    },
}
WIDE_HEADS: dict[str, Any] = {"hidden_size": 1024, "vocab_size": 300, "num_hidden_layers": 9}


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("fields", HEADS.values(), ids=HEADS)
def test_same_heads(tmp_path: Path, fields: dict[str, Any], tied: bool) -> None:
    source = small_model(tmp_path / "small", **GQA, tie_word_embeddings=tied)
    small = small_heads(source, **fields)
    output = widened(source, tmp_path / "wide", **WIDE_HEADS)
    config = HeadsConfig.load(output / "adadecode")
    check_fits(config, **WIDE_HEADS, target_path=output)
    assert config.exit_layers == tuple(e * 9 // 6 for e in EXITS)
    assert (config.thresholds, config.transform) == (small.thresholds, small.transform)
    assert_same_heads(source, output)


def test_draft_vocabulary_keeps_its_share(tmp_path: Path) -> None:
    """The same head outputs for the small one's tokens, from a quarter of the wide LM head."""
    source = small_model(tmp_path / "small", **GQA, **TIED)
    small_heads(source, **HEADS["draft vocabulary"])
    kept = widened(source, tmp_path / "kept", **WIDE_HEADS)
    grown = widened(source, tmp_path / "grown", grow_draft_vocab=True, **WIDE_HEADS)
    ids = []
    for folder, size in ((kept, 64), (grown, 75)):
        config = HeadsConfig.load(folder / "adadecode")
        found = load_draft_vocab(folder / "adadecode", config)
        assert found is not None
        assert (config.draft_vocab_size, len(found)) == (size, size)
        ids.append(found.tolist())
    assert ids[1] == ids[0] + list(range(VOCAB, VOCAB + 11))
    assert_same_heads(source, grown)


def test_demo_target(tmp_path: Path, engines: EnginePool, prompts: list[str]) -> None:
    """In the engine: same tokens, same draft tokens with the same fate, on a wider and deeper
    copy."""
    shape: dict[str, Any] = {"hidden_size": 1024, "head_dim": 128, "vocab_size": 3000}
    shape |= {"num_attention_heads": 8, "num_key_value_heads": 4}
    shape |= {"num_hidden_layers": 3 * build.read_config(DEMO_MODEL).num_hidden_layers // 2}
    output = widened(DEMO_MODEL, tmp_path / "wide", torch.float32, **shape)
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


# --- shapes, layout and files ------------------------------------------------------------------


@pytest.mark.parametrize("name", PRESETS)
def test_presets_can_be_reached_from_the_demo_target(name: str) -> None:
    small = Shape.of(build.read_config(DEMO_MODEL))
    channels = choose_channels(small.hidden_size, PRESETS[name].hidden_size, True)
    assert channels.constant is not None
    assert channels.copies * small.hidden_size <= channels.constant < channels.wide


def test_shape_counts_what_is_stored(tmp_path: Path) -> None:
    source = small_model(tmp_path / "small", **GQA)
    output = widened(source, tmp_path / "wide", hidden_size=512, vocab_size=300)
    model = AutoModelForCausalLM.from_pretrained(output)
    shape = Shape.of(model.config)
    assert shape.weights == model.num_parameters()
    assert shape.layer_weights == sum(p.numel() for p in model.model.layers[0].parameters())
    index = json.loads((output / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == build.total_bytes(shape, torch.float32)
    stored = {n: t for f in output.glob("*.safetensors") for n, t in load_file(f).items()}
    assert stored.keys() == index["weight_map"].keys()
    # Llama 3.2 3B and Llama 3.1 8B have these numbers of parameters.
    assert (PRESETS["3b"].weights, PRESETS["8b"].weights) == (3_212_749_824, 8_030_261_248)


def test_files_with_holes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Values across the pieces in which a file is written, and zeros that take no disk."""
    monkeypatch.setattr(widen_target, "CHUNK_BYTES", 100)
    matrix = torch.zeros(50, 7, dtype=torch.bfloat16)
    matrix[4:40:4, [0, 6, 3]] = torch.randn(9, 3).bfloat16()
    tensors = {"m": matrix, "v": torch.randn(30), "e": torch.zeros(1 << 18, dtype=torch.bfloat16)}
    done: list[int] = []
    widen_target.write(tmp_path / "file", tensors, done.append)
    stored = load_file(tmp_path / "file")
    assert all(torch.equal(stored[name], tensor) for name, tensor in tensors.items())
    assert sum(done) == sum(tensor.nbytes for tensor in tensors.values())
    assert (tmp_path / "file").stat().st_blocks * 512 < tensors["e"].nbytes


def test_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = small_model(tmp_path / "small", **GQA)

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    for broken in ("write", "_card"):
        with monkeypatch.context() as patched:
            patched.setattr(f"benchmarks.widen.build.{broken}", full)
            with pytest.raises(OSError, match="No space"):
                widened(source, tmp_path / "out" / "wide", hidden_size=256)
        assert not list((tmp_path / "out").iterdir())


# --- what can't be done ------------------------------------------------------------------------

REFUSED: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "narrower": (GQA, {"hidden_size": 64}, "must be a multiple of 128"),
    "no room": (GQA, {"vocab_size": 300}, "multiple of 512 where the vocabulary grows"),
    "shallower": (GQA, {"num_hidden_layers": 5}, "num_hidden_layers 6, to 5"),
    "odd heads": (GQA, {"head_dim": 33}, "head_dim 32, to 33"),
    "few kv heads": (
        GQA | {"num_attention_heads": 8},
        {"num_attention_heads": 9, "num_key_value_heads": 3, "hidden_size": 1152},
        "4 key-value heads needed, to 3",
    ),
    "tied": ({}, TIED, "an LM head of its own"),
    "biases": ({"attention_bias": True}, {"hidden_size": 256}, "biases"),
    "rotary": (
        {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
        {},
        "rotary scaling 'dynamic'",
    ),
}


@pytest.mark.parametrize(("small", "wide", "message"), REFUSED.values(), ids=REFUSED)
def test_refused(tmp_path: Path, small: dict[str, Any], wide: dict[str, Any], message: str) -> None:
    source = small_model(tmp_path / "small", **small)
    with pytest.raises(AdaDecodeError, match=message):
        widened(source, tmp_path / "wide", **wide)
    assert [p.name for p in tmp_path.iterdir()] == ["small"]


def test_refused_source_and_place(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    qwen = save_tiny_model(tmp_path / "qwen", "Qwen2ForCausalLM")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").touch()
    for folder, output, message in (
        (qwen, "new", "only Llama can be widened"),
        (tmp_path, "new", "config.json does not exist"),
        (DEMO_MODEL, "taken", "exists already"),
    ):
        assert command.main([str(folder), str(tmp_path / output), "--shape", "cpu"]) == 2
        assert message in capsys.readouterr().err


def test_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(PRESETS, "cpu", Shape(512, 704, 8, 4, 2, 64, 2048, False))
    arguments = [str(DEMO_MODEL), str(tmp_path / "wide"), "--shape", "cpu", "--dtype", "float32"]
    assert command.main(arguments) == 0
    assert "8 layers of 512" in capsys.readouterr().out
    config = json.loads((tmp_path / "wide" / "config.json").read_text())
    assert (config["dtype"], config["tie_word_embeddings"]) == ("float32", False)
    card = (tmp_path / "wide" / "README.md").read_text()
    assert f"source_fingerprint: `{target_fingerprint(DEMO_MODEL)}`" in card
    for name in ("tokenizer.json", "generation_config.json", "chat_template.jinja"):
        assert (tmp_path / "wide" / name).read_bytes() == (DEMO_MODEL / name).read_bytes()
