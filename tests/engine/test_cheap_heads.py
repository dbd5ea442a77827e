"""Gate, draft vocabulary and quantised LM head in a real engine: cheaper drafts, the same output.

The heads are the demo's, with parts made by hand. Whatever these say, greedy output is vanilla's.
"""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from vllm import LLM

from tests.support.engines import (
    EnginePool,
    assert_same,
    generate,
    greedy,
    speculative,
    stats,
    token_ids,
)
from tests.support.heads_samples import demo_heads

VOCAB, HIDDEN = 2048, 256
NUM_PROMPTS = 12
ALWAYS, NEVER = 100.0, -100.0


def gate_tensors(weight: float, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "gate_weight": weight * torch.randn(HIDDEN, generator=generator),
        "gate_bias": torch.zeros(1),
    }


def set_gate_bias(engine: LLM, bias: float) -> None:
    """Open or close the gates of a running engine, whatever the hidden state."""

    def change(worker: Any) -> None:
        for head in worker.model_runner.speculator.model.heads:
            head.gate_weight.data.zero_()
            head.gate_bias.data.fill_(bias)

    engine.collective_rpc(change)


def run(engine: LLM, prompts: list[str]) -> tuple[Any, dict[str, Any]]:
    """Outputs, and the counts of making them."""
    stats(engine, reset=True)
    return generate(engine, prompts[:NUM_PROMPTS], greedy(), batch=4), stats(engine)


def total(counts: dict[str, Any], name: str) -> int:
    return sum(e[name] for e in counts["exits"].values())


@pytest.fixture(scope="module")
def reference(engines: EnginePool, prompts: list[str]) -> list[Any]:
    return generate(engines.get(), prompts[:NUM_PROMPTS], greedy(), batch=4)


@pytest.fixture(scope="module")
def plain(
    engines: EnginePool, prompts: list[str], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    """Counts of the demo's heads without any of the parts."""
    heads = demo_heads(tmp_path_factory.mktemp("plain") / "heads")
    return run(engines.get(speculative_config=speculative(model=heads)), prompts)[1]


def test_gate(
    engines: EnginePool,
    prompts: list[str],
    reference: list[Any],
    plain: dict[str, Any],
    tmp_path: Path,
) -> None:
    """At random: lossless, fewer checks. Open: as without. Closed: no drafts."""
    vanilla = engines.get()
    heads = demo_heads(tmp_path / "heads", gate_tensors(0.1), gate=True)
    engine = engines.get(speculative_config=speculative(model=heads))

    outputs, counts = run(engine, prompts)
    assert_same(vanilla, outputs, reference)
    assert 100 < total(counts, "heads_evaluated") < 0.8 * total(counts, "gates_evaluated")
    assert counts["accepted_tokens"] > 50

    set_gate_bias(engine, ALWAYS)
    outputs, counts = run(engine, prompts)
    assert_same(vanilla, outputs, reference)
    for name in ("heads_evaluated", "draft_tokens", "accepted_tokens", "rejected_tokens"):
        assert total(counts, name) == total(plain, name)
    assert total(counts, "gates_evaluated") == total(counts, "heads_evaluated")
    assert counts["draft_layers"] == plain["draft_layers"]

    set_gate_bias(engine, NEVER)
    outputs, counts = run(engine, prompts)
    assert_same(vanilla, outputs, reference)
    assert (total(counts, "heads_evaluated"), counts["draft_tokens"]) == (0, 0)
    assert total(counts, "gates_evaluated") > 100


def test_gate_threshold_of_the_user(
    engines: EnginePool, prompts: list[str], plain: dict[str, Any], tmp_path: Path
) -> None:
    """0 asks no gate, even a closed one; 1 turns the exits off, even with an open gate."""
    closed = {"gate_weight": torch.zeros(HIDDEN), "gate_bias": torch.full((1,), NEVER)}
    heads = demo_heads(tmp_path / "heads", closed, gate=True)
    engine = engines.get(speculative_config=speculative(model=heads, gate_threshold=0))
    counts = run(engine, prompts)[1]
    assert total(counts, "gates_evaluated") == 0
    assert counts["draft_tokens"] == plain["draft_tokens"]

    engine = engines.get(speculative_config=speculative(model=heads, gate_threshold=[1, 1.0, 1]))
    set_gate_bias(engine, ALWAYS)
    counts = run(engine, prompts)[1]
    assert (total(counts, "gates_evaluated"), counts["draft_tokens"], counts["draft_layers"]) == (
        0,
        0,
        0,
    )


def frequent(reference: list[Any], size: int) -> torch.Tensor:
    """The most frequent tokens of the outputs, and the first ids where there are too few."""
    seen = Counter(token for ids in token_ids(reference) for token in ids)
    chosen = [token for token, _ in seen.most_common(size)]
    chosen += [i for i in range(VOCAB) if i not in seen][: size - len(chosen)]
    return torch.tensor(sorted(chosen))


def test_draft_vocabulary(
    engines: EnginePool,
    prompts: list[str],
    reference: list[Any],
    plain: dict[str, Any],
    tmp_path: Path,
) -> None:
    vanilla = engines.get()
    ids = frequent(reference, 64)
    generated = [token for output in token_ids(reference) for token in output]
    share = sum(token in set(ids.tolist()) for token in generated) / len(generated)
    assert 0.3 < share < 0.95
    extra = {
        "draft_vocab": ids,
        "other_weight": torch.zeros(HIDDEN),
        "other_bias": torch.full((1,), NEVER),
    }
    heads = demo_heads(tmp_path / "heads", extra, draft_vocab_size=64)
    engine = engines.get(speculative_config=speculative(model=heads))
    outputs, counts = run(engine, prompts)
    assert_same(vanilla, outputs, reference)
    # Without the missing mass it is sure of too much; ids that were not mapped back would be
    # right by chance alone.
    assert counts["draft_tokens"] > plain["draft_tokens"]
    assert counts["accepted_tokens"] > 0.3 * plain["accepted_tokens"]
    sure = counts

    def more_for_others(worker: Any) -> None:
        for head in worker.model_runner.speculator.model.heads:
            head.other_bias.data.fill_(10.0)

    engine.collective_rpc(more_for_others)
    outputs, counts = run(engine, prompts)
    assert_same(vanilla, outputs, reference)
    assert 0 < counts["draft_tokens"] < sure["draft_tokens"]
    assert counts["draft_acceptance_rate"] > sure["draft_acceptance_rate"]


def test_quantised_copy(
    engines: EnginePool,
    prompts: list[str],
    reference: list[Any],
    plain: dict[str, Any],
    tmp_path: Path,
) -> None:
    heads = demo_heads(tmp_path / "heads", lm_head_quantization="int8")
    engine = engines.get(speculative_config=speculative(model=heads))

    def dtype_of_the_copy(worker: Any) -> str:
        return str(worker.model_runner.speculator.model.projection.rows.dtype)

    assert engine.collective_rpc(dtype_of_the_copy) == ["torch.int8"]
    outputs, counts = run(engine, prompts)
    assert_same(engines.get(), outputs, reference)
    # About as good as the weights it was made of; noise would draft nothing or be rejected.
    assert counts["draft_tokens"] == pytest.approx(plain["draft_tokens"], rel=0.15)
    assert counts["draft_acceptance_rate"] == pytest.approx(
        plain["draft_acceptance_rate"], abs=0.05
    )


def test_all_parts_at_once(
    engines: EnginePool, prompts: list[str], reference: list[Any], tmp_path: Path
) -> None:
    extra = gate_tensors(0.1) | {
        "draft_vocab": frequent(reference, 256),
        "other_weight": torch.zeros(HIDDEN),
        "other_bias": torch.zeros(1),
    }
    heads = demo_heads(
        tmp_path / "heads", extra, gate=True, draft_vocab_size=256, lm_head_quantization="int8"
    )
    engine = engines.get(speculative_config=speculative(model=heads, gate_threshold=[0.3, 0.4, 0]))
    outputs, counts = run(engine, prompts)
    assert_same(engines.get(), outputs, reference)
    assert counts["exits"]["6"]["gates_evaluated"] == 0
    assert 0 < counts["exits"]["2"]["heads_evaluated"] < counts["exits"]["2"]["gates_evaluated"]
    assert counts["accepted_tokens"] > 50

    def forget(worker: Any) -> None:
        model = worker.model_runner.speculator.model
        for tensor in (*model.heads.parameters(), *model.projection.buffers()):
            tensor.data.zero_()

    engine.collective_rpc(forget)
    assert run(engine, prompts)[1]["accepted_tokens"] < 50
    # As after a sleep that gave up the weights: everything is there again.
    engine.collective_rpc("reload_weights")
    outputs, again = run(engine, prompts)
    assert_same(engines.get(), outputs, reference)
    assert again["exits"] == counts["exits"]


# --- the way that a GPU takes, with the kernels' references ---------------------------------------


# None of them; a copy of the LM head; a gate, with an exit that does not ask it; all.
PARTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "int8": {"lm_head_quantization": "int8"},
    "gate": {"gate": True, "gate_threshold": [0.4, 0, 0.3]},
    "all": {
        "gate": True,
        "gate_threshold": [0.3, 0.4, 0],
        "draft_vocab_size": 256,
        "lm_head_quantization": "int8",
    },
}


@pytest.mark.parametrize(
    ("parts", "method"),
    [
        ("plain", "greedy"),
        ("int8", "greedy"),
        ("gate", "greedy"),
        ("plain", "probabilistic"),
        ("all", "probabilistic"),
    ],
)
def test_kernels_in_place_of_logits(
    engines: EnginePool,
    prompts: list[str],
    reference: list[Any],
    tmp_path: Path,
    parts: str,
    method: str,
) -> None:
    """The same drafts as from logits, and no logits."""
    fields = PARTS[parts]
    extra: dict[str, torch.Tensor] = {}
    if "gate" in fields:
        extra |= gate_tensors(0.1)
    if "draft_vocab_size" in fields:
        extra |= {
            "draft_vocab": frequent(reference, fields["draft_vocab_size"]),
            "other_weight": torch.zeros(HIDDEN),
            "other_bias": torch.zeros(1),
        }
    heads = demo_heads(tmp_path / "heads", extra, **fields)
    engine = engines.get(
        speculative_config=speculative(model=heads, draft_sample_method=method),
    )

    def generate_and_count() -> tuple[list[Any], dict[str, Any]]:
        # Some requests at temperature 0 among them, which a probabilistic draft must follow.
        params = [
            greedy(seed=i, temperature=0.0 if method == "greedy" or i % 4 == 0 else 0.7)
            for i in range(NUM_PROMPTS)
        ]
        stats(engine, reset=True)
        return generate(engine, prompts[:NUM_PROMPTS], params, batch=4), stats(engine)

    stored_outputs, stored = generate_and_count()

    def use_kernels(worker: Any) -> bool:
        def no_logits(*args: Any) -> None:
            raise AssertionError("logits were stored")

        speculator = worker.model_runner.speculator
        projection = speculator.model.projection
        projection.use_kernels = True
        projection.logits = no_logits
        # Warming up changes nothing that a request has.
        cache = None if speculator.draft_logits is None else speculator.draft_logits.clone()
        speculator.launch_kernels(16)
        assert cache is None or torch.equal(cache, speculator.draft_logits)
        return projection.kernel_weight(torch.float32) is not None

    assert engine.collective_rpc(use_kernels) == [True]
    outputs, counts = generate_and_count()
    if method == "greedy":
        assert_same(engines.get(), outputs, reference)
    else:
        assert token_ids(outputs) == token_ids(stored_outputs)
    assert counts["exits"] == stored["exits"]
    assert counts["draft_tokens"] > 100
    assert counts["accepted_tokens"] > 50
    # Counts of what was saved, too, at exits that asked a gate.
    gated = [e for e in counts["exits"].values() if e["gates_evaluated"]]
    assert bool(gated) == ("gate" in fields)
    assert all(0 < e["heads_evaluated"] < e["gates_evaluated"] for e in gated)
