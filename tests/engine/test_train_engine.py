"""From a target to served heads, with real engines: generate, train, serve, compare."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.support.engines import (
    DEMO_MODEL,
    EnginePool,
    assert_same,
    generate,
    greedy,
    speculative,
    stats,
    token_ids,
)
from vllm_adadecode.cli import main
from vllm_adadecode.heads import HeadsConfig
from vllm_adadecode.training.sequences import read_sequences

ENGINE = {
    "dtype": "float32",
    "max_model_len": 256,
    "enforce_eager": True,
    "kv_cache_memory_bytes": 64 << 20,
}


@pytest.mark.slow
def test_trained_heads_serve_their_target(
    engines: EnginePool, prompts: list[str], tmp_path: Path
) -> None:
    data, output = tmp_path / "prompts.jsonl", tmp_path / "heads"
    data.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in prompts[8:32]))
    command = ["train", str(DEMO_MODEL), "--data", str(data), "--output", str(output)]
    command += ["--cache", str(tmp_path / "cache"), "--engine-args", json.dumps(ENGINE)]
    command += ["--max-tokens", "48", "--ignore-eos", "--held-out", "0.25", "--batch-size", "4"]
    command += ["--epochs", "2", "--exit-layers", "2", "4", "--gate", "--draft-vocab", "1024"]
    assert main(command) == 0

    # The data is the target's own: what an engine without the method says.
    vanilla = engines.get()
    (shard,) = (tmp_path / "cache" / "generations").glob("*/0*.jsonl")
    own = read_sequences(shard)
    assert len(own) == 24
    reference = generate(vanilla, prompts[8:32], greedy(48))
    same = [s.output_ids == tuple(ids) for s, ids in zip(own, token_ids(reference), strict=True)]
    # Ties between equally likely tokens may fall the other way in another batch.
    assert sum(same) >= 22

    config = HeadsConfig.load(output)
    for e, after in config.provenance["held_out"]["exits"].items():
        before = config.provenance["held_out"]["before_training"][e]
        assert after["loss"] <= before["loss"] + 1e-6
        assert after["coverage"] > 0.1

    ours = engines.get(speculative_config=speculative(model=str(output)))
    stats(ours, reset=True)
    assert_same(
        vanilla,
        generate(ours, prompts[:8], greedy(48)),
        generate(vanilla, prompts[:8], greedy(48)),
    )
    counts = stats(ours)
    assert counts["draft_tokens"] > 50, counts
    assert counts["accepted_tokens"] > 0.8 * counts["draft_tokens"], counts


def test_sampling_of_generations() -> None:
    from vllm_adadecode.training.generate_worker import sampling_params
    from vllm_adadecode.training.request import GenerationSettings

    greedy_params = sampling_params(GenerationSettings(max_tokens=9).sampling(), 3, room=5)
    assert (greedy_params.temperature, greedy_params.max_tokens) == (0.0, 5)
    assert greedy_params.seed is None
    settings = GenerationSettings(
        max_tokens=9, temperature=0.8, top_p=0.9, seed=10, ignore_eos=True
    )
    drawn = sampling_params(settings.sampling(), 3, room=50)
    assert (drawn.temperature, drawn.top_p, drawn.max_tokens) == (0.8, 0.9, 9)
    # Prompts have draws of their own, the same in a run that goes on.
    assert (drawn.seed, drawn.ignore_eos) == (13, True)
