"""The simulator against the engine: the same generations, counted by both."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.support import engines as harness
from tests.support.engines import DEMO_MODEL, EnginePool, greedy, speculative, token_ids
from tests.support.heads_samples import demo_heads
from vllm_adadecode.evaluation.data import DataSet, continue_prompts
from vllm_adadecode.evaluation.session import open_session
from vllm_adadecode.evaluation.simulate import Setting, Simulator
from vllm_adadecode.heads.thresholds import ExitThresholds
from vllm_adadecode.training.sequences import Sequence

PROMPTS, TOKENS, MAX_DRAFTS = 10, 64, 8
# What the issue asks of the simulator. The rest, behind a wrong draft, is all it can get wrong.
LAYER_PASSES = 0.03

SETTINGS = [
    Setting((0.75, 0.75, 0.75), MAX_DRAFTS, (0.0, 0.0, 0.0)),
    Setting((0.3, 0.3, 0.3), MAX_DRAFTS, (0.0, 0.0, 0.0)),
    Setting((0.6, 1.0, 0.7), MAX_DRAFTS, (0.45, 0.5, 0.55)),
]


@pytest.fixture(scope="module")
def gated_heads(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's heads with gates of random weights: neither always open nor always closed."""
    generator = torch.Generator().manual_seed(0)
    extra: dict[str, torch.Tensor] = {}
    for e in (2, 4, 6):
        extra[f"exit_{e}.gate_weight"] = torch.randn(256, generator=generator) * 0.02
        extra[f"exit_{e}.gate_bias"] = torch.zeros(1)
    folder = tmp_path_factory.mktemp("gated") / "heads"
    return Path(demo_heads(folder, extra, gate=True, gate_threshold=0.5))


def test_counts_are_the_engine_s(
    engines: EnginePool, prompts: list[str], gated_heads: Path
) -> None:
    engine = engines.get(
        kv_cache_memory_bytes=64 << 20,
        max_num_seqs=1,
        speculative_config=speculative(model=str(gated_heads), num_speculative_tokens=MAX_DRAFTS),
    )
    session = open_session(str(gated_heads), dtype="float32")
    simulator = None
    for setting in SETTINGS:
        thresholds = ExitThresholds.of(setting.thresholds, setting.gate_thresholds)

        def change(worker: object, thresholds: ExitThresholds = thresholds) -> None:
            worker.model_runner.speculator.ledger.thresholds = thresholds  # type: ignore[attr-defined]

        engine.collective_rpc(change)
        harness.stats(engine, reset=True)
        outputs = harness.generate(engine, prompts[:PROMPTS], greedy(TOKENS), batch=1)
        real = harness.stats(engine, reset=True)
        if simulator is None:
            sequences = tuple(
                Sequence(tuple(o.prompt_token_ids or ()), tuple(ids), "engine")
                for o, ids in zip(outputs, token_ids(outputs), strict=True)
            )
            traces = session.traces([DataSet("engine", sequences)])["engine"]
            assert all((t.generated == t.final).mean() > 0.98 for t in traces)
            simulator = Simulator(traces)
        counts = simulator.run(setting)
        assert counts.generated_tokens == real["generated_tokens"] == PROMPTS * (TOKENS - 1)
        assert counts.verification_steps == pytest.approx(real["verification_steps"], rel=0.01)
        assert counts.accepted_tokens == pytest.approx(real["accepted_tokens"], rel=0.01)
        for name in ("heads_evaluated", "gates_evaluated"):
            there = sum(e[name] for e in real["exits"].values())
            assert getattr(counts, name) == pytest.approx(there, rel=0.05), setting
        found, expected = counts.layers_executed_per_token, real["layers_executed_per_token"]
        assert found == pytest.approx(expected, rel=LAYER_PASSES), setting
        # It is drafting that is compared.
        assert counts.draft_tokens > 100


def test_prompts_are_continued_as_by_the_engine(engines: EnginePool, prompts: list[str]) -> None:
    engine = engines.get(kv_cache_memory_bytes=64 << 20)
    session = open_session(str(DEMO_MODEL), dtype="float32")
    assert session.target.tokenizer is not None
    ids = [session.target.tokenizer(text)["input_ids"] for text in prompts[:6]]
    ours = continue_prompts(session.target, ids, 24, "demo")
    expected = token_ids(harness.generate(engine, prompts[:6], greedy(24, ignore_eos=False)))
    assert [list(s.output_ids) for s in ours] == expected
    assert [list(s.prompt_ids) for s in ours] == ids
