"""Each supported architecture, cut into spans, generates what the uncut one does."""

import re
from pathlib import Path
from typing import Any

import pytest

from tests.support.engines import (
    EnginePool,
    EveryStep,
    assert_same,
    generate,
    greedy,
    poll_with,
    set_draft_loop,
    set_thresholds,
    speculative,
    stats,
)
from tests.support.tiny_models import ARCHITECTURES, NUM_LAYERS, random_prompts, save_tiny_model
from vllm_adadecode.model.target import SUPPORTED_ARCHITECTURES
from vllm_adadecode.spans.ragged import MASKS_SLIDING_WINDOW

# The others differ from these in what a span does not see.
FAST = ("LlamaForCausalLM", "Qwen3MoeForCausalLM")


@pytest.mark.parametrize(
    "architecture",
    [
        pytest.param(name, marks=() if name in FAST else pytest.mark.slow)
        for name in SUPPORTED_ARCHITECTURES
    ],
)
def test_cut_model_equals_uncut(
    engines: EnginePool, tmp_path_factory: pytest.TempPathFactory, architecture: str
) -> None:
    engines.restart()  # mixture-of-experts models need a process group that others do not have
    path = save_tiny_model(tmp_path_factory.mktemp(architecture), architecture)
    prompts = random_prompts(12)
    vanilla = engines.get(path)
    reference = generate(vanilla, prompts, greedy(32))
    engine = engines.get(
        path,
        speculative_config=speculative(
            num_speculative_tokens=4, exit_layers=[1, 3, 5], draft_loop="device"
        ),
    )
    # All steps of the device's loop run, also those that are padding alone.
    engine.collective_rpc(poll_with(EveryStep()))
    # Random weights are hardly ever confident: low thresholds make every exit draft, and mixed
    # ones make windows with tokens at every depth.
    for loop, thresholds in [
        ("host", (0.0,)),
        ("host", (0.03, 0.03, 0.0)),
        ("host", (0.05, 0.02, 0.02)),
        ("device", (0.03, 0.03, 0.0)),
    ]:
        set_draft_loop(engine, loop)
        set_thresholds(engine, *thresholds)
        stats(engine, reset=True)
        assert_same(vanilla, generate(engine, prompts, greedy(32), batch=6), reference)
        counts = stats(engine)
        assert counts["draft_tokens"] > 50
        assert counts["num_layers"] == NUM_LAYERS


@pytest.mark.slow
def test_sliding_window(engines: EnginePool, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Blocks wholly below the window are freed: spans read none of them, as vLLM does not."""
    path = save_tiny_model(
        tmp_path_factory.mktemp("window"), "MistralForCausalLM", sliding_window=16
    )
    prompts, options = random_prompts(12), {"block_size": 16}
    vanilla = engines.get(path, **options)
    reference = generate(vanilla, prompts, greedy(64))
    engine = engines.get(
        path,
        speculative_config=speculative(num_speculative_tokens=4, exit_layers=[1, 3, 5]),
        **options,
    )
    set_thresholds(engine, 0.03, 0.03, 0.0)
    assert_same(vanilla, generate(engine, prompts, greedy(64), batch=6), reference)
    assert stats(engine)["draft_tokens"] > 50

    def first_blocks(worker: Any) -> list[int]:
        spans = worker.model_runner.speculator.spans
        return spans.input_block_tables[0][:6, 0].tolist()

    # Block 0 is nobody's.
    assert any(engine.collective_rpc(first_blocks)[0]) != MASKS_SLIDING_WINDOW


def test_every_supported_architecture_has_a_model() -> None:
    assert set(ARCHITECTURES) == set(SUPPORTED_ARCHITECTURES)


def test_documented() -> None:
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    for architecture in SUPPORTED_ARCHITECTURES:
        assert re.search(architecture, readme)
