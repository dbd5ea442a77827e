"""KV connectors: KV that was stored is found by the next engine, and output stays vanilla's.

Beside requests that decode, with the costs of rounds measured at start. A connector is its
process's, so each engine here is stopped before another starts.

Starts three engines, and uses vanilla.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
from vllm import LLM, RequestOutput

from tests.support.cpu_offload import OFFLOADING
from tests.support.engines import (
    DEFAULTS,
    DEMO_MODEL,
    EnginePool,
    assert_same,
    async_scheduling_on_cpu,
    generate,
    greedy,
    speculative,
    stats,
    stop,
)
from vllm_adadecode.adaptive.draft_length import AdaptiveDraftLength, Choice

# Few seats: requests come while others decode.
OPTIONS: dict[str, Any] = {"max_num_seqs": 4, "block_size": 32}
PARAMS = [greedy(12 + 3 * i) for i in range(12)]


@pytest.fixture(autouse=True)
def always_drafting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rounds are measured, but what is drafted does not follow from it."""

    def choose(self: AdaptiveDraftLength, num_reqs: int) -> Choice:
        return self.most

    monkeypatch.setattr(AdaptiveDraftLength, "choose", choose)


@contextmanager
def started(transfer: dict[str, Any], loop: str, **options: Any) -> Iterator[LLM]:
    spec = speculative(cost_aware=True, draft_loop=loop, confidence_threshold=0.5)
    asynchronous = loop == "device"
    with async_scheduling_on_cpu() if asynchronous else nullcontext():
        engine = LLM(
            str(DEMO_MODEL),
            **DEFAULTS | OPTIONS | options,
            kv_transfer_config=transfer,
            async_scheduling=asynchronous,
            speculative_config=spec,
        )
    try:
        yield engine
    finally:
        stop(engine)


def note_loads(engine: LLM) -> list[int]:
    """Tokens that each request from now on has loaded."""
    core: Any = engine.llm_engine.engine_core
    connector, loads = core.engine_core.scheduler.connector, []
    update = type(connector).update_state_after_alloc

    def noted(request: Any, blocks: Any, num_external_tokens: int) -> None:
        if num_external_tokens:
            loads.append(num_external_tokens)
        update(connector, request, blocks, num_external_tokens)

    connector.update_state_after_alloc = noted
    return loads


def note_layers(worker: Any) -> None:
    """Have the worker's connector keep which layers it is told of, by batch."""
    connector = worker.model_runner.kv_connector.kv_connector
    bind, save = type(connector).bind_connector_metadata, type(connector).save_kv_layer
    connector.told = []

    def noted_bind(metadata: Any) -> None:
        connector.told.append([])
        bind(connector, metadata)

    def noted_save(layer_name: str, *args: Any, **kwargs: Any) -> None:
        connector.told[-1].append(layer_name)
        save(connector, layer_name, *args, **kwargs)

    connector.bind_connector_metadata, connector.save_kv_layer = noted_bind, noted_save


def test_stored_prompts_are_found_after_a_restart(
    engines: EnginePool, prompts: list[str], tmp_path: Path
) -> None:
    """By the host's loop, then the device's, whose rounds overlap where nothing is loaded."""
    vanilla, texts = engines.get(), [prompt * 2 for prompt in prompts[:12]]
    reference = generate(vanilla, texts, PARAMS)
    transfer: dict[str, Any] = {
        "kv_connector": "ExampleConnector",
        "kv_role": "kv_both",
        "kv_connector_extra_config": {"shared_storage_path": str(tmp_path)},
    }
    # The second stores some, and finds the others.
    found: list[Sequence[RequestOutput]] = []
    for loop, first, last in (("host", 0, 9), ("device", 0, 12)):
        with started(transfer, loop) as engine:
            loads = note_loads(engine)
            engine.collective_rpc(note_layers)
            assert stats(engine)["verification_steps"] == 0
            found.append(generate(engine, texts[first:last], PARAMS[first:last]))
            counts = stats(engine)
            told = engine.collective_rpc(
                lambda worker: worker.model_runner.kv_connector.kv_connector.told
            )[0]
        assert counts["draft_tokens"] > 100
        assert counts["mixed_steps"] > 2
        # Each layer once a batch: those of draft passes are none of its business.
        assert max(len(layers) for layers in told) == 8
        assert all(len(layers) == len(set(layers)) for layers in told)
        if loop == "host":
            assert loads == []
        else:
            assert len(loads) == 9
            assert all(tokens >= 32 for tokens in loads)
            assert counts["overlapped_steps"] > 10
    for outputs in found:
        assert_same(vanilla, outputs, reference[: len(outputs)])


def test_offloaded_kv_comes_back(engines: EnginePool, prompts: list[str]) -> None:
    """Of prompts and of what was generated, which verification completes after it was sampled."""
    vanilla = engines.get()
    texts: list[Any] = prompts[:12]
    with started(OFFLOADING, "device", enable_prefix_caching=True) as engine:
        loads = note_loads(engine)
        first = generate(engine, texts, [greedy(48)] * 12)
        assert loads == []
        # The next turn begins with the first one's prompt and answer.
        turns = [
            {"prompt_token_ids": [*(o.prompt_token_ids or ()), *o.outputs[0].token_ids]}
            for o in first
        ]
        assert engine.reset_prefix_cache()
        stats(engine, reset=True)
        second = generate(engine, turns, PARAMS)
        counts = stats(engine)
    assert len(loads) == 12
    beyond_prompt = [n - len(o.prompt_token_ids or ()) for n, o in zip(loads, first, strict=True)]
    assert sum(n > 0 for n in beyond_prompt) > 6
    assert min(counts["draft_tokens"], counts["mixed_steps"], counts["overlapped_steps"]) > 2
    assert_same(vanilla, first, generate(vanilla, texts, [greedy(48)] * 12))
    assert_same(vanilla, second, generate(vanilla, turns, PARAMS))
