"""Heads checkpoints: the format, the weights, recognising targets, and every error message."""

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load, save_file

from tests.support.heads_samples import (
    HIDDEN,
    LAYERS,
    VOCAB,
    edit_config,
    heads_fields,
    make_heads,
    make_target,
    random_tensors,
)
from vllm_adadecode.errors import AdaDecodeError
from vllm_adadecode.heads import (
    HeadsConfig,
    check_fits,
    check_weights,
    find_heads,
    find_mismatches,
    load_configured_heads,
    load_heads,
    save_heads,
    target_fingerprint,
)
from vllm_adadecode.heads import make_heads as new_heads
from vllm_adadecode.heads.target import read_target, tensor_files

SHAPE: dict[str, Any] = {"hidden_size": HIDDEN, "vocab_size": VOCAB, "num_hidden_layers": LAYERS}


def verifier(**speculators: Any) -> dict[str, Any]:
    return {"verifier": {"name_or_path": ".."}, **speculators}


def read_tensors(file: Path) -> dict[str, torch.Tensor]:
    """Tensors in memory of their own: the file is about to be written over."""
    return load(file.read_bytes())


def complaint(error: pytest.ExceptionInfo[AdaDecodeError]) -> str:
    """The message, which is one line whatever went wrong."""
    message = str(error.value)
    assert "\n" not in message
    return message


# --- config ------------------------------------------------------------------------------------

WRONG_FIELDS = [
    ({"exit_layers": [3, 1]}, "exit_layers must be strictly increasing"),
    ({"exit_layers": [1, 1]}, "exit_layers must be strictly increasing"),
    ({"exit_layers": [1, 4]}, "exit layer 4 is out of range: the target has 4 layers"),
    ({"exit_layers": [0, 3]}, "layer numbers from 1 up"),
    ({"exit_layers": [-1, 3]}, "layer numbers from 1 up"),
    ({"exit_layers": [True, 3]}, "layer numbers from 1 up"),
    ({"exit_layers": [1.0, 3.0]}, "layer numbers from 1 up"),
    ({"exit_layers": []}, "layer numbers from 1 up"),
    ({"exit_layers": "13"}, "layer numbers from 1 up"),
    ({"exit_layers": None}, "layer numbers from 1 up"),
    ({"confidence_threshold": 1.01}, r"confidence_threshold must lie in [0, 1], not 1.01"),
    ({"confidence_threshold": -0.1}, r"must lie in [0, 1]"),
    ({"confidence_threshold": [0.5, 2]}, r"must lie in [0, 1]"),
    ({"confidence_threshold": float("nan")}, r"must lie in [0, 1]"),
    ({"confidence_threshold": True}, r"must lie in [0, 1]"),
    ({"confidence_threshold": "0.5"}, r"must lie in [0, 1]"),
    ({"confidence_threshold": [0.5]}, "1 values for 2 exit layers"),
    ({"confidence_threshold": []}, "0 values for 2 exit layers"),
    ({"confidence_treshold": 0.5}, "confidence_treshold is an unknown key"),
    ({"transform": "adapter"}, "transform: input should be 'identity', 'full' or 'low_rank', not"),
    ({"rank": None}, "low_rank needs a rank"),
    ({"rank": 0}, "rank: input should be greater than 0"),
    ({"rank": HIDDEN}, "rank 64 must be below the hidden size 64"),
    ({"transform": "full"}, "rank is for transform low_rank, not for full"),
    ({"gate": 1}, "gate: input should be a valid boolean, not 1"),
    ({"gate": True, "gate_threshold": 1.5}, "gate_threshold must lie in [0, 1], not 1.5"),
    ({"gate": True, "gate_threshold": [0.5]}, "gate_threshold has 1 values for 2 exit layers"),
    ({"gate": True, "gate_threshold": None}, "gate_threshold must lie in [0, 1], not None"),
    ({"gate_threshold": 0.2}, "gate_threshold is for heads with a gate"),
    ({"draft_vocab_size": 0}, "draft_vocab_size: input should be greater than 0"),
    ({"draft_vocab_size": 8.0}, "draft_vocab_size: input should be a valid integer"),
    ({"draft_vocab_size": VOCAB + 1}, "draft_vocab_size 129 is more than the target's 128 tokens"),
    ({"lm_head_quantization": "fp8"}, "lm_head_quantization: input should be 'int8', not 'fp8'"),
    ({"norm": "none"}, "norm: input should be 'before' or 'after', not 'none'"),
    ({"target": SHAPE | {"hidden_size": 0}}, "target.hidden_size: input should be greater than 0"),
    ({"target": SHAPE | {"fingerprint": "md5:1"}}, "target.fingerprint: string should match"),
    ({"target": {"hidden_size": HIDDEN}}, "target.vocab_size is missing"),
    ({"architectures": ["LlamaForCausalLM"]}, "input should be 'AdaDecodeHeads'"),
    ({"speculators_model_type": "eagle3"}, "speculators_model_type: input should be 'adadecode'"),
    ({"speculators_config": {}}, "speculators_config.verifier is missing"),
    ({"speculators_config": {"verifier": {"name_or_path": ""}}}, "at least 1 character"),
    (
        {"speculators_config": verifier(proposal_methods=[{"speculative_tokens": 0}])},
        "speculative_tokens: input should be greater than or equal to 1, not 0",
    ),
    (
        {"speculators_config": verifier(proposal_methods=[{"speculative_tokens": 129}])},
        "speculative_tokens: input should be less than or equal to 128",
    ),
    ({"speculators_config": verifier(proposal_methods=[])}, "proposal_methods is empty"),
]


@pytest.mark.parametrize(("changes", "message"), WRONG_FIELDS)
def test_wrong_fields_are_one_line(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(AdaDecodeError) as error:
        HeadsConfig(**heads_fields(**changes))
    assert message in complaint(error)


def test_wrong_file_is_named(tmp_path: Path) -> None:
    folder, _, _ = make_heads(tmp_path / "heads")
    edit_config(folder, exit_layers=[3, 1])
    with pytest.raises(AdaDecodeError) as error:
        HeadsConfig.load(folder)
    assert complaint(error).startswith(f"{folder / 'config.json'}: exit_layers must be strictly")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "does not exist"),
        ('{"exit_layers": [1', "can't be read as JSON"),
        ("[]", "describes no heads"),
        ('{"model_type": "llama"}', "describes no heads"),
        ('{"speculators_model_type": "eagle3"}', "describes speculators of type 'eagle3'"),
        ('{"speculators_model_type": "adadecode", "model_type": "llama"}', "top-level model_type"),
    ],
)
def test_wrong_file(tmp_path: Path, content: str | None, message: str) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(AdaDecodeError) as error:
        HeadsConfig.load(tmp_path)
    assert message in complaint(error)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"confidence_threshold": 0.6},
        {"transform": "identity", "rank": None, "norm": "after"},
        {"transform": "full", "rank": None, "norm": "before"},
        {"target": SHAPE | {"fingerprint": "sha256:" + "0" * 64}},
        {"gate": True, "gate_threshold": [0.0, 1.0]},
        {"gate": True, "draft_vocab_size": 32, "lm_head_quantization": "int8"},
    ],
)
def test_config_round_trip(tmp_path: Path, changes: dict[str, Any]) -> None:
    config = HeadsConfig(**heads_fields(**changes))
    file = tmp_path / "config.json"
    file.write_text(config.to_json())
    assert HeadsConfig.load(tmp_path) == HeadsConfig.load(file) == config
    # With a model_type vLLM would not take the folder for speculators.
    assert "model_type" not in json.loads(file.read_text())


def test_what_the_engine_reads() -> None:
    methods = [{"speculative_tokens": 7}]
    config = HeadsConfig(**heads_fields(speculators_config=verifier(proposal_methods=methods)))
    assert config.num_speculative_tokens == 7
    assert config.thresholds == (0.5, 0.75)
    assert config.num_parameters == 2 * 2 * 4 * HIDDEN
    assert HeadsConfig(**heads_fields(confidence_threshold=1)).thresholds == (1.0, 1.0)
    assert HeadsConfig(**heads_fields(speculators_config=verifier())).num_speculative_tokens == 5


def test_select() -> None:
    config = HeadsConfig(**heads_fields())
    part = config.select([3])
    assert (part.exit_layers, part.thresholds) == ((3,), (0.75,))
    assert config.select([1, 3]) == config
    with pytest.raises(AdaDecodeError) as error:
        config.select([2, 3])
    assert "no head after layer 2: these heads sit after 1, 3" in complaint(error)
    for wrong in ([3, 1], []):
        with pytest.raises(AdaDecodeError):
            config.select(wrong)


@pytest.mark.parametrize(
    ("layers", "exits"),
    [(2, (1,)), (3, (1, 2)), (4, (1, 2, 3)), (6, (1, 3, 4)), (28, (7, 14, 21)), (32, (8, 16, 24))],
)
def test_logit_lens_default_exits(layers: int, exits: tuple[int, ...]) -> None:
    config = HeadsConfig.logit_lens(HIDDEN, VOCAB, layers)
    assert config.exit_layers == exits
    assert (config.transform, config.norm, config.num_parameters) == ("identity", "after", 0)


def test_logit_lens_exits() -> None:
    assert HeadsConfig.logit_lens(HIDDEN, VOCAB, 4, exit_layers=[2]).exit_layers == (2,)
    with pytest.raises(AdaDecodeError, match="exit layer 4 is out of range"):
        HeadsConfig.logit_lens(HIDDEN, VOCAB, 4, exit_layers=[4])
    with pytest.raises(AdaDecodeError, match="no intermediate layer"):
        HeadsConfig.logit_lens(HIDDEN, VOCAB, 1)


# --- weights -----------------------------------------------------------------------------------


def test_a_matrix(tmp_path: Path) -> None:
    folder, config, tensors = make_heads(tmp_path / "heads", transform="full", rank=None)
    heads = load_heads(folder, config, torch.float32, "cpu")
    assert list(heads) == [1, 3]
    x = torch.randn(5, HIDDEN)
    for exit_layer, head in heads.items():
        torch.testing.assert_close(head.transform(x), x @ tensors[f"exit_{exit_layer}.weight"].T)
    # The engine's dtype, whatever the file's.
    transform = load_heads(folder, config, torch.bfloat16, "cpu")[1].transform
    assert torch.equal(transform.weight, tensors["exit_1.weight"].bfloat16())
    assert transform(x.bfloat16()).dtype == torch.bfloat16


def test_low_rank(tmp_path: Path) -> None:
    folder, config, tensors = make_heads(tmp_path / "heads")
    x = torch.randn(5, HIDDEN)
    for exit_layer, head in load_heads(folder, config, torch.float32, "cpu").items():
        up, down = (tensors[f"exit_{exit_layer}.{name}"] for name in ("up", "down"))
        # Sums of 64 products of size 1, in another order.
        expected = x @ (torch.eye(HIDDEN) + up @ down).T
        torch.testing.assert_close(head.transform(x), expected, rtol=1e-4, atol=1e-4)


def test_identity_has_no_file(tmp_path: Path) -> None:
    config = HeadsConfig.logit_lens(HIDDEN, VOCAB, LAYERS)
    save_heads(tmp_path, config, {})
    assert sorted(os.listdir(tmp_path)) == ["config.json"]
    x = torch.randn(2, HIDDEN)
    for folder in (tmp_path, None):
        assert torch.equal(load_heads(folder, config, torch.float32, "cpu")[2].transform(x), x)
    with pytest.raises(AdaDecodeError, match="need their folder"):
        load_heads(None, HeadsConfig(**heads_fields()), torch.float32, "cpu")


@pytest.mark.parametrize("transform", ["identity", "full", "low_rank"])
def test_new_transforms_are_the_identity(transform: str) -> None:
    rank = 4 if transform == "low_rank" else None
    config = HeadsConfig(**heads_fields(transform=transform, rank=rank))
    x = torch.randn(3, HIDDEN)
    for module in new_heads(config, torch.float32, "cpu").values():
        torch.testing.assert_close(module.transform(x), x)
        assert all(p.requires_grad for p in module.parameters())


DAMAGED = "is damaged or no safetensors file"
DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "missing": (Path.unlink, "does not exist: copy the whole folder"),
    "other format": (lambda f: f.rename(f.with_name("heads.bin")), "other formats are never read"),
    "truncated": (lambda f: f.write_bytes(f.read_bytes()[:-100]), DAMAGED),
    "truncated header": (lambda f: f.write_bytes(f.read_bytes()[:20]), DAMAGED),
    "empty": (lambda f: f.write_bytes(b""), DAMAGED),
    "of torch": (lambda f: torch.save(load(f.read_bytes()), f), DAMAGED),
    "pickle": (lambda f: f.write_bytes(pickle.dumps({"exit_1.up": [1.0]})), DAMAGED),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damaged_weights(tmp_path: Path, name: str) -> None:
    damage, message = DAMAGES[name]
    folder, config, _ = make_heads(tmp_path / "heads")
    damage(folder / "model.safetensors")
    for check in (
        lambda: check_weights(folder, config),
        lambda: load_heads(folder, config, torch.float32, "cpu"),
    ):
        with pytest.raises(AdaDecodeError) as error:
            check()
        assert message in complaint(error)
        assert str(folder / "model.safetensors") in complaint(error)
        # The libraries' own tracebacks stay out of it.
        assert error.value.__cause__ is None


def test_no_memory_is_taken_for_what_only_the_config_says(tmp_path: Path) -> None:
    folder, _, _ = make_heads(tmp_path / "heads", transform="full", rank=None)
    # A matrix of 4 TB.
    edit_config(folder, target=SHAPE | {"hidden_size": 10**6})
    with pytest.raises(AdaDecodeError) as error:
        load_heads(folder, HeadsConfig.load(folder), torch.float32, "cpu")
    assert "copy both files again" in complaint(error)


def test_pickle_is_not_executed(tmp_path: Path) -> None:
    folder, config, _ = make_heads(tmp_path / "heads")
    trap = tmp_path / "executed"

    class Trap:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(trap),)

    (folder / "model.safetensors").write_bytes(pickle.dumps(Trap()))
    with pytest.raises(AdaDecodeError):
        load_heads(folder, config, torch.float32, "cpu")
    assert not trap.exists()


def test_overflow_in_half_precision(tmp_path: Path) -> None:
    config = HeadsConfig(**heads_fields())
    tensors = random_tensors(config)
    tensors["exit_1.up"][0, 0] = 1e6
    save_heads(tmp_path, config, tensors)
    with pytest.raises(AdaDecodeError, match=r"exit_1\.up has values too large for torch.float16"):
        load_heads(tmp_path, config, torch.float16, "cpu")
    load_heads(tmp_path, config, torch.bfloat16, "cpu")


def test_files_of_two_saves(tmp_path: Path) -> None:
    # Same tensors by name and shape, but trained with the norm elsewhere.
    first, config, _ = make_heads(tmp_path / "first")
    second, _, _ = make_heads(tmp_path / "second", norm="before")
    shutil.copy(second / "model.safetensors", first)
    with pytest.raises(AdaDecodeError, match="was not saved with the config"):
        load_heads(first, config, torch.float32, "cpu")


def test_settings_may_be_edited_by_hand(tmp_path: Path) -> None:
    target = SHAPE | {"fingerprint": "sha256:" + "0" * 64}
    folder, _, _ = make_heads(tmp_path / "heads", target=target)
    edit_config(folder, confidence_threshold=0.9, target=SHAPE | {"fingerprint": None})
    load_heads(folder, HeadsConfig.load(folder), torch.float32, "cpu")


def test_config_of_other_heads(tmp_path: Path) -> None:
    folder, _, _ = make_heads(tmp_path / "heads")
    for other in (heads_fields(exit_layers=[2, 3]), heads_fields(rank=8)):
        with pytest.raises(AdaDecodeError, match="are not those of"):
            load_heads(folder, HeadsConfig(**other), torch.float32, "cpu")


def snapshot(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.mark.parametrize("failing_call", [0, 1])
def test_failed_save_leaves_the_old_heads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing_call: int
) -> None:
    folder, config, _ = make_heads(tmp_path / "heads")
    (folder / "README.md").write_text("mine")
    before = snapshot(folder)
    calls: list[Any] = []
    replace = os.replace

    def failing_replace(*args: Any) -> None:
        calls.append(args)
        if len(calls) - 1 == failing_call:
            raise OSError("disk full")
        replace(*args)

    monkeypatch.setattr(os, "replace", failing_replace)
    other = HeadsConfig(**heads_fields(rank=8))
    with pytest.raises(OSError, match="disk full"):
        save_heads(folder, other, random_tensors(other))
    monkeypatch.undo()
    assert snapshot(folder) == before
    load_heads(folder, config, torch.float32, "cpu")


def test_saving_again(tmp_path: Path) -> None:
    folder, _, _ = make_heads(tmp_path / "heads")
    (folder / "README.md").write_text("mine")
    _, config, _ = make_heads(folder, transform="full", rank=None)
    load_heads(folder, config, torch.float32, "cpu")
    lens = HeadsConfig.logit_lens(HIDDEN, VOCAB, LAYERS)
    save_heads(folder, lens, {})
    load_heads(folder, lens, torch.float32, "cpu")
    assert sorted(os.listdir(folder)) == ["README.md", "config.json"]


def test_other_models_are_not_overwritten(tmp_path: Path) -> None:
    target = make_target(tmp_path / "target")
    before = snapshot(target)
    with pytest.raises(AdaDecodeError, match="holds another model"):
        make_heads(target)
    assert snapshot(target) == before
    (target / "config.json").unlink()
    with pytest.raises(AdaDecodeError, match="holds another model"):
        make_heads(target)


def test_load_configured_heads(tmp_path: Path) -> None:
    folder, _, _ = make_heads(tmp_path / "heads")
    given = SimpleNamespace(exit_layers=[3])
    config, heads = load_configured_heads(folder, given, torch.float32, "cpu")
    assert (config.transform, list(heads)) == ("low_rank", [3])
    model_config = SimpleNamespace(
        get_hidden_size=lambda: HIDDEN,
        get_vocab_size=lambda: VOCAB,
        get_total_num_hidden_layers=lambda: LAYERS,
    )
    none = SimpleNamespace(exit_layers=[1, 2], target_model_config=model_config)
    config, heads = load_configured_heads(None, none, torch.float32, "cpu")
    assert (config.transform, list(heads)) == ("identity", [1, 2])


# --- fingerprint -------------------------------------------------------------------------------


def test_fingerprint_of_copies(tmp_path: Path) -> None:
    single = target_fingerprint(make_target(tmp_path / "fp32"))
    assert single is not None
    assert single == target_fingerprint(make_target(tmp_path / "bf16", dtype=torch.bfloat16))
    assert single != target_fingerprint(make_target(tmp_path / "other", seed=1))


def test_fingerprint_of_a_half_precision_copy(tmp_path: Path) -> None:
    # Such a copy is made of the published bfloat16 weights, and loses bits of the smallest ones.
    file = make_target(tmp_path / "target", dtype=torch.bfloat16) / "model.safetensors"
    tensors = read_tensors(file)
    tensors["model.embed_tokens.weight"][3] = torch.logspace(-9, -1, HIDDEN)
    save_file(tensors, file)
    published = target_fingerprint(file.parent)
    save_file({name: tensor.half() for name, tensor in tensors.items()}, file)
    assert published == target_fingerprint(file.parent)


def test_fingerprint_of_shards_and_other_names(tmp_path: Path) -> None:
    target = make_target(tmp_path / "target")
    single = target_fingerprint(target)
    tensors = read_tensors(target / "model.safetensors")
    names = sorted(tensors)
    half = len(names) // 2
    for prefix in ("model.", "model.language_model.", "language_model.model.", ""):
        folder = tmp_path / f"shards-{prefix}"
        folder.mkdir()
        weight_map: dict[str, str] = {}
        for number, part in enumerate((names[:half], names[half:])):
            renamed = {name.replace("model.", prefix, 1): tensors[name] for name in part}
            save_file(renamed, folder / f"model-{number}.safetensors")
            weight_map |= dict.fromkeys(renamed, f"model-{number}.safetensors")
        # Without an index first, as a folder of loose files.
        assert target_fingerprint(folder) == single
        index = folder / "model.safetensors.index.json"
        index.write_text(json.dumps({"weight_map": weight_map}))
        assert target_fingerprint(folder) == single


def test_fingerprint_sees_the_norm_and_the_embedding(tmp_path: Path) -> None:
    target = make_target(tmp_path / "target")
    single = target_fingerprint(target)
    for name in ("model.norm.weight", "model.embed_tokens.weight"):
        tensors = read_tensors(target / "model.safetensors")
        tensors[name] = tensors[name] * 1.05
        folder = tmp_path / name
        folder.mkdir()
        save_file(tensors, folder / "model.safetensors")
        assert target_fingerprint(folder) != single


def test_no_fingerprint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    assert target_fingerprint(tmp_path) is None
    assert target_fingerprint("nobody/not-in-the-cache") is None
    assert target_fingerprint("/no/such/folder") is None
    (tmp_path / "model.safetensors").write_bytes(b"damaged")
    assert target_fingerprint(tmp_path) is None
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    assert target_fingerprint(tmp_path) is None


@pytest.mark.parametrize("name", ["../other.safetensors", "/other.safetensors", "..", "", 1, None])
def test_an_index_names_files_of_its_folder(tmp_path: Path, name: Any) -> None:
    target, other = make_target(tmp_path / "target"), tmp_path / "other.safetensors"
    shutil.move(target / "model.safetensors", other)
    if name == "/other.safetensors":
        name = str(other)
    weight_map = dict.fromkeys(("model.norm.weight", "model.embed_tokens.weight"), name)
    (target / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(AdaDecodeError) as error:
        tensor_files(target)
    assert "does not name a file of this folder" in complaint(error)
    assert target_fingerprint(target) is None


@pytest.mark.parametrize(
    "config",
    [[], 1, SHAPE | {"hidden_size": 1e999}, SHAPE | {"architectures": 1}, {"text_config": 1}],
)
def test_no_config_of_a_target(tmp_path: Path, config: Any) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(AdaDecodeError) as error:
        read_target(tmp_path)
    assert "not the config of a decoder-only" in complaint(error)


# --- finding and matching ----------------------------------------------------------------------


def test_find_heads(tmp_path: Path) -> None:
    target = make_target(tmp_path / "target")
    assert find_heads(None, str(target)) is None
    beside, _, _ = make_heads(target / "adadecode")
    given, _, _ = make_heads(tmp_path / "given")
    assert find_heads(None, str(target)) == beside
    assert find_heads(str(given), str(target)) == given


def test_find_heads_errors(tmp_path: Path) -> None:
    target = make_target(tmp_path / "target")
    wrong = {
        str(target): "holds no AdaDecode heads",
        str(tmp_path / "absent"): "there is no such folder",
        str(target / "config.json"): "is a file: give the folder",
        "./absent": "there is no such folder",
    }
    for model, message in wrong.items():
        with pytest.raises(AdaDecodeError) as error:
            find_heads(model, str(target))
        assert message in complaint(error)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": 128}, "hidden size (heads: 64, target: 128)"),
        ({"vocab_size": 256}, "vocabulary (heads: 128, target: 256)"),
        ({"num_hidden_layers": 6}, "layer count (heads: 4, target: 6)"),
        ({"num_hidden_layers": 3}, "exit layer out of range (heads: 3, target: at most 2)"),
    ],
)
def test_heads_of_another_shape(change: dict[str, int], message: str) -> None:
    config = HeadsConfig(**heads_fields())
    with pytest.raises(AdaDecodeError) as error:
        check_fits(config, **(SHAPE | change), target_path="some/target")
    assert message in complaint(error)
    assert complaint(error).endswith("train some: adadecode train some/target")


def test_every_mismatch_is_named() -> None:
    config = HeadsConfig(**heads_fields())
    found = find_mismatches(
        config, hidden_size=1, vocab_size=2, num_hidden_layers=3, fingerprint=None
    )
    assert [m.what for m in found] == [
        "hidden size",
        "vocabulary",
        "layer count",
        "exit layer out of range",
    ]


def test_heads_of_another_model_of_this_shape(tmp_path: Path) -> None:
    target, other = make_target(tmp_path / "target"), make_target(tmp_path / "other", seed=1)
    fields = heads_fields(target=SHAPE | {"fingerprint": target_fingerprint(target)})
    config = HeadsConfig(**fields)
    assert check_fits(config, **SHAPE, target_path=target)
    with pytest.raises(AdaDecodeError) as error:
        check_fits(config, **SHAPE, target_path=other)
    assert "fingerprint (heads: " in complaint(error)
    assert "set target.fingerprint to null" in complaint(error)
    # Nothing to compare with is no mismatch, but said.
    assert not check_fits(config, **SHAPE, target_path=tmp_path)
    assert check_fits(HeadsConfig(**heads_fields()), **SHAPE, target_path=other)
