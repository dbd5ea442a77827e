"""The trainer: heads get better, runs are repeatable, and killed runs go on as if not killed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.engines import DEMO_MODEL
from tests.support.training_samples import (
    VOCAB,
    distributions,
    random_sequences,
    silent,
    tiny_target,
)
from vllm_adadecode.errors import AdaDecodeError
from vllm_adadecode.heads import HeadsConfig, head_tensors, make_heads
from vllm_adadecode.training import trainer
from vllm_adadecode.training.batches import TokenRow, token_rows
from vllm_adadecode.training.distributions import Distributions
from vllm_adadecode.training.request import TrainSettings
from vllm_adadecode.training.state import RunState
from vllm_adadecode.training.target_model import FrozenTarget, load_target
from vllm_adadecode.training.trainer import (
    evaluate,
    rate_factor,
    train_gates,
    train_heads,
)

SETTINGS = TrainSettings(learning_rate=5e-3, epochs=4, batch_size=8, eval_every=4)


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> FrozenTarget:
    return load_target(tiny_target(tmp_path_factory.mktemp("target") / "t"), torch.float32)


@pytest.fixture(scope="module")
def rows() -> list[TokenRow]:
    return token_rows(random_sequences(48), 64)


@pytest.fixture(scope="module")
def held_out() -> list[TokenRow]:
    return token_rows(random_sequences(12, seed=1), 64)


def train(
    parts: Distributions,
    rows: list[TokenRow],
    held_out: list[TokenRow],
    state_file: Path,
    settings: TrainSettings = SETTINGS,
) -> RunState:
    return train_heads(parts, rows, held_out, settings, state_file, silent())


def weights(parts: Distributions) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in head_tensors(parts.heads).items()}


def assert_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


KINDS: list[dict[str, Any]] = [
    {"transform": "full"},
    {"transform": "full", "norm": "before"},
    {"transform": "low_rank", "rank": 8},
    {"transform": "identity", "draft_vocab": torch.arange(0, VOCAB, 2)},
]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: "-".join(map(str, kind.values()))[:20])
def test_heads_get_better_on_held_out_rows(
    target: FrozenTarget,
    rows: list[TokenRow],
    held_out: list[TokenRow],
    tmp_path: Path,
    kind: dict[str, Any],
) -> None:
    parts = distributions(target, **kind)
    state = train(parts, rows, held_out, tmp_path / "state")
    first, last = state.history[0]["exits"], state.history[-1]["exits"]
    for e in ("1", "3"):
        # Without T there is only the "other" logit to train, which starts near its best.
        assert last[e]["loss"] < first[e]["loss"] * (1 if kind["transform"] == "identity" else 0.98)
        assert last[e]["train_loss"] < first[e]["loss"]
    # The weights kept are the best ones, exit by exit.
    found = evaluate(parts, held_out, SETTINGS)
    for e, result in found.items():
        best = min(entry["exits"][str(e)]["loss"] for entry in state.history)
        assert result.loss == pytest.approx(best, rel=1e-6)
        assert state.best[e] == best


def test_every_variant_starts_at_the_logit_lens(target: FrozenTarget, rows: list[TokenRow]) -> None:
    lens = evaluate(distributions(target, transform="identity"), rows, SETTINGS)
    for kind in KINDS[:3]:
        found = evaluate(distributions(target, **kind), rows, SETTINGS)
        for e in lens:
            assert found[e].loss == pytest.approx(lens[e].loss, rel=1e-4)


def test_trained_heads_beat_the_logit_lens_of_a_real_model(tmp_path: Path) -> None:
    """On the demo target, which was trained for its logit lens: there is little to gain."""
    demo = load_target(DEMO_MODEL, torch.float32)
    assert demo.tokenizer is not None
    text = Path(torch.nn.__file__).with_name("functional.py").read_text()
    ids = demo.tokenizer(text)["input_ids"]
    pieces = [TokenRow(tuple(ids[i : i + 96]), 0) for i in range(0, 96 * 24, 96)]
    config = HeadsConfig(
        exit_layers=[2, 4],
        transform="full",
        norm="after",
        target={"hidden_size": 256, "vocab_size": 2048, "num_hidden_layers": 8},
        speculators_config={"verifier": {"name_or_path": ".."}},
    )
    heads = make_heads(config, torch.float32, "cpu")
    parts = Distributions(demo, heads, {2: 0.75, 4: 0.75}, None, "fp32")
    settings = TrainSettings(epochs=4, batch_size=4, patience=99)
    args = (pieces[:20], pieces[20:], settings, tmp_path / "state", silent())
    state = train_heads(parts, *args)
    for e in (2, 4):
        assert state.best[e] < 0.99 * state.history[0]["exits"][str(e)]["loss"]


def test_the_same_seed_gives_the_same_weights(
    target: FrozenTarget, rows: list[TokenRow], held_out: list[TokenRow], tmp_path: Path
) -> None:
    runs = []
    for number, seed in enumerate((0, 0, 1)):
        parts = distributions(target, transform="low_rank", rank=4)
        settings = TrainSettings(epochs=1, batch_size=8, seed=seed)
        state = train(parts, rows, held_out, tmp_path / str(number), settings)
        runs.append((weights(parts), state.history))
    assert_same(runs[0][0], runs[1][0])
    assert runs[0][1] == runs[1][1]
    assert runs[0][1] != runs[2][1]


@pytest.mark.parametrize("stop_at", [1, 4, 6, 24])
def test_a_stopped_run_goes_on_bit_for_bit(
    target: FrozenTarget,
    rows: list[TokenRow],
    held_out: list[TokenRow],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    stop_at: int,
) -> None:
    """Stopped in the middle of a step, with states two steps apart. A kill -9 is tested with the
    command."""
    settings = TrainSettings(epochs=4, batch_size=8, eval_every=5, checkpoint_every=2)
    whole = distributions(target)
    reference = train(whole, rows, held_out, tmp_path / "whole", settings)
    assert reference.step == 24

    calls = 0
    accumulate = trainer.accumulate_gradients

    def stopping(*args: Any) -> dict[int, float]:
        nonlocal calls
        calls += 1
        found = accumulate(*args)
        if calls == stop_at:
            raise KeyboardInterrupt
        return found

    monkeypatch.setattr(trainer, "accumulate_gradients", stopping)
    with pytest.raises(KeyboardInterrupt):
        train(distributions(target), rows, held_out, tmp_path / "state", settings)
    before = calls
    # Other weights than the ones it began with: all of it must come from the file.
    parts = distributions(target)
    state = train(parts, rows, held_out, tmp_path / "state", settings)
    assert calls - before == 24 - (stop_at - 1) // 2 * 2
    assert state.history == reference.history
    assert_same(weights(parts), weights(whole))
    again = distributions(target)
    assert train(again, rows, held_out, tmp_path / "state", settings).step == 24
    assert_same(weights(again), weights(whole))


def test_a_damaged_state_is_not_gone_on_from(
    target: FrozenTarget, rows: list[TokenRow], held_out: list[TokenRow], tmp_path: Path
) -> None:
    (tmp_path / "state").write_bytes(b"\x08\0\0\0\0\0\0\0garbage!")
    settings = TrainSettings(epochs=1, batch_size=16)
    parts, clean = distributions(target), distributions(target)
    train(parts, rows, held_out, tmp_path / "state", settings)
    train(clean, rows, held_out, tmp_path / "other", settings)
    assert_same(weights(parts), weights(clean))


def test_a_head_does_not_depend_on_the_others(
    target: FrozenTarget, rows: list[TokenRow], held_out: list[TokenRow], tmp_path: Path
) -> None:
    settings = TrainSettings(epochs=2, batch_size=8, learning_rate=5e-3, max_gradient=0.05)
    both, one = distributions(target), distributions(target, exit_layers=[3])
    train(both, rows, held_out, tmp_path / "both", settings)
    train(one, rows, held_out, tmp_path / "one", settings)
    torch.testing.assert_close(weights(both)["exit_3.weight"], weights(one)["exit_3.weight"])


def test_training_ends_when_nothing_gets_better(
    target: FrozenTarget, rows: list[TokenRow], held_out: list[TokenRow], tmp_path: Path
) -> None:
    # So high a rate that the first step is the worst.
    settings = TrainSettings(
        learning_rate=1.0, epochs=9, batch_size=8, eval_every=2, patience=2, warmup=0.0
    )
    parts = distributions(target)
    start = weights(parts)
    state = train(parts, rows, held_out, tmp_path / "state", settings)
    assert state.step == 4
    assert state.finished
    assert_same(weights(parts), start)


@pytest.mark.parametrize("when", ["training", "before"])
def test_nan_is_refused(
    target: FrozenTarget,
    rows: list[TokenRow],
    held_out: list[TokenRow],
    tmp_path: Path,
    when: str,
) -> None:
    settings = TrainSettings(learning_rate=1e37, warmup=0.0, epochs=9, batch_size=8)
    parts = distributions(target, norm="before")
    if when == "before":
        with torch.no_grad():
            next(parts.heads[3].parameters()).fill_(float("nan"))
    with pytest.raises(
        AdaDecodeError, match=r"loss of the head .* lower --learning-rate"
    ) as caught:
        train(parts, rows, held_out, tmp_path / "state", settings)
    assert "\n" not in str(caught.value)


def test_learning_rate() -> None:
    factors = [rate_factor(step, 100, 0.03) for step in range(100)]
    assert factors[:4] == pytest.approx([0.25, 0.5, 0.75, 1.0], abs=1e-3)
    assert factors[3:] == sorted(factors[3:], reverse=True)
    assert 0 < factors[-1] < 0.001
    assert rate_factor(51, 100, 0.03) == pytest.approx(0.5, abs=0.01)


def test_bf16_comes_near_fp32(
    target: FrozenTarget, rows: list[TokenRow], held_out: list[TokenRow], tmp_path: Path
) -> None:
    exact, rough = distributions(target), distributions(target)
    rough.precision = "bf16"
    assert rough.head(1, torch.randn(3, 48)).dtype == torch.float32
    settings = TrainSettings(epochs=2, batch_size=8, learning_rate=5e-3)
    expected = train(exact, rows, held_out, tmp_path / "exact", settings)
    found = train(rough, rows, held_out, tmp_path / "rough", settings)
    for e in (1, 3):
        # bfloat16 keeps eight bits.
        assert found.best[e] == pytest.approx(expected.best[e], rel=0.05)
        assert found.best[e] < found.history[0]["exits"][str(e)]["loss"]
    assert not torch.equal(weights(exact)["exit_1.weight"], weights(rough)["exit_1.weight"])


def test_gates(
    target: FrozenTarget, rows: list[TokenRow], held_out: list[TokenRow], tmp_path: Path
) -> None:
    settings = TrainSettings(epochs=2, batch_size=8, learning_rate=5e-3)
    parts = distributions(target, gate=True)
    train(parts, rows, held_out, tmp_path / "state", settings)
    trained = weights(parts)
    # About half of the positions are confident: there is something to tell apart.
    hidden, _ = parts.states(next(trainer.micro_batches(rows, 10_000)))
    parts.thresholds = {
        e: float(parts.head(e, h).detach().amax(-1).exp().quantile(0.6)) for e, h in hidden.items()
    }
    before = evaluate(parts, rows, settings)
    assert all(found.gate_passed == 0.0 for found in before.values())
    train_gates(parts, rows, settings, silent())
    after = weights(parts)
    assert_same(
        {k: v for k, v in after.items() if "gate" not in k},
        {k: v for k, v in trained.items() if "gate" not in k},
    )
    for e, found in evaluate(parts, rows, settings).items():
        assert found.coverage == pytest.approx(0.4, abs=0.05)
        # Better than chance: of the confident ones it passes more than of all.
        assert (found.gate_recall or 0.0) > 1.2 * (found.gate_passed or 0.0) > 0.0
        logit = parts.heads[e].gate_logit(hidden[e])
        assert logit is not None
        assert float((logit > 0).float().mean()) == pytest.approx(found.gate_passed)
    again = distributions(target, gate=True)
    train(again, rows, held_out, tmp_path / "state", settings)
    again.thresholds = parts.thresholds
    train_gates(again, rows, settings, silent())
    assert_same(weights(again), after)
