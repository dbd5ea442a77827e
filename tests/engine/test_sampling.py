"""Sampling is exact: tokens follow the target's own distribution, whatever was drafted.

Every generated token is held against the exact probabilities of its context, computed by
transformers in float32. For any set S of tokens chosen from the context alone, the sum over
positions of ``1[token in S] - p(S)`` is a martingale with a known variance, so its standardised
value is about N(0, 1) for an exact sampler. The sets used are each token id, and what each exit's
head ranks first or second: the tokens that a wrong acceptance rule would favour.
"""

from collections.abc import Callable
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM
from vllm import LLM, SamplingParams

from tests.support.engines import EnginePool, set_thresholds, speculative, stats
from tests.support.tiny_models import save_tiny_model
from vllm_adadecode.heads import HeadsConfig, save_heads

VOCAB = 16
HIDDEN_SIZE = 128
NUM_REQUESTS = 128
NUM_TOKENS = 240
EXITS = [1, 2, 4]
# Two-sided, over all statistics of one run: an exact sampler fails once in 1000 runs, and the
# seeds are fixed, so that it is the same verdict every time.
SIGNIFICANCE = 1e-3

ENGINE: dict[str, Any] = {"max_num_seqs": NUM_REQUESTS, "kv_cache_memory_bytes": 256 << 20}

Filter = Callable[[torch.Tensor], torch.Tensor]


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(
        tmp_path_factory.mktemp("sampling"), vocab_size=VOCAB, initializer_range=0.12
    )


@pytest.fixture(scope="module")
def exact(model_path: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32).eval()


def sample(engine: LLM, count: int = NUM_REQUESTS, **options: Any) -> list[list[int]]:
    """``count`` sequences of `NUM_TOKENS` ids, each sampled with its own seed."""
    params = [
        SamplingParams(
            **({"temperature": 1.0, "max_tokens": NUM_TOKENS, "ignore_eos": True} | options),
            seed=1000 + i,
        )
        for i in range(count)
    ]
    prompts = [{"prompt_token_ids": [1 + i % (VOCAB - 1), 2, 3]} for i in range(count)]
    outputs = engine.generate(prompts, params, use_tqdm=False)
    return [list(o.prompt_token_ids or ()) + list(o.outputs[0].token_ids) for o in outputs]


@torch.inference_mode()
def probabilities(
    exact: Any, sequences: list[list[int]], process: Filter
) -> tuple[np.ndarray, np.ndarray]:
    """Exact distributions ``[tokens, VOCAB]``, heads' rankings ``[tokens, exits, VOCAB]``."""
    probs, ranks = [], []
    for sequence in sequences:
        out = exact(torch.tensor([sequence]), output_hidden_states=True)
        # Contexts of the generated tokens: from the last prompt token to the last but one.
        window = slice(2, len(sequence) - 1)
        probs.append(process(out.logits[0, window]).double().numpy())
        lens = [
            exact.lm_head(exact.model.norm(out.hidden_states[e][0, window])).argsort(
                -1, descending=True
            )
            for e in EXITS
        ]
        ranks.append(torch.stack(lens, 1).numpy())
    return np.concatenate(probs), np.concatenate(ranks)


def worst(tokens: np.ndarray, probs: np.ndarray, ranks: np.ndarray) -> tuple[float, str]:
    """The largest standardised deviation over all sets, and which set it is."""
    rows = np.arange(len(tokens))
    sets = {f"token {k}": np.full(len(tokens), k) for k in range(VOCAB)}
    for e in range(ranks.shape[1]):
        sets |= {f"exit {EXITS[e]} rank {r}": ranks[:, e, r] for r in range(2)}
    scores = {}
    for name, chosen in sets.items():
        p = probs[rows, chosen]
        deviation = ((tokens == chosen) - p).sum()
        scores[name] = abs(deviation) / np.sqrt(max((p * (1 - p)).sum(), 1e-9))
    name = max(scores, key=lambda key: scores[key])
    return float(scores[name]), name


def limit() -> float:
    return -NormalDist().inv_cdf(SIGNIFICANCE / 2 / (VOCAB + 2 * len(EXITS)))


def generated(sequences: list[list[int]]) -> np.ndarray:
    return np.concatenate([np.array(s[3:]) for s in sequences])


def softmax(logits: torch.Tensor) -> torch.Tensor:
    return logits.softmax(-1)


def top_k_top_p(temperature: float, top_k: int, top_p: float) -> Filter:
    """The order in which vLLM applies them."""

    def process(logits: torch.Tensor) -> torch.Tensor:
        logits = logits / temperature
        kth = logits.topk(top_k).values[:, -1:]
        logits = logits.masked_fill(logits < kth, -torch.inf)
        ordered, order = logits.softmax(-1).sort(-1)
        outside = ordered.cumsum(-1) <= 1 - top_p
        outside[:, -1] = False
        return logits.masked_fill(outside.scatter(-1, order, outside), -torch.inf).softmax(-1)

    return process


def min_p_and_bias(temperature: float, min_p: float, bias: dict[int, float]) -> Filter:
    def process(logits: torch.Tensor) -> torch.Tensor:
        logits = logits.clone()
        logits[:, list(bias)] += torch.tensor(list(bias.values()))
        probs = (logits / temperature).softmax(-1)
        probs[probs < min_p * probs.amax(-1, keepdim=True)] = 0.0
        return probs / probs.sum(-1, keepdim=True)

    return process


BIAS = {3: 1.5, 9: -2.0, 14: 1.0}
SETTINGS: list[tuple[dict[str, Any], Filter]] = [
    ({}, softmax),
    ({"temperature": 0.6, "top_k": 8, "top_p": 0.9}, top_k_top_p(0.6, 8, 0.9)),
    (
        {"temperature": 0.8, "min_p": 0.1, "logit_bias": BIAS},
        min_p_and_bias(0.8, 0.1, BIAS),
    ),
]


def check_distribution(
    engine: LLM,
    exact: Any,
    thresholds: tuple[float, ...],
    options: dict[str, Any],
    process: Filter,
) -> dict[str, Any]:
    """Sample, and hold it against the target; the engine's counts."""
    set_thresholds(engine, *thresholds)
    stats(engine, reset=True)
    sequences = sample(engine, **options)
    counts = stats(engine)
    # Both outcomes must have been tried often, or the test would show nothing.
    assert counts["accepted_tokens"] > 2000
    assert counts["draft_tokens"] - counts["accepted_tokens"] > 2000
    tokens, (probs, ranks) = generated(sequences), probabilities(exact, sequences, process)
    assert probs[np.arange(len(tokens)), tokens].all(), "a token that was ruled out"
    score, name = worst(tokens, probs, ranks)
    assert score < limit(), f"{name} is {score:.1f} standard deviations off"
    return counts


ALL, SOME = (0.0, 0.0, 0.0), (0.3, 0.25, 0.1)


# Each method with each of the others.
@pytest.mark.parametrize(
    ("draft_sample_method", "thresholds", "options", "process"),
    [
        ("greedy", SOME, *SETTINGS[0]),
        pytest.param("greedy", ALL, *SETTINGS[1], marks=pytest.mark.slow),
        pytest.param("probabilistic", ALL, *SETTINGS[0], marks=pytest.mark.slow),
        pytest.param("probabilistic", SOME, *SETTINGS[1], marks=pytest.mark.slow),
        pytest.param("greedy", SOME, *SETTINGS[2], marks=pytest.mark.slow),
        pytest.param("probabilistic", ALL, *SETTINGS[2], marks=pytest.mark.slow),
    ],
    ids=[
        *("greedy-some-plain", "greedy-all-top_k_top_p", "all-plain", "some-top_k_top_p"),
        *("greedy-some-min_p_and_bias", "all-min_p_and_bias"),
    ],
)
def test_tokens_follow_the_target(
    engines: EnginePool,
    model_path: Path,
    exact: Any,
    draft_sample_method: str,
    thresholds: tuple[float, ...],
    options: dict[str, Any],
    process: Filter,
) -> None:
    engine = engines.get(
        model_path,
        **ENGINE,
        speculative_config=speculative(
            num_speculative_tokens=4,
            exit_layers=EXITS,
            draft_sample_method=draft_sample_method,
        ),
    )
    check_distribution(engine, exact, thresholds, options, process)


@pytest.mark.parametrize(
    ("draft_sample_method", "options", "process"),
    [
        pytest.param("greedy", *SETTINGS[1], marks=pytest.mark.slow),
        pytest.param("probabilistic", *SETTINGS[0], marks=pytest.mark.slow),
        ("probabilistic", *SETTINGS[2]),
    ],
    ids=["greedy-top_k_top_p", "probabilistic-plain", "probabilistic-min_p_and_bias"],
)
def test_tokens_of_open_rounds_follow_the_target(
    engines: EnginePool,
    model_path: Path,
    exact: Any,
    draft_sample_method: str,
    options: dict[str, Any],
    process: Filter,
) -> None:
    """Verified for as many drafts as there might be: a place without one ends the window."""
    engine = engines.get(
        model_path,
        **ENGINE,
        async_scheduling=True,
        speculative_config=speculative(
            num_speculative_tokens=4,
            exit_layers=EXITS,
            draft_sample_method=draft_sample_method,
            draft_loop="device",
        ),
    )

    def allow_large_batches(worker: Any) -> None:
        worker.model_runner.speculator.device_rounds.most_token_slots = 10 * NUM_REQUESTS

    engine.collective_rpc(allow_large_batches)
    counts = check_distribution(engine, exact, (0.3, 0.3, 0.25), options, process)
    # Most rounds, and many windows that were not full.
    assert counts["overlapped_steps"] > 0.6 * counts["deferred_steps"]
    assert counts["draft_tokens"] < 3.5 * counts["verification_steps"]


@pytest.mark.parametrize(
    "kernels", [pytest.param(False, marks=pytest.mark.slow), True], ids=["logits", "kernels"]
)
def test_a_draft_vocabulary_is_exact_too(
    engines: EnginePool, model_path: Path, exact: Any, tmp_path: Path, kernels: bool
) -> None:
    """Drafts drawn from 6 of 16 tokens, by a quantised head, where a random gate lets them.

    The other tokens have proposal probability 0. They must come as often as ever, from the
    resampling after a rejection and from the verifications themselves. With kernels (their
    references) as on a GPU: gate, head and draw in one, which write these tokens' logits alone.
    """
    ids = torch.tensor([1, 4, 5, 9, 12, 15])
    torch.manual_seed(0)
    tensors = {"draft_vocab": ids}
    for e in EXITS:
        tensors |= {
            f"exit_{e}.gate_weight": torch.randn(HIDDEN_SIZE) / 10,
            f"exit_{e}.gate_bias": torch.ones(1),
            f"exit_{e}.other_weight": torch.randn(HIDDEN_SIZE) / 10,
            f"exit_{e}.other_bias": torch.zeros(1),
        }
    config = HeadsConfig(
        exit_layers=EXITS,
        confidence_threshold=0.1,
        transform="identity",
        norm="after",
        gate=True,
        draft_vocab_size=len(ids),
        lm_head_quantization="int8",
        target={
            "hidden_size": HIDDEN_SIZE,
            "vocab_size": VOCAB,
            "num_hidden_layers": exact.config.num_hidden_layers,
        },
        speculators_config={"verifier": {"name_or_path": str(model_path)}},
    )
    engine = engines.get(
        model_path,
        **ENGINE,
        speculative_config=speculative(
            model=str(save_heads(tmp_path / "heads", config, tensors)),
            num_speculative_tokens=4,
            draft_sample_method="probabilistic",
        ),
    )

    def use_kernels(worker: Any) -> None:
        worker.model_runner.speculator.model.projection.use_kernels = kernels

    engine.collective_rpc(use_kernels)
    sequences = sample(engine)
    counts = stats(engine)
    assert counts["accepted_tokens"] > 2000
    assert counts["draft_tokens"] - counts["accepted_tokens"] > 2000
    exits = counts["exits"].values()
    assert (
        2000
        < sum(e["heads_evaluated"] for e in exits)
        < 0.95 * sum(e["gates_evaluated"] for e in exits)
    )
    score, name = worst(generated(sequences), *probabilities(exact, sequences, softmax))
    assert score < limit(), f"{name} is {score:.1f} standard deviations off"


def test_a_bias_of_two_percent_would_be_caught(
    engines: EnginePool, model_path: Path, exact: Any
) -> None:
    """Power: the same statistics, with 2 % of vanilla's tokens replaced by a head's favourite."""
    sequences = sample(engines.get(model_path, **ENGINE))
    probs, ranks = probabilities(exact, sequences, softmax)
    tokens = generated(sequences)
    score, name = worst(tokens, probs, ranks)
    assert score < limit(), f"vanilla itself: {name} is {score:.1f} standard deviations off"
    rng = np.random.default_rng(0)
    biased = np.where(rng.random(len(tokens)) < 0.02, ranks[:, 0, 0], tokens)
    score, name = worst(biased, probs, ranks)
    assert score > limit()
    assert name == f"exit {EXITS[0]} rank 0"


def test_accepting_too_much_is_caught(engines: EnginePool, model_path: Path, exact: Any) -> None:
    """Negative control on the engine itself: drafts accepted regardless of the target."""
    engine = engines.get(
        model_path,
        **ENGINE,
        speculative_config=speculative(
            num_speculative_tokens=4,
            exit_layers=EXITS,
            confidence_threshold=0.0,
            rejection_sample_method="synthetic",
            synthetic_acceptance_rates=[0.9, 0.8, 0.7, 0.6],
        ),
    )
    sequences = sample(engine, count=16)
    score, _ = worst(generated(sequences), *probabilities(exact, sequences, softmax))
    assert score > limit()
