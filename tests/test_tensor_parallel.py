"""Two tensor-parallel ranks, each its own process, decide alike and say what vLLM's two say."""

from typing import Any

import pytest
from vllm import LLM, RequestOutput, SamplingParams

from tests.engines import (
    DEFAULTS,
    DEMO_MODEL,
    EnginePool,
    assert_same,
    generate,
    greedy,
    speculative,
    stop,
)
from tests.heads_samples import demo_heads

# Few seats and small steps: prefill in chunks beside pending tokens.
OPTIONS: dict[str, Any] = DEFAULTS | {
    "tensor_parallel_size": 2,
    "max_num_seqs": 6,
    "max_num_batched_tokens": 64,
}
SPEC = speculative(num_speculative_tokens=5, exit_layers=[2, 4, 6], confidence_threshold=0.5)


@pytest.fixture(scope="module")
def heads(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Without the draft vocabulary of the demo's own, which one rank alone can serve."""
    return demo_heads(tmp_path_factory.mktemp("plain") / "heads")


def requests(prompts: list[str]) -> tuple[list[str], list[SamplingParams]]:
    return [prompts[i] * (1 + i % 3) for i in range(12)], [greedy(16 + 3 * i) for i in range(12)]


@pytest.fixture(scope="module")
def reference(prompts: list[str]) -> list[RequestOutput]:
    """vLLM's own two ranks."""
    engine = LLM(str(DEMO_MODEL), **OPTIONS)
    try:
        return generate(engine, *requests(prompts))
    finally:
        stop(engine)


def note_rounds(worker: Any) -> None:
    """Have a rank keep what it did in every round: the drafts, with their depths and exits."""
    speculator = worker.model_runner.speculator
    propose = speculator.propose
    speculator.noted = []

    def propose_noted(*args: Any, **kwargs: Any) -> Any:
        drafts = propose(*args, **kwargs)
        speculator.noted.append(
            [
                (req_id, ids, window.depths.tolist(), window.exits.tolist())
                for req_id, ids in zip(speculator.last_req_ids, speculator.last_drafts, strict=True)
                if (window := speculator.windows._windows.get(req_id)) is not None
            ]
        )
        return drafts

    speculator.propose = propose_noted


@pytest.mark.parametrize("draft_sample_method", ["greedy", "probabilistic"])
def test_ranks_decide_alike(
    engines: EnginePool,
    prompts: list[str],
    reference: list[RequestOutput],
    heads: str,
    draft_sample_method: str,
) -> None:
    engine = LLM(
        str(DEMO_MODEL),
        **OPTIONS,
        speculative_config=SPEC | {"model": heads, "draft_sample_method": draft_sample_method},
    )
    try:
        engine.collective_rpc(note_rounds)
        outputs = generate(engine, *requests(prompts))
        sampled = SamplingParams(temperature=0.8, max_tokens=24, ignore_eos=True)
        generate(engine, prompts[:8], sampled)
        counts = engine.collective_rpc("adadecode_stats")
        noted = engine.collective_rpc(lambda worker: worker.model_runner.speculator.noted)
    finally:
        stop(engine)
    # One rank breaks a tie like two do, or not.
    assert_same(engines.get(), outputs, reference)
    assert len(noted) == len(counts) == 2
    assert noted[0] == noted[1]
    assert counts[0] == counts[1]
    assert sum(len(ids) for r in noted[0] for _, ids, _, _ in r) == counts[0]["drafted"] > 100
    assert min(counts[0]["mixed_batches"], counts[0]["deferred_batches"]) > 5
