"""Gate, draft vocabulary and quantised LM head in a real engine: cheaper drafts, the same output.

The heads are the demo's, with parts made by hand. Whatever these say, greedy output is vanilla's.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
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


def frequent(reference: list[Any], size: int) -> torch.Tensor:
    """The most frequent tokens of the outputs, and the first ids where there are too few."""
    seen = Counter(token for ids in token_ids(reference) for token in ids)
    chosen = [token for token, _ in seen.most_common(size)]
    chosen += [i for i in range(VOCAB) if i not in seen][: size - len(chosen)]
    return torch.tensor(sorted(chosen))


@dataclass
class Heads:
    """Engines with the demo's heads and parts made by hand; the same parts are one folder."""

    engines: EnginePool
    prompts: list[str]
    folder: Path
    reference: list[Any]
    made: dict[str, str] = field(default_factory=dict)

    def engine(
        self, other_bias: float = 0.0, spec: dict[str, Any] | None = None, **fields: Any
    ) -> LLM:
        """Gates at random, a draft vocabulary of the most frequent tokens.

        Args:
            other_bias: logit of what is outside of that.
            spec: options of the user.
            fields: of the heads' config; they say which parts there are.
        """
        key = str((other_bias, sorted(fields.items())))
        if key not in self.made:
            extra: dict[str, torch.Tensor] = {}
            if "gate" in fields:
                rng = torch.Generator().manual_seed(0)
                extra["gate_weight"] = 0.1 * torch.randn(HIDDEN, generator=rng)
                extra["gate_bias"] = torch.zeros(1)
            if "draft_vocab_size" in fields:
                extra["draft_vocab"] = frequent(self.reference, fields["draft_vocab_size"])
                extra["other_weight"] = torch.zeros(HIDDEN)
                extra["other_bias"] = torch.full((1,), other_bias)
            self.made[key] = demo_heads(self.folder / str(len(self.made)), extra, **fields)
        return self.engines.get(
            speculative_config=speculative(model=self.made[key], **(spec or {}))
        )

    def counts(self, engine: LLM) -> dict[str, Any]:
        """What is counted of a run, whose output must be vanilla's."""
        stats(engine, reset=True)
        outputs = generate(engine, self.prompts, greedy(), batch=4)
        assert_same(self.engines.get(), outputs, self.reference)
        return stats(engine)


@pytest.fixture(scope="module")
def heads(
    engines: EnginePool, prompts: list[str], tmp_path_factory: pytest.TempPathFactory
) -> Heads:
    prompts = prompts[:NUM_PROMPTS]
    reference = generate(engines.get(), prompts, greedy(), batch=4)
    return Heads(engines, prompts, tmp_path_factory.mktemp("heads"), reference)


@pytest.fixture(scope="module")
def plain(heads: Heads) -> dict[str, Any]:
    """Counts of the demo's heads without any of the parts."""
    return heads.counts(heads.engine())


def in_model(engine: LLM, change: Callable[[Any], Any]) -> list[Any]:
    """Do that with the staged target."""
    return engine.collective_rpc(lambda worker: change(worker.model_runner.speculator.model))


def set_bias(engine: LLM, part: str, bias: float) -> None:
    """One answer of all gates, or logit of all other tokens, whatever the hidden state."""

    def change(model: Any) -> None:
        for head in model.heads:
            getattr(head, f"{part}_weight").data.zero_()
            getattr(head, f"{part}_bias").data.fill_(bias)

    in_model(engine, change)


def total(counts: dict[str, Any], name: str) -> int:
    return sum(e[name] for e in counts["exits"].values())


def test_gate(heads: Heads, plain: dict[str, Any]) -> None:
    """At random: fewer heads. Open: as without. Closed: no drafts."""
    engine = heads.engine(gate=True)
    counts = heads.counts(engine)
    assert 100 < total(counts, "heads_evaluated") < 0.8 * total(counts, "gates_evaluated")
    assert counts["accepted_tokens"] > 50

    set_bias(engine, "gate", ALWAYS)
    counts = heads.counts(engine)
    for name in ("heads_evaluated", "draft_tokens", "accepted_tokens", "rejected_tokens"):
        assert total(counts, name) == total(plain, name)
    assert total(counts, "gates_evaluated") == total(counts, "heads_evaluated")
    assert counts["draft_layers"] == plain["draft_layers"]

    set_bias(engine, "gate", NEVER)
    counts = heads.counts(engine)
    assert (total(counts, "heads_evaluated"), counts["draft_tokens"]) == (0, 0)
    assert total(counts, "gates_evaluated") > 100


@pytest.mark.slow
def test_gate_threshold_of_the_user(heads: Heads, plain: dict[str, Any]) -> None:
    """0 evaluates no gate, even a closed one; 1 turns the exits off, even with an open gate."""
    engine = heads.engine(gate=True, spec={"gate_threshold": 0})
    set_bias(engine, "gate", NEVER)
    counts = heads.counts(engine)
    assert total(counts, "gates_evaluated") == 0
    assert counts["draft_tokens"] == plain["draft_tokens"]

    engine = heads.engine(gate=True, spec={"gate_threshold": [1, 1.0, 1]})
    set_bias(engine, "gate", ALWAYS)
    counts = heads.counts(engine)
    assert total(counts, "gates_evaluated") == counts["draft_tokens"] == counts["draft_layers"] == 0


def test_draft_vocabulary(heads: Heads, plain: dict[str, Any]) -> None:
    ids = set(frequent(heads.reference, 64).tolist())
    generated = [token for output in token_ids(heads.reference) for token in output]
    assert 0.3 < sum(token in ids for token in generated) / len(generated) < 0.95
    engine = heads.engine(draft_vocab_size=64, other_bias=NEVER)
    sure = heads.counts(engine)
    # Without the missing mass it is sure of too much; ids that were not mapped back would be
    # right by chance alone.
    assert sure["draft_tokens"] > plain["draft_tokens"]
    assert sure["accepted_tokens"] > 0.3 * plain["accepted_tokens"]

    set_bias(engine, "other", 10.0)
    counts = heads.counts(engine)
    assert 0 < counts["draft_tokens"] < sure["draft_tokens"]
    assert counts["draft_acceptance_rate"] > sure["draft_acceptance_rate"]


def test_quantised_copy(heads: Heads, plain: dict[str, Any]) -> None:
    engine = heads.engine(lm_head_quantization="int8")
    assert in_model(engine, lambda model: model.projection.rows.dtype) == [torch.int8]
    counts = heads.counts(engine)
    # About as good as the weights it was made of; noise would draft nothing or be rejected.
    assert counts["draft_tokens"] == pytest.approx(plain["draft_tokens"], rel=0.15)
    rates = counts["draft_acceptance_rate"], plain["draft_acceptance_rate"]
    assert rates[0] == pytest.approx(rates[1], abs=0.05)


# None of the parts; a copy of the LM head; a gate, with an exit that does not use it; all.
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


def test_all_parts_at_once(heads: Heads) -> None:
    engine = heads.engine(**PARTS["all"])
    counts = heads.counts(engine)
    first, last = counts["exits"]["2"], counts["exits"]["6"]
    assert last["gates_evaluated"] == 0
    assert 0 < first["heads_evaluated"] < first["gates_evaluated"]
    assert counts["accepted_tokens"] > 50

    def forget(model: Any) -> None:
        for tensor in (*model.heads.parameters(), *model.projection.buffers()):
            tensor.data.zero_()

    in_model(engine, forget)
    assert heads.counts(engine)["accepted_tokens"] < 50
    # As after a sleep that gave up the weights: everything is there again.
    engine.collective_rpc("reload_weights")
    assert heads.counts(engine)["exits"] == counts["exits"]


# --- the way that a GPU takes, with the kernels' references ---------------------------------------


@pytest.mark.parametrize(
    ("parts", "method"),
    [
        pytest.param("plain", "greedy", marks=pytest.mark.slow),
        pytest.param("int8", "greedy", marks=pytest.mark.slow),
        ("gate", "greedy"),
        pytest.param("plain", "probabilistic", marks=pytest.mark.slow),
        ("all", "probabilistic"),
    ],
)
def test_kernels_in_place_of_logits(heads: Heads, parts: str, method: str) -> None:
    """The same drafts as from logits, and no logits."""
    fields = PARTS[parts]
    engine = heads.engine(
        **fields, spec={} if method == "greedy" else {"draft_sample_method": method}
    )

    def generate_and_count() -> tuple[list[Any], dict[str, Any]]:
        # Some requests at temperature 0 among them, which a probabilistic draft must follow.
        params = [
            greedy(seed=i, temperature=0.0 if method == "greedy" or i % 4 == 0 else 0.7)
            for i in range(NUM_PROMPTS)
        ]
        stats(engine, reset=True)
        return generate(engine, heads.prompts, params, batch=4), stats(engine)

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

    def use_logits(model: Any) -> None:
        model.projection.use_kernels = False
        del model.projection.logits

    assert engine.collective_rpc(use_kernels) == [True]
    try:
        outputs, counts = generate_and_count()
    finally:
        in_model(engine, use_logits)
    if method == "greedy":
        assert_same(heads.engines.get(), outputs, heads.reference)
    else:
        assert token_ids(outputs) == token_ids(stored_outputs)
    assert counts["exits"] == stored["exits"]
    assert counts["draft_tokens"] > 100
    assert counts["accepted_tokens"] > 50
    # Counts of what was saved, too, at exits that asked a gate.
    gated = [e for e in counts["exits"].values() if e["gates_evaluated"]]
    assert bool(gated) == ("gate" in fields)
    assert all(0 < e["heads_evaluated"] < e["gates_evaluated"] for e in gated)
