"""The loss against its plain formula in float64, and chunked training against unchunked."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.support.training_samples import VOCAB, distributions, random_sequences, tiny_target
from vllm_adadecode.errors import AdaDecodeError
from vllm_adadecode.training.batches import TokenRow, token_rows
from vllm_adadecode.training.distributions import Distributions, kl
from vllm_adadecode.training.target_model import FrozenTarget, load_target, load_tokenizer
from vllm_adadecode.training.trainer import TrainSettings, accumulate_gradients, evaluate

# Logits of different sharpness: in float32 all but the likeliest class vanish in the last.
SHARPNESS = [0.1, 1.0, 10.0, 200.0]


def log_probs(seed: int, scale: float, classes: int = 12) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(6, classes, dtype=torch.float64, generator=generator)
    return logits.log_softmax(-1)


def plain(p: torch.Tensor, q: torch.Tensor) -> list[float]:
    """By loops over classes, from the definition."""
    return [
        float(sum(a.exp() * (a - b) for a, b in zip(*pair, strict=True) if a.exp() > 0))
        for pair in zip(p, q, strict=True)
    ]


@pytest.mark.parametrize("scale", SHARPNESS[:3])
def test_the_loss_is_its_formula(scale: float) -> None:
    head, final = log_probs(1, scale), log_probs(2, scale)
    found = kl(final.float(), head.float())
    # Sums of twelve float32 terms.
    torch.testing.assert_close(found, torch.tensor(plain(final, head)), rtol=1e-4, atol=1e-6)
    assert (found > -1e-6).all()
    torch.testing.assert_close(kl(head, head), torch.zeros(6).double())


@pytest.mark.parametrize("scale", SHARPNESS)
def test_gradients_are_finite_when_saturated(scale: float) -> None:
    logits = scale * torch.randn(6, 12, generator=torch.Generator().manual_seed(0))
    logits.requires_grad_()
    saturated = log_probs(2, 200.0).float()
    # A class of probability 0 to the last bit.
    saturated[:, -1] = float("-inf")
    for final in (saturated, log_probs(3, 0.1).float()):
        loss = kl(final, logits.log_softmax(-1))
        (gradient,) = torch.autograd.grad(loss.sum(), logits)
        assert torch.isfinite(loss).all()
        assert torch.isfinite(gradient).all()


def test_a_head_that_is_far_off_is_pulled_back() -> None:
    logits = torch.tensor([[0.0, 1000.0]], requires_grad=True)
    final = torch.tensor([[0.0, -50.0]]).log_softmax(-1)
    (gradient,) = torch.autograd.grad(kl(final, logits.log_softmax(-1)).sum(), logits)
    torch.testing.assert_close(gradient, torch.tensor([[-1.0, 1.0]]))


# --- chunks ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> FrozenTarget:
    return load_target(tiny_target(tmp_path_factory.mktemp("target") / "t"), torch.float32)


@pytest.fixture
def rows() -> list[TokenRow]:
    return token_rows(random_sequences(7), 64)


def scattered(parts: Distributions) -> Distributions:
    """Weights other than the identity."""
    torch.manual_seed(1)
    with torch.no_grad():
        for head in parts.heads.values():
            for parameter in head.parameters():
                parameter += 0.1 * torch.randn_like(parameter)
    return parts


def gradients(parts: Distributions) -> dict[str, torch.Tensor]:
    return {
        f"{e}.{name}": parameter.grad
        for e, head in parts.heads.items()
        for name, parameter in head.named_parameters()
        if parameter.grad is not None
    }


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("draft", [False, True])
def test_chunks_change_nothing(
    target: FrozenTarget, rows: list[TokenRow], temperature: float, draft: bool
) -> None:
    settings = TrainSettings(loss_temperature=temperature)
    vocab = torch.arange(0, VOCAB, 3) if draft else None
    whole, cut = (scattered(distributions(target, vocab)) for _ in range(2))
    cut.chunk_bytes = 4 * VOCAB * 3
    assert (cut.rows_per_chunk, whole.rows_per_chunk > 1000) == (3, True)
    once = accumulate_gradients(whole, rows, settings)
    pieces = accumulate_gradients(cut, rows, replace(settings, micro_batch_tokens=30))
    # float32 sums in another order.
    assert pieces == pytest.approx(once, rel=1e-5)
    expected, found = gradients(whole), gradients(cut)
    assert expected.keys() == found.keys()
    assert len(expected) == (6 if draft else 2)
    for name, gradient in expected.items():
        assert gradient.abs().max() > 1e-6
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6)


def test_the_loss_is_the_one_of_the_whole_model(target: FrozenTarget, rows: list[TokenRow]) -> None:
    """Against logits that transformers gives, row by row, without any of our parts."""
    parts = scattered(distributions(target))
    found = accumulate_gradients(parts, rows, TrainSettings())
    sums, right, total = {1: 0.0, 3: 0.0}, {1: 0, 3: 0}, 0
    for row in rows:
        ids = torch.tensor([row.ids])
        with torch.no_grad():
            out = target.model(ids, output_hidden_states=True)
        final = out.logits[0, :-1].double().softmax(-1)
        total += len(final)
        for e, head in parts.heads.items():
            h = out.hidden_states[e][0, :-1]
            weight = dict(head.transform.named_parameters())["weight"]
            with torch.no_grad():
                x = target.model.model.norm(h @ weight.T)
                guess = (x @ target.model.lm_head.weight.T).double().softmax(-1)
            sums[e] += float((final * (final / guess).log()).sum())
            right[e] += int((guess.argmax(-1) == final.argmax(-1)).sum())
    assert found == pytest.approx({e: value / total for e, value in sums.items()}, rel=1e-4)
    parts.thresholds = {1: 0.0, 3: 1.0}
    held_out = evaluate(parts, rows, TrainSettings())
    assert {e: r.loss for e, r in held_out.items()} == pytest.approx(found, rel=1e-4)
    assert {e: r.agreement for e, r in held_out.items()} == {e: n / total for e, n in right.items()}
    assert (held_out[1].coverage, held_out[1].precision) == (1.0, held_out[1].agreement)
    assert (held_out[3].coverage, held_out[3].precision) == (0.0, 1.0)


def test_classes_of_a_draft_vocabulary(target: FrozenTarget, rows: list[TokenRow]) -> None:
    vocab = torch.arange(1, VOCAB, 2)
    parts, everything = distributions(target, vocab), distributions(target)
    hidden = torch.randn(5, 48, generator=torch.Generator().manual_seed(0))
    full = everything.final(hidden).exp()
    found = parts.final(hidden).exp()
    torch.testing.assert_close(found[:, :-1], full[:, vocab])
    torch.testing.assert_close(found[:, -1], full.sum(-1) - full[:, vocab].sum(-1))
    head = parts.heads[1]
    assert head.other_bias is not None
    with torch.no_grad():
        head.other_bias.fill_(0.7)
        logits = target.lm_head(target.norm(hidden))[:, vocab]
        other = torch.full((5, 1), 0.7)
        expected = torch.cat([logits, other], -1).softmax(-1)
        torch.testing.assert_close(parts.head(1, hidden).exp(), expected)


def test_hidden_states_of_every_architecture(tmp_path: Path) -> None:
    from tests.support.tiny_models import ARCHITECTURES, save_tiny_model

    ids = torch.randint(0, 256, (2, 9), generator=torch.Generator().manual_seed(0))
    for architecture in ARCHITECTURES:
        model = load_target(save_tiny_model(tmp_path / architecture, architecture), torch.float32)
        hidden, final = model.hidden_states(ids, (2, 5))
        with torch.no_grad():
            out = model.model.model(ids, output_hidden_states=True, use_cache=False)
        assert list(hidden) == [2, 5]
        for e, h in hidden.items():
            torch.testing.assert_close(h, out.hidden_states[e])
        torch.testing.assert_close(final, out.last_hidden_state)
        torch.testing.assert_close(model.lm_head(final), model.model(ids).logits.detach())
        # What is padded behind a row changes nothing in it.
        shorter, _ = model.hidden_states(ids[:1, :6], (2,))
        torch.testing.assert_close(shorter[2], hidden[2][:1, :6], rtol=1e-4, atol=1e-5)


def test_nothing_but_safetensors_and_known_code_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tiny_target(tmp_path / "pickled")
    torch.save(load_file(path / "model.safetensors"), path / "pytorch_model.bin")
    (path / "model.safetensors").unlink()
    with pytest.raises(AdaDecodeError, match=r"named model\.safetensors"):
        load_target(path)
    asked: list[str] = []
    monkeypatch.setattr("builtins.input", asked.append)
    (path / "config.json").write_text(
        json.dumps({"model_type": "other", "auto_map": {"AutoConfig": "code.Config"}})
    )
    with pytest.raises(AdaDecodeError, match="contains custom code"):
        load_target(path)
    assert load_tokenizer(path) is not None
    assert asked == []


def test_accelerate_spreads_a_target(tmp_path: Path) -> None:
    path = tiny_target(tmp_path / "t")
    alone = load_target(path, torch.float32)
    # The last but one layer's weights stay on the disk until it runs.
    places = {f"model.layers.{i}": "disk" if i == 2 else "cpu" for i in range(4)}
    places |= dict.fromkeys(("model.embed_tokens", "model.norm", "model.rotary_emb"), "cpu")
    spread = load_target(path, torch.float32, places | {"lm_head": "cpu"})
    assert spread.model.model.layers[2].mlp.up_proj.weight.is_meta
    ids = torch.tensor([[1, 2, 3]])
    for exits in ((2,), (3,)):
        expected, found = (t.hidden_states(ids, exits) for t in (alone, spread))
        torch.testing.assert_close(found, expected)
