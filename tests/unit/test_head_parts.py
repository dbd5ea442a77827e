"""The optional parts of heads: gate, draft vocabulary, quantisation; module and file."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load as read_safetensors
from safetensors.torch import save_file
from torch.nn import functional

from tests.support.heads_samples import HIDDEN, VOCAB, edit_config, heads_fields, make_heads
from vllm_adadecode.errors import AdaDecodeError
from vllm_adadecode.heads import (
    HeadsConfig,
    check_weights,
    head_tensors,
    load_draft_vocab,
    load_heads,
    save_heads,
)
from vllm_adadecode.heads import (
    make_heads as new_heads,
)
from vllm_adadecode.heads.checkpoint import _weights_key

# `_weights_key` of `heads_fields()` before there were gates and draft vocabularies.
OLD_KEY = "a070e18865e26cf9842c6b67b8fd58317196457cfcd5fd261f843e0eab8fd062"
# Every optional part at once.
ALL_PARTS: dict[str, Any] = {
    "gate": True,
    "gate_threshold": [0.25, 0.5],
    "draft_vocab_size": 16,
    "lm_head_quantization": "int8",
}


def complaint(error: pytest.ExceptionInfo[AdaDecodeError]) -> str:
    message = str(error.value)
    assert "\n" not in message
    return message


def load_all(folder: Path, config: HeadsConfig) -> Any:
    return load_heads(folder, config, torch.float32, "cpu")


def rms_norm(x: torch.Tensor) -> torch.Tensor:
    return functional.rms_norm(x, (HIDDEN,), 1.0 + torch.arange(HIDDEN) / HIDDEN, 1e-5)


# --- the module --------------------------------------------------------------------------------


def test_round_trip(tmp_path: Path) -> None:
    folder, config, tensors = make_heads(tmp_path / "heads", **ALL_PARTS)
    assert {"exit_1.gate_weight", "exit_3.other_bias", "draft_vocab"} < tensors.keys()
    heads = load_heads(folder, config, torch.float32, "cpu")
    ids = load_draft_vocab(folder, config)
    assert ids is not None
    assert torch.equal(ids, tensors["draft_vocab"])
    stored = head_tensors(heads) | {"draft_vocab": ids}
    assert stored.keys() == tensors.keys()
    assert all(torch.equal(stored[name], tensor) for name, tensor in tensors.items())
    assert not any(p.requires_grad for head in heads.values() for p in head.parameters())
    check_weights(folder, config)


def test_the_maths_of_a_head(tmp_path: Path) -> None:
    folder, config, tensors = make_heads(tmp_path / "heads", **ALL_PARTS)
    head = load_heads(folder, config, torch.float32, "cpu")[3]
    h = torch.randn(5, HIDDEN) * torch.tensor([1e-2, 1.0, 10.0, 1e3, 1.0])[:, None]
    # Not `rms_norm`: the gate's norm has no weight.
    normed = h / (h.double().pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()
    gate = normed @ tensors["exit_3.gate_weight"].double() + tensors["exit_3.gate_bias"].double()
    torch.testing.assert_close(head.gate_logit(h), gate.float(), rtol=1e-4, atol=1e-4)
    x = head.features(h, rms_norm)
    other = x @ tensors["exit_3.other_weight"] + tensors["exit_3.other_bias"]
    torch.testing.assert_close(head.other_logit(x), other)


@pytest.mark.parametrize("norm", ["before", "after"])
def test_features(tmp_path: Path, norm: str) -> None:
    folder, config, tensors = make_heads(tmp_path / "heads", norm=norm)
    head = load_heads(folder, config, torch.float32, "cpu")[1]
    down, up = tensors["exit_1.down"], tensors["exit_1.up"]

    def apply(h: torch.Tensor) -> torch.Tensor:
        return h + h @ down.T @ up.T

    h = torch.randn(5, HIDDEN)
    expected = apply(rms_norm(h)) if norm == "before" else rms_norm(apply(h))
    torch.testing.assert_close(head.features(h, rms_norm), expected, rtol=1e-4, atol=1e-4)


def test_without_parts() -> None:
    head = new_heads(HeadsConfig(**heads_fields()), torch.float32, "cpu")[1]
    h = torch.randn(2, HIDDEN)
    assert head.gate_logit(h) is None
    assert head.other_logit(h) is None


def test_small_parts_stay_float32(tmp_path: Path) -> None:
    folder, config, tensors = make_heads(tmp_path / "heads", **ALL_PARTS)
    head = load_heads(folder, config, torch.bfloat16, "cpu")[1]
    dtypes = {name: p.dtype for name, p in head.named_parameters()}
    assert dtypes["transform.up"] == torch.bfloat16
    assert torch.equal(head.gate_weight, tensors["exit_1.gate_weight"])
    assert torch.equal(head.other_bias, tensors["exit_1.other_bias"])
    h = torch.randn(2, HIDDEN, dtype=torch.bfloat16)
    gate = head.gate_logit(h)
    assert gate is not None
    assert (gate.dtype, gate.shape) == (torch.float32, (2,))


def test_new_heads_have_gradients_everywhere() -> None:
    config = HeadsConfig(**heads_fields(**ALL_PARTS))
    head = new_heads(config, torch.float32, "cpu")[1]
    h = torch.randn(4, HIDDEN)
    x = head.features(h, rms_norm)
    gate, other = head.gate_logit(h), head.other_logit(x)
    assert gate is not None
    assert other is not None
    assert gate.sigmoid().eq(0.5).all()
    (x.sum() + gate.sum() + other.sum()).backward()
    assert all(p.grad is not None for p in head.parameters())


# --- the file ----------------------------------------------------------------------------------


def test_parameters_are_counted(tmp_path: Path) -> None:
    _, config, tensors = make_heads(tmp_path / "heads", **ALL_PARTS)
    del tensors["draft_vocab"]
    assert config.num_parameters == sum(t.numel() for t in tensors.values())


def test_select_carries_the_parts(tmp_path: Path) -> None:
    folder, config, tensors = make_heads(tmp_path / "heads", **ALL_PARTS)
    part = config.select([3])
    assert part.gate_thresholds == (0.5,)
    assert (part.draft_vocab_size, part.lm_head_quantization) == (16, "int8")
    heads = load_heads(folder, part, torch.float32, "cpu")
    assert list(heads) == [3]
    assert torch.equal(heads[3].gate_weight, tensors["exit_3.gate_weight"])
    ids = load_draft_vocab(folder, part)
    assert ids is not None
    assert torch.equal(ids, tensors["draft_vocab"])
    assert HeadsConfig(**heads_fields(gate=True)).select([3]).gate_thresholds == (0.5,)


def test_checkpoints_from_before_the_parts() -> None:
    # Computed by the version that had none of them.
    config = HeadsConfig(**heads_fields())
    assert _weights_key(config) == OLD_KEY
    assert config.gate_thresholds is None
    assert (config.draft_vocab_size, config.lm_head_quantization) == (None, None)


def test_settings_may_be_edited_by_hand(tmp_path: Path) -> None:
    folder, _, _ = make_heads(tmp_path / "heads", **ALL_PARTS)
    edit_config(folder, gate_threshold=0.9, lm_head_quantization=None)
    config = HeadsConfig.load(folder)
    assert config.gate_thresholds == (0.9, 0.9)
    load_heads(folder, config, torch.float32, "cpu")


def test_identity_heads_with_a_gate_have_a_file(tmp_path: Path) -> None:
    parts = {"transform": "identity", "rank": None, "gate": True}
    folder, config, _ = make_heads(tmp_path / "heads", **parts)
    load_heads(folder, config, torch.float32, "cpu")
    (folder / "model.safetensors").unlink()
    for load_or_check in (
        lambda: load_heads(folder, config, torch.float32, "cpu"),
        lambda: check_weights(folder, config),
    ):
        with pytest.raises(AdaDecodeError, match="does not exist: copy the whole folder"):
            load_or_check()


def test_logit_lens_may_be_quantised() -> None:
    config = HeadsConfig(
        **heads_fields(transform="identity", rank=None, lm_head_quantization="int8")
    )
    load_heads(None, config, torch.float32, "cpu")
    assert load_draft_vocab(None, config) is None


def test_heads_without_weights_do_not_lie_beside_those_of_others(tmp_path: Path) -> None:
    folder, config, _ = make_heads(tmp_path / "heads", transform="identity", rank=None)
    assert load_heads(folder, config, torch.float32, "cpu").keys() == {1, 3}
    other, _, _ = make_heads(tmp_path / "other")
    shutil.copy(other / "model.safetensors", folder)
    with pytest.raises(AdaDecodeError, match=r"has the unexpected exit_1\.down"):
        check_weights(folder, config)
    with pytest.raises(AdaDecodeError, match=r"has the unexpected exit_1\.down"):
        load_heads(folder, config, torch.float32, "cpu")


BAD_TENSORS = [
    ({"exit_3.up": None}, "lacks exit_3.up"),
    ({"exit_2.up": torch.ones(1)}, "has the unexpected exit_2.up"),
    ({"exit_3.up": torch.ones(HIDDEN, 5)}, "exit_3.up has shape [64, 5], config.json says [64, 4]"),
    ({"exit_3.up": torch.ones(HIDDEN, 4).char()}, "exit_3.up is torch.int8, not floating point"),
    ({"exit_1.down": torch.full((4, HIDDEN), torch.inf)}, "exit_1.down has NaN or infinite values"),
    ({"exit_3.gate_bias": None}, "lacks exit_3.gate_bias"),
    ({"draft_vocab": None}, "lacks draft_vocab"),
    ({"exit_1.gate_weight": torch.zeros(HIDDEN + 1)}, "exit_1.gate_weight has shape [65]"),
    ({"exit_1.other_bias": torch.zeros(())}, "exit_1.other_bias has shape []"),
    ({"draft_vocab": torch.arange(15)}, "draft_vocab has shape [15], config.json says [16]"),
    ({"draft_vocab": torch.arange(16).int()}, "draft_vocab is torch.int32, not int64"),
    ({"draft_vocab": torch.arange(16.0)}, "draft_vocab is torch.float32, not int64"),
    ({"draft_vocab": torch.arange(16).flip(0)}, "draft_vocab is not strictly increasing"),
    ({"draft_vocab": torch.zeros(16).long()}, "draft_vocab is not strictly increasing"),
    ({"draft_vocab": torch.arange(-1, 15)}, "draft_vocab has ids outside the target's 128"),
    ({"draft_vocab": torch.arange(VOCAB - 15, VOCAB + 1)}, "draft_vocab has ids outside"),
    ({"exit_3.gate_weight": torch.full((HIDDEN,), torch.nan)}, "exit_3.gate_weight has NaN"),
    ({"exit_3.other_bias": torch.tensor([torch.inf])}, "exit_3.other_bias has NaN or infinite"),
]


@pytest.mark.parametrize(("changes", "message"), BAD_TENSORS, ids=lambda v: str(v)[:40])
def test_bad_tensors(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    """Refused when they are saved, and when they are read; from the header, where that says it."""
    folder, config, tensors = make_heads(tmp_path / "heads", **ALL_PARTS)
    wrong = {n: t for n, t in (tensors | changes).items() if t is not None}
    with pytest.raises(AdaDecodeError) as error:
        save_heads(tmp_path / "new", config, wrong)
    assert message in complaint(error)
    assert not (tmp_path / "new").exists()
    save_file(wrong, folder / "model.safetensors")
    load = load_draft_vocab if message.startswith("draft_vocab") else load_all
    with pytest.raises(AdaDecodeError) as error:
        load(folder, config)
    assert message in complaint(error)
    assert str(folder / "model.safetensors") in complaint(error)
    # What only the values show is left to loading.
    if "NaN" not in message and "int8" not in message:
        with pytest.raises(AdaDecodeError) as error:
            check_weights(folder, config)
        assert message in complaint(error)


def test_parts_of_two_saves(tmp_path: Path) -> None:
    """Same shapes, but another draft vocabulary size in the config beside them."""
    folder, _, _ = make_heads(tmp_path / "heads", **ALL_PARTS)
    edit_config(folder, draft_vocab_size=17)
    with pytest.raises(AdaDecodeError, match="was not saved with the config"):
        check_weights(folder, HeadsConfig.load(folder))


def test_info_names_the_parts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from vllm_adadecode.cli import main

    folder, config, _ = make_heads(tmp_path / "heads", **ALL_PARTS)
    main(["info", str(folder), "--json"])
    report = json.loads(capsys.readouterr().out)
    assert report["gate_threshold"] == [0.25, 0.5]
    assert report["draft_vocab_size"] == 16
    assert report["lm_head_quantization"] == "int8"
    assert report["num_parameters"] == config.num_parameters
    main(["info", str(folder)])
    text = capsys.readouterr().out
    told = ("0.25, 0.5", "16 of 128 tokens", "int8, a scale per row", "identity + rank 4")
    assert all(part in text for part in told)


def test_a_draft_vocabulary_out_of_order_does_not_pass_info(tmp_path: Path) -> None:
    from vllm_adadecode.cli.info import make_report

    folder, _, _ = make_heads(tmp_path / "heads", **ALL_PARTS)
    tensors = read_safetensors((folder / "model.safetensors").read_bytes())
    save_file(tensors | {"draft_vocab": torch.zeros(16).long()}, folder / "model.safetensors")
    assert [c.ok for c in make_report(str(folder)).checks if c.name == "weights"] == [False]
