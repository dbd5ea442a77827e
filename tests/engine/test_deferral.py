"""Verification starts where drafting stopped: shown by hooks on the decoder layers themselves.

Nothing here reads the method's own bookkeeping. A token is known by the KV slot that vLLM's forward
context gives it, which no two tokens of a round share; a pass is a call of a layer, in the draft
loop if a `propose` is running, else in verification.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
from vllm import LLM, RequestOutput, SamplingParams
from vllm.config import VllmConfig
from vllm.forward_context import get_forward_context

from tests.support.engines import (
    DEFAULTS,
    DEMO_MODEL,
    EnginePool,
    assert_same,
    generate,
    greedy,
    set_thresholds,
    speculative,
    stats,
    stop,
)
from vllm_adadecode.plugin import register
from vllm_adadecode.verify.plan import make_plan

EXITS = [2, 4, 6]
NUM_LAYERS = 8
K = 5
SPEC = speculative(num_speculative_tokens=K, exit_layers=EXITS)


@dataclass
class Pass:
    """One call of one layer."""

    layer: int
    # (KV slot, position) of each token.
    tokens: list[tuple[int, int]]


@dataclass
class Round:
    """A draft loop and the verification that follows it."""

    draft: list[Pass] = field(default_factory=list)
    verify: list[Pass] = field(default_factory=list)
    # Of the verified batch, in its order: does the token belong to a request that still prefills?
    prefilling: list[bool] = field(default_factory=list)
    # Drafts that `propose` made, of all requests.
    num_drafts: int = 0

    @property
    def has_prefill(self) -> bool:
        return any(self.prefilling)

    def executions(self, layer: int) -> Counter[tuple[int, int]]:
        """How often each token went through a layer in this round."""
        return Counter(
            token for p in self.draft + self.verify if p.layer == layer for token in p.tokens
        )

    def window(self) -> set[tuple[int, int]]:
        """What was verified or prefilled: the tokens that came to the last layer."""
        return {t for p in self.verify if p.layer == NUM_LAYERS - 1 for t in p.tokens}

    def prefilled(self) -> set[tuple[int, int]]:
        """Those of `window` that were prefilled: the last layer runs in the order of the batch."""
        return {
            token
            for p in self.verify
            if p.layer == NUM_LAYERS - 1
            for token, prefilling in zip(p.tokens, self.prefilling, strict=True)
            if prefilling
        }

    def deferred(self) -> set[tuple[int, int]]:
        """Those of `window` whose passes began in the draft loop."""
        return {t for p in self.draft for t in p.tokens} & self.window()


@contextmanager
def recorded(engine: LLM) -> Iterator[list[Round]]:
    """Record every layer pass of an in-process engine."""
    rounds = [Round()]
    drafting = [False]
    undo: list[Any] = []

    def hook(layer: int, name: str) -> Any:
        def note(module: Any, args: tuple[Any, ...]) -> None:
            slots = get_forward_context().slot_mapping
            if not isinstance(slots, dict) or name not in slots:
                return  # a dummy run
            positions = args[0].tolist()
            tokens = list(zip(slots[name].tolist()[: len(positions)], positions, strict=True))
            passes = rounds[-1].draft if drafting[0] else rounds[-1].verify
            passes.append(Pass(layer, tokens))

        return note

    def install(worker: Any) -> None:
        runner = worker.model_runner
        for i, layer in enumerate(runner.model.model.layers):
            handle = layer.register_forward_pre_hook(hook(i, layer.self_attn.attn.layer_name))
            undo.append(handle.remove)
        propose, prepare_inputs = runner.speculator.propose, runner.prepare_inputs

        def propose_noted(*args: Any, **kwargs: Any) -> Any:
            rounds.append(Round())
            drafting[0] = True
            try:
                return propose(*args, **kwargs)
            finally:
                drafting[0] = False
                rounds[-1].num_drafts = sum(map(len, runner.speculator.ledger.last_drafts))

        def prepare_inputs_noted(*args: Any, **kwargs: Any) -> Any:
            input_batch = prepare_inputs(*args, **kwargs)
            rounds[-1].prefilling = np.repeat(
                input_batch.is_prefilling_np, input_batch.num_scheduled_tokens
            ).tolist()
            return input_batch

        runner.speculator.propose = propose_noted
        runner.prepare_inputs = prepare_inputs_noted
        undo.append(lambda: delattr(runner.speculator, "propose"))
        undo.append(lambda: delattr(runner, "prepare_inputs"))

    engine.collective_rpc(install)
    try:
        yield rounds
    finally:
        for function in undo:
            function()


def run_twice(rounds: list[Round]) -> list[str]:
    """Tokens that went through a layer not exactly once in a round."""
    wrong = []
    for number, r in enumerate(rounds):
        if not r.verify:
            continue
        for layer in range(NUM_LAYERS):
            executions = r.executions(layer)
            for token in r.window() | set(executions):
                if executions[token] != 1:
                    wrong.append(f"round {number} layer {layer} {token}: {executions[token]}")
    return wrong


MIXED = (0.5, 0.6, 0.4)
# Thresholds, batch and async scheduling of the cases that are not slow.
FAST = ((MIXED, 4, False), (MIXED, 4, True), ((1.0, 0.3, 1.0), 4, False), ((0.0,), 1, False))


@pytest.mark.parametrize(
    ("thresholds", "batch", "asynchronous"),
    [
        pytest.param(t, batch, a, marks=() if (t, batch, a) in FAST else pytest.mark.slow)
        for t in (MIXED, (0.9, 0.95, 0.5), (1.0, 0.3, 1.0), (0.0,))
        for batch in (1, 4)
        for a in (False, True)
    ],
)
def test_every_layer_once(
    engines: EnginePool,
    prompts: list[str],
    thresholds: tuple[float, ...],
    batch: int,
    asynchronous: bool,
) -> None:
    options: dict[str, Any] = {"async_scheduling": True} if asynchronous else {}
    engine = engines.get(speculative_config=SPEC, max_num_seqs=4, **options)
    set_thresholds(engine, *thresholds)
    stats(engine, reset=True)
    with recorded(engine) as rounds:
        outputs = generate(engine, prompts[:4], greedy(40), batch=batch)
    vanilla = engines.get()
    assert_same(vanilla, outputs, generate(vanilla, prompts[:4], greedy(40), batch=batch))

    assert not run_twice(rounds)

    decoding = [r for r in rounds if not r.has_prefill and r.verify]
    counts = stats(engine)
    # The hooks saw what the counters say, pass for pass and token for token.
    drafted = [p for r in rounds for p in r.draft]
    verified = [p for r in decoding for p in r.verify]
    assert counts["draft_layers"] == len(drafted)
    assert counts["draft_token_layers"] == sum(len(p.tokens) for p in drafted)
    assert counts["verification_layers"] == len(verified)
    assert counts["verify_token_layers"] == sum(len(p.tokens) for p in verified)
    assert counts["deferred_steps"] + counts["plain_steps"] == len(decoding)

    # All that was generated came out of these rounds, but for each request's first token.
    verified_tokens = sum(len(r.window()) for r in decoding)
    assert verified_tokens >= 4 * 39
    rejected = sum(e["rejected_tokens"] for e in counts["exits"].values())
    assert verified_tokens == counts["generated_tokens"] + rejected
    # And it was not for lack of drafts.
    assert verified_tokens > 1.5 * counts["verification_steps"]
    early = sum(len(p.tokens) for r in decoding for p in r.draft if p.layer == 0)
    late = sum(len(p.tokens) for r in decoding for p in r.verify if p.layer == 0)
    assert early > late
    assert {p.layer for r in decoding for p in r.draft} <= set(range(EXITS[-1]))
    assert verified_tokens == sum(r.num_drafts for r in decoding) + counts["verification_steps"]


def test_fill_in_happens(engines: EnginePool, prompts: list[str]) -> None:
    """Alone in the batch, a request takes several tokens through a deeper span at once."""
    engine = engines.get(speculative_config=SPEC, max_num_seqs=4)
    set_thresholds(engine, *MIXED)
    with recorded(engine) as rounds:
        generate(engine, prompts[:4], greedy(40), batch=1)
    for start, stop_ in ((2, 4), (4, 6)):
        passes = [p for r in rounds for p in r.draft if start <= p.layer < stop_]
        assert max(len(p.tokens) for p in passes) > 1
        for p in passes:
            positions = [position for _, position in p.tokens]
            assert positions == list(range(positions[0], positions[0] + len(positions)))
    # Span 0 never waits.
    assert all(len(p.tokens) == 1 for r in rounds for p in r.draft if p.layer < 2)


def test_a_recomputing_verification_is_seen(
    engines: EnginePool, prompts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Negative control: verification from layer 0 gives the same tokens, and fails the check."""
    engine = engines.get(speculative_config=SPEC, max_num_seqs=4)
    set_thresholds(engine, *MIXED)
    monkeypatch.setattr("vllm_adadecode.engine.model_runner.make_plan", lambda *_: None)
    with recorded(engine) as rounds:
        outputs = generate(engine, prompts[:4], greedy(40))
    vanilla = engines.get()
    assert_same(vanilla, outputs, generate(vanilla, prompts[:4], greedy(40)))
    assert len(run_twice(rounds)) > 100


# --- prefill beside deferred tokens ------------------------------------------------------------


def mixed_requests(prompts: list[str]) -> tuple[list[str], list[SamplingParams]]:
    """Prompts that arrive in chunks of up to 64 tokens while others decode."""
    return [prompts[i] * (1 + i % 4) for i in range(12)], [greedy(16 + 5 * i) for i in range(12)]


def generate_mixed(
    engines: EnginePool, prompts: list[str], **options: Any
) -> tuple[LLM, list[Round], list[RequestOutput]]:
    """The engine, its rounds and its outputs, which are vanilla's."""
    engine = engines.get(
        speculative_config=SPEC, max_num_seqs=6, max_num_batched_tokens=64, **options
    )
    set_thresholds(engine, *MIXED)
    stats(engine, reset=True)
    with recorded(engine) as rounds:
        outputs = generate(engine, *mixed_requests(prompts))
    vanilla = engines.get()
    assert_same(vanilla, outputs, generate(vanilla, *mixed_requests(prompts)))
    return engine, rounds, outputs


@pytest.mark.parametrize(
    "asynchronous", [pytest.param(False, marks=pytest.mark.slow), True], ids=["sync", "async"]
)
def test_every_layer_once_beside_prefill(
    engines: EnginePool, prompts: list[str], asynchronous: bool
) -> None:
    """Prefill runs all spans; deferred tokens join it at their depth, in the same passes."""
    options: dict[str, Any] = {"async_scheduling": True} if asynchronous else {}
    engine, rounds, _ = generate_mixed(engines, prompts, **options)
    assert not run_twice(rounds)

    mixed = [r for r in rounds if r.has_prefill and r.deferred()]
    joined_at: Counter[int] = Counter()
    for r in mixed:
        # One pass a layer, shared; drafting took nothing of a prefill in advance.
        assert [p.layer for p in r.verify] == list(range(NUM_LAYERS))
        assert not r.prefilled() & r.deferred()
        for p in r.verify:
            assert set(p.tokens) >= r.prefilled()
        drafted = Counter(token for p in r.draft for token in p.tokens)
        joined_at.update(drafted[token] for token in r.deferred())
    # Deferred tokens did meet prefill, from every depth.
    assert set(joined_at) == set(EXITS)
    assert sum(joined_at.values()) > 20

    # What the counters say of these batches is what the hooks saw.
    counts = stats(engine)
    passes = [(r.prefilled(), p) for r in mixed for p in r.verify]
    prefill_token_layers = sum(len(prefilled & set(p.tokens)) for prefilled, p in passes)
    token_layers = sum(len(p.tokens) for _, p in passes)
    assert counts["mixed_steps"] == len(mixed)
    assert counts["mixed_layers"] == len(passes)
    assert counts["mixed_prefill_token_layers"] == prefill_token_layers
    assert counts["mixed_verify_token_layers"] == token_layers - prefill_token_layers
    # And drafting and verification share the layers of a pending token, with nothing left over.
    drafted_layers = sum(len(p.tokens) for r in mixed for p in r.draft)
    pending = sum(len(r.window() - r.prefilled()) for r in mixed)
    assert counts["mixed_verify_token_layers"] + drafted_layers == NUM_LAYERS * pending


def test_a_recomputing_mixed_batch_is_seen(
    engines: EnginePool, prompts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Negative control: full passes beside prefill give the same tokens, and fail the check."""

    def only_decoding(input_batch: Any, windows: Any) -> Any:
        return None if input_batch.has_prefill else make_plan(input_batch, windows)

    monkeypatch.setattr("vllm_adadecode.engine.model_runner.make_plan", only_decoding)
    engine, rounds, _ = generate_mixed(engines, prompts)
    assert len(run_twice([r for r in rounds if r.has_prefill])) > 100
    assert not run_twice([r for r in rounds if not r.has_prefill])
    assert stats(engine)["mixed_steps"] == 0


# --- KV slots ----------------------------------------------------------------------------------


def draft_after_prompts(*prompt_lengths: int, lookahead: int | None = None) -> None:
    """K drafts after each prompt, with ``lookahead`` slots reserved instead of what we ask for."""
    register()  # or the plugin's own patch would come after this one
    lookahead_patch = patch.object(VllmConfig, "num_lookahead_tokens", lookahead)
    with nullcontext() if lookahead is None else lookahead_patch:
        engine = LLM(
            str(DEMO_MODEL),
            **DEFAULTS,
            block_size=32,
            speculative_config=SPEC | {"confidence_threshold": 0.0},
        )
    try:
        for length in prompt_lengths:
            ids = list(range(1, 1 + length))
            generate(engine, [{"prompt_token_ids": ids}], greedy(12))
    finally:
        stop(engine)


# After a prompt of 28 tokens the window is at positions 28 to 33, of which the draft loop writes
# all but the newest: 28 to 32, the last one in the second block of 32.
@pytest.mark.parametrize("lookahead", [0, K - 1])
def test_kv_past_the_blocks_is_caught(lookahead: int) -> None:
    with pytest.raises(AssertionError, match="KV written past the allocated blocks"):
        draft_after_prompts(28, lookahead=lookahead)


def test_our_lookahead_is_enough() -> None:
    draft_after_prompts(27, 28, 29, 31, 32, 33)
