"""Greedy output equals vanilla vLLM's, token for token, on trained weights in float32.

And a negative control: with the saved states shifted by one token, it must not.
"""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from vllm import LLM, RequestOutput, SamplingParams
from vllm.v1.worker.gpu.spec_decode import rejection_sampler

from tests.support.engines import (
    DEVICE_LOOP,
    EnginePool,
    assert_same,
    divergences,
    generate,
    greedy,
    set_thresholds,
    speculative,
    stats,
    token_ids,
)
from vllm_adadecode.verify.plan import VerificationPlan

THREE_EXITS = speculative(num_speculative_tokens=5, exit_layers=[2, 4, 6])


@pytest.fixture
def vanilla(engines: EnginePool) -> LLM:
    return engines.get()


@pytest.fixture(scope="module")
def reference(engines: EnginePool, prompts: list[str]) -> list[Any]:
    return generate(engines.get(), prompts, greedy(), batch=1)


@pytest.mark.parametrize(
    ("threshold", "batch"),
    [(0.0, 16), (0.5, 4), (0.9, 1), (1.0, 4)]
    + [
        pytest.param(threshold, batch, marks=pytest.mark.slow)
        for threshold, batch in [(0.0, 1), (0.0, 4), (0.5, 1), (0.5, 16), (0.9, 4), (0.9, 16)]
    ],
)
def test_thresholds_and_batch_sizes(
    engines: EnginePool,
    vanilla: LLM,
    reference: list[Any],
    prompts: list[str],
    threshold: float,
    batch: int,
) -> None:
    engine = engines.get(speculative_config=THREE_EXITS)
    set_thresholds(engine, threshold)
    stats(engine, reset=True)
    count = 16 if batch == 1 else len(prompts)
    outputs = generate(engine, prompts[:count], greedy(), batch=batch)
    assert_same(vanilla, outputs, reference[:count])
    drafted = stats(engine)["draft_tokens"]
    assert drafted == 0 if threshold == 1.0 else drafted > 100


@pytest.mark.parametrize(
    ("num_speculative_tokens", "exit_layers"),
    [
        (8, [2, 4, 6]),
        pytest.param(1, [2, 4, 6], marks=pytest.mark.slow),
        pytest.param(8, [4], marks=pytest.mark.slow),
        pytest.param(1, [4], marks=pytest.mark.slow),
    ],
)
def test_windows_and_exits(
    engines: EnginePool,
    vanilla: LLM,
    reference: list[Any],
    prompts: list[str],
    num_speculative_tokens: int,
    exit_layers: list[int],
) -> None:
    engine = engines.get(
        speculative_config=speculative(
            num_speculative_tokens=num_speculative_tokens,
            exit_layers=exit_layers,
            confidence_threshold=0.6,
        )
    )
    assert_same(vanilla, generate(engine, prompts, greedy(), batch=4), reference)
    assert stats(engine)["accepted_tokens"] > 100


def test_one_threshold_per_exit(
    engines: EnginePool, vanilla: LLM, reference: list[Any], prompts: list[str]
) -> None:
    """The first exit hardly ever confident, the second turned off: deep fill-in."""
    engine = engines.get(speculative_config=THREE_EXITS)
    set_thresholds(engine, 0.99, 1.0, 0.3)
    stats(engine, reset=True)
    assert_same(vanilla, generate(engine, prompts, greedy(), batch=16), reference)
    exits = stats(engine)["exits"]
    assert exits["4"]["heads_evaluated"] == 0
    assert exits["6"]["draft_tokens"] > 100


CHUNKED: dict[str, Any] = {"max_num_seqs": 6, "max_num_batched_tokens": 64}


def long_and_short(prompts: list[str], **options: Any) -> tuple[list[str], list[SamplingParams]]:
    """Long prompts arrive in chunks while others decode; requests come and go."""
    params = [greedy(16 + 3 * i, **options) for i in range(24)]
    return [prompts[i] * (1 + i % 4) for i in range(24)], params


@pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])
def test_chunked_prefill_mixes_with_decoding(
    engines: EnginePool, vanilla: LLM, prompts: list[str], asynchronous: bool
) -> None:
    """Down to the log-probabilities, of the prompts as well: what either half of a batch gives."""
    mixed, params = long_and_short(prompts, logprobs=1, prompt_logprobs=1)
    reference = generate(vanilla, mixed, params)
    options: dict[str, Any] = {"async_scheduling": True} if asynchronous else {}
    engine = engines.get(speculative_config=THREE_EXITS, **CHUNKED, **options)
    set_thresholds(engine, 0.5)
    stats(engine, reset=True)
    outputs = generate(engine, mixed, params)
    assert_same(vanilla, outputs, reference)
    for ours, theirs in zip(outputs, reference, strict=True):
        compare_logprobs(ours, theirs)
    counts = stats(engine)
    assert counts["prefill_steps"] > 30
    assert counts["mixed_steps"] > 30
    assert counts["deferred_steps"] > 10


def test_negative_control_shifted_states_beside_prefill(
    engines: EnginePool, vanilla: LLM, prompts: list[str]
) -> None:
    """Deferred states read one token off, in mixed batches alone."""

    def shift(worker: Any) -> None:
        verification = worker.model_runner.verification

        def forward(plan: VerificationPlan, *args: Any) -> Any:
            if plan.is_mixed:
                plan = replace(plan, offsets=(plan.offsets - 1).clip(min=0))
            return type(verification).forward(verification, plan, *args)

        verification.forward = forward

    def restore(worker: Any) -> None:
        del worker.model_runner.verification.forward

    mixed, params = long_and_short(prompts)
    reference = generate(vanilla, mixed, params)
    engine = engines.get(speculative_config=THREE_EXITS, **CHUNKED)
    set_thresholds(engine, 0.5)
    engine.collective_rpc(shift)
    try:
        outputs = generate(engine, mixed, params)
    finally:
        engine.collective_rpc(restore)
    wrong = [d for d in divergences(vanilla, outputs, reference) if d.gap > 0.05]
    assert len(wrong) > len(mixed) // 3


def test_prefix_caching_second_pass(engines: EnginePool, vanilla: LLM, prompts: list[str]) -> None:
    """What the first pass left in the cache, drafts included, is right to build on."""
    long = [p * 3 for p in prompts[:12]]
    reference = generate(vanilla, long, greedy(96))
    engine = engines.get(speculative_config=THREE_EXITS, enable_prefix_caching=True, block_size=32)
    assert_same(vanilla, generate(engine, long, greedy(96)), reference)
    second = generate(engine, long, greedy(96))
    assert_same(vanilla, second, reference)
    assert sum(o.num_cached_tokens or 0 for o in second) > 0
    # Continue from generated text, so that blocks filled while decoding are hit.
    longer = [
        {"prompt_token_ids": list(o.prompt_token_ids) + list(o.outputs[0].token_ids)}
        for o in reference
    ]
    continued = generate(engine, longer, greedy(32))
    assert sum(o.num_cached_tokens or 0 for o in continued) > sum(
        o.num_cached_tokens or 0 for o in second
    )
    assert_same(vanilla, continued, generate(vanilla, longer, greedy(32)))


def test_preemption(engines: EnginePool, vanilla: LLM, prompts: list[str]) -> None:
    """Too few KV blocks for all requests: some are preempted and start again."""
    params = greedy(160)
    reference = generate(vanilla, prompts[:8], params)
    engine = engines.get(
        speculative_config=THREE_EXITS,
        block_size=32,
        num_gpu_blocks_override=18,
        disable_log_stats=False,
    )
    assert_same(vanilla, generate(engine, prompts[:8], params), reference)
    preemptions = [m for m in engine.get_metrics() if m.name == "vllm:num_preemptions"]
    assert preemptions[0].value > 0
    assert stats(engine)["mixed_steps"] > 2


@pytest.mark.parametrize("max_num_batched_tokens", [64, pytest.param(2048, marks=pytest.mark.slow)])
def test_async_scheduling(
    engines: EnginePool, vanilla: LLM, prompts: list[str], max_num_batched_tokens: int
) -> None:
    params = [greedy(24 + 2 * i) for i in range(24)]
    reference = generate(vanilla, prompts[:24], params)
    engine = engines.get(
        speculative_config=THREE_EXITS,
        async_scheduling=True,
        max_num_seqs=6,
        max_num_batched_tokens=max_num_batched_tokens,
    )
    assert_same(vanilla, generate(engine, prompts[:24], params), reference)
    counts = stats(engine)
    assert counts["deferred_steps"] > 20
    assert counts["mean_acceptance_length"] > 1.5


def test_stop_strings_and_tokens(engines: EnginePool, vanilla: LLM, prompts: list[str]) -> None:
    """A stop inside a window of accepted drafts cuts where vanilla does."""
    params = SamplingParams(temperature=0, max_tokens=96, stop=["\n\n", ")", "self."])
    reference = generate(vanilla, prompts, params)
    engine = engines.get(speculative_config=THREE_EXITS)
    set_thresholds(engine, 0.5)
    outputs = generate(engine, prompts, params, batch=8)
    assert [o.outputs[0].text for o in outputs] == [o.outputs[0].text for o in reference]
    assert [o.outputs[0].stop_reason for o in outputs] == [
        o.outputs[0].stop_reason for o in reference
    ]
    assert any(o.outputs[0].stop_reason == ")" for o in outputs)


def test_max_model_len_edge(engines: EnginePool, vanilla: LLM, prompts: list[str]) -> None:
    """Windows end with the context; nothing is written past it (the KV check is on)."""
    ids = [vanilla.get_tokenizer().encode(p * 2)[:100] for p in prompts[:8]]
    given = [{"prompt_token_ids": i} for i in ids]
    small: dict[str, Any] = {"max_model_len": 128, "block_size": 32}
    reference = generate(engines.get(**small), given, greedy(1000))
    assert all(
        len(o.outputs[0].token_ids) == 128 - len(i) for o, i in zip(reference, ids, strict=True)
    )
    engine = engines.get(speculative_config=THREE_EXITS, **small)
    set_thresholds(engine, 0.3)
    assert_same(engines.get(**small), generate(engine, given, greedy(1000)), reference)


def test_max_model_len_auto(engines: EnginePool, vanilla: LLM, prompts: list[str]) -> None:
    """The limit that vLLM fits to the KV cache, once the speculator is made, is ours as well."""
    spec = DEVICE_LOOP | {"confidence_threshold": 0.3}
    # The model's own limit is 1024.
    options: dict[str, Any] = {"max_model_len": -1, "kv_cache_memory_bytes": 2 << 20}
    engine = engines.get(speculative_config=spec, block_size=32, **options)
    fitted = engine.llm_engine.model_config.max_model_len
    assert 128 <= fitted < 1024

    def limits(worker: Any) -> set[int]:
        speculator = worker.model_runner.speculator
        slots = np.arange(2)
        worker.model_runner.req_states.max_seq_len[slots] = 1 << 20
        ends = speculator.ledger.last_starts(slots) + 2
        return {speculator.device_rounds.loop.spans.max_model_len, *ends.tolist()}

    assert engine.collective_rpc(limits) == [{fitted}]
    ids = [vanilla.get_tokenizer().encode(p * 4)[: fitted - 30] for p in prompts[:4]]
    given = [{"prompt_token_ids": i} for i in ids]
    outputs = generate(engine, given, greedy(1000))
    lengths = [fitted - len(i) for i in ids]
    assert [len(tokens) for tokens in token_ids(outputs)] == lengths
    assert_same(vanilla, outputs, generate(vanilla, given, [greedy(n) for n in lengths]))


def compare_logprobs(ours: RequestOutput, theirs: RequestOutput) -> None:
    """The same probabilities of what is likely, in the prompt and in an equal output."""
    pairs = list(zip(ours.prompt_logprobs or (), theirs.prompt_logprobs or (), strict=True))
    if token_ids([ours]) == token_ids([theirs]):  # else a tie, allowed by assert_same
        a, b = ours.outputs[0].logprobs, theirs.outputs[0].logprobs
        pairs += zip(a or (), b or (), strict=True)
    for a, b in pairs:
        assert (a is None) == (b is None)
        for token in set(a or ()) & set(b or ()):
            assert a[token].logprob == pytest.approx(b[token].logprob, abs=1e-3)


@pytest.mark.parametrize("most_rows", [1 << 20, 8], ids=["at-once", "in-chunks"])
def test_logprobs_equal(
    engines: EnginePool,
    vanilla: LLM,
    prompts: list[str],
    monkeypatch: pytest.MonkeyPatch,
    most_rows: int,
) -> None:
    """Of likely tokens and of named ones, also where vLLM verifies a large batch in chunks."""
    monkeypatch.setattr(rejection_sampler, "get_max_chunk_logits", lambda vocab_size: most_rows)
    named = [{"logprob_token_ids": list(range(5, 5 + 3 * i))} for i in range(1, 4)]
    kinds: list[dict[str, Any]] = [{"logprobs": 3, "prompt_logprobs": 1}, {}, *named]
    params = [greedy(16 + 4 * i, **kinds[i % len(kinds)]) for i in range(10)]
    reference = generate(vanilla, prompts[:10], params)
    engine = engines.get(speculative_config=THREE_EXITS)
    set_thresholds(engine, 0.5)
    outputs = generate(engine, prompts[:10], params)
    assert_same(vanilla, outputs, reference)
    for ours, theirs, asked in zip(outputs, reference, params, strict=True):
        compare_logprobs(ours, theirs)
        if named := asked.logprob_token_ids:
            output = ours.outputs[0]
            for token, scores in zip(output.token_ids, output.logprobs or (), strict=True):
                assert scores.keys() == {*named, token}


def test_structured_outputs_equal(engines: EnginePool, vanilla: LLM, prompts: list[str]) -> None:
    from vllm.sampling_params import StructuredOutputsParams

    params = greedy(
        24,
        ignore_eos=False,
        structured_outputs=StructuredOutputsParams(regex=r"\(self, [a-z_]{3,12}\):\n    return 1"),
    )
    free = greedy(24)
    mixed = [params if i % 2 else free for i in range(12)]
    reference = generate(vanilla, prompts[:12], mixed)
    variants: list[dict[str, Any]] = [{}, {"async_scheduling": True, "max_num_seqs": 6}]
    for options in variants:
        engine = engines.get(speculative_config=THREE_EXITS, **options)
        set_thresholds(engine, 0.3)
        stats(engine, reset=True)
        assert_same(vanilla, generate(engine, prompts[:12], mixed), reference)
    # Six seats for twelve: prefill met pending tokens.
    assert stats(engine)["mixed_steps"] > 2


def test_abort_mid_stream(engines: EnginePool, vanilla: LLM, prompts: list[str]) -> None:
    """Aborted requests take their windows with them; the rest is undisturbed."""
    reference = generate(vanilla, prompts[:12], greedy())
    engine = engines.get(speculative_config=THREE_EXITS)
    set_thresholds(engine, 0.5)
    core = engine.llm_engine
    for i, prompt in enumerate(prompts[:12]):
        core.add_request(f"r{i}", prompt, greedy())
    finished: dict[str, Any] = {}
    aborted = {"r1", "r4", "r5", "r10"}
    step = 0
    while core.has_unfinished_requests():
        for output in core.step():
            if output.finished:
                finished[output.request_id] = output
        step += 1
        if step == 4:
            core.abort_request(sorted(aborted))
    # A finished request may have beaten its abort; none may be lost.
    survivors = [i for i in range(12) if f"r{i}" not in aborted]
    assert {f"r{i}" for i in survivors} <= set(finished)
    assert_same(vanilla, [finished[f"r{i}"] for i in survivors], [reference[i] for i in survivors])


def test_negative_control_shifted_states(
    engines: EnginePool, vanilla: LLM, reference: list[Any], prompts: list[str]
) -> None:
    """Deferred states read one token off must be seen by the same comparison."""

    def shift(worker: Any) -> None:
        deferred = worker.model_runner.speculator.deferred
        gather = type(deferred).gather
        deferred.gather = lambda slots, offsets: gather(deferred, slots, (offsets - 1).clamp(min=0))

    def restore(worker: Any) -> None:
        del worker.model_runner.speculator.deferred.gather

    engine = engines.get(speculative_config=THREE_EXITS)
    set_thresholds(engine, 0.5)
    engine.collective_rpc(shift)
    try:
        outputs = generate(engine, prompts, greedy(), batch=4)
    finally:
        engine.collective_rpc(restore)
    wrong = [d for d in divergences(vanilla, outputs, reference) if d.gap > 0.05]
    assert len(wrong) > len(prompts) // 3


def test_verification_is_what_makes_it_right(
    engines: EnginePool, vanilla: LLM, reference: list[Any], prompts: list[str]
) -> None:
    """The paper's sanity check: accept every draft unseen, and output drifts."""
    engine = engines.get(
        speculative_config=THREE_EXITS
        | {
            "confidence_threshold": 0.2,
            "rejection_sample_method": "synthetic",
            "synthetic_acceptance_rates": [1.0] * 5,
        }
    )
    outputs = generate(engine, prompts, greedy(), batch=4)
    assert len([d for d in divergences(vanilla, outputs, reference) if d.gap > 0.05]) > 4
