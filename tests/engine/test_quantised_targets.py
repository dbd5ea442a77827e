"""Quantised targets and caches: greedy output equals vanilla's on the same quantised target.

With the demo's own heads, which were trained on its bfloat16 weights and have a gate and a draft
vocabulary. A quantised matrix is quantised to nearest, so the targets are worse than their original
and differ from it; that does not matter here.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from vllm import LLM
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod

from tests.support.engines import (
    DEMO_MODEL,
    EnginePool,
    assert_same,
    divergences,
    generate,
    greedy,
    speculative,
    stats,
    token_ids,
)
from tests.support.heads_samples import demo_heads
from tests.support.quantised_targets import save_quantised

# One bfloat16 step of a logit between 16 and 32 is 0.125: what two batch shapes may differ by.
BFLOAT16_TIE = 0.25
NUM_PROMPTS = 8
# As vLLM's kernels ask: its FP8 ones for CPUs need AMX, and without it vanilla's int8 matrices are
# garbage after a reload.
HAS_AMX = torch.cpu._is_amx_tile_supported()
KINDS = ["int8", "packed-int4", "awq", *(["fp8-block"] if HAS_AMX else [])]
RELOADED = "int8" if HAS_AMX else "packed-int4"


def run(engine: LLM, prompts: list[str], batch: int = 4) -> list[Any]:
    return generate(engine, prompts[:NUM_PROMPTS], greedy(), batch)


def pair(engines: EnginePool, target: Path, **options: Any) -> tuple[LLM, LLM]:
    """Vanilla, and the method with the demo's heads."""
    options = {"dtype": "bfloat16"} | options
    return (
        engines.get(target, **options),
        engines.get(target, **options, speculative_config=speculative()),
    )


def compare(vanilla: LLM, engine: LLM, prompts: list[str], batch: int = 4) -> list[Any]:
    """Outputs, the same as vanilla's, and made by drafting and deferring."""
    stats(engine, reset=True)
    outputs = run(engine, prompts, batch)
    assert_same(vanilla, outputs, run(vanilla, prompts, batch), tie_gap=BFLOAT16_TIE)
    counts = stats(engine)
    assert counts["draft_tokens"] > 100
    assert counts["draft_acceptance_rate"] > 0.8
    assert counts["deferred_steps"] > 10
    return outputs


def unquantised_layers(worker: Any) -> list[str]:
    model = worker.model_runner.model
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, LinearBase)
        and isinstance(module.quant_method, UnquantizedLinearMethod)
    ]


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_checkpoints(engines: EnginePool, prompts: list[str], tmp_path: Path, kind: str) -> None:
    vanilla, engine = pair(engines, save_quantised(tmp_path / kind, kind))
    for each in (vanilla, engine):
        assert each.collective_rpc(unquantised_layers) == [[]]
    # With FP8 weights vanilla itself says something else at another batch size, too often.
    outputs = compare(vanilla, engine, prompts, 1 if kind == "fp8-block" else 4)
    if kind == RELOADED:
        check_reload(engine, prompts, outputs)
        check_control(vanilla, engine, prompts)


def check_reload(engine: LLM, prompts: list[str], outputs: list[Any]) -> None:
    """Weights that vLLM repacks after loading come again, and so does the heads' copy."""

    def spoil(worker: Any) -> None:
        worker.model_runner.speculator.model.projection.rows.zero_()

    stats(engine, reset=True)
    engine.collective_rpc(spoil)
    engine.collective_rpc("reload_weights")
    assert token_ids(run(engine, prompts)) == token_ids(outputs)
    assert stats(engine)["draft_acceptance_rate"] > 0.8


def check_control(vanilla: LLM, engine: LLM, prompts: list[str]) -> None:
    """Deferred states read one token off must be seen by the same comparison."""

    def shift(worker: Any) -> None:
        deferred = worker.model_runner.speculator.deferred
        gather = type(deferred).gather
        deferred.gather = lambda slots, offsets: gather(deferred, slots, (offsets - 1).clamp(min=0))

    def restore(worker: Any) -> None:
        del worker.model_runner.speculator.deferred.gather

    engine.collective_rpc(shift)
    try:
        found = divergences(vanilla, run(engine, prompts), run(vanilla, prompts))
    finally:
        engine.collective_rpc(restore)
    assert len([d for d in found if d.gap > 2 * BFLOAT16_TIE]) > NUM_PROMPTS // 3


@pytest.mark.slow
def test_fp8_cache(engines: EnginePool, prompts: list[str]) -> None:
    def cache_bytes(worker: Any) -> set[int]:
        modules = worker.model_runner.model.modules()
        return {m.kv_cache.element_size() for m in modules if hasattr(m, "kv_cache")}

    vanilla, engine = pair(engines, DEMO_MODEL, kv_cache_dtype="fp8")
    for each in (vanilla, engine):
        assert each.collective_rpc(cache_bytes) == [{1}]
    compare(vanilla, engine, prompts)


def test_gptq_with_its_lm_head(engines: EnginePool, prompts: list[str], tmp_path: Path) -> None:
    """The heads' draft vocabulary is copied out of it; heads without one ask the target itself."""
    target = save_quantised(tmp_path / "target", "gptq", lm_head=True)
    vanilla, engine = pair(engines, target)

    def rows(worker: Any) -> torch.Tensor:
        model = worker.model_runner.model
        assert unquantised_layers(worker) == []
        assert not hasattr(model.lm_head, "weight")
        projection = worker.model_runner.speculator.model.projection
        return torch.cat([projection.draft_vocab[:, None], projection.rows.double()], 1)

    copy = engine.collective_rpc(rows)[0]
    original = load_file(DEMO_MODEL / "model.safetensors")["model.embed_tokens.weight"]
    exact = original[copy[:, 0].long()].double()
    # Half a step of the coarsest scale of a row, and bfloat16's rounding.
    allowed = exact.abs().amax(-1, keepdim=True) * (1 / 14 + 2.0**-7)
    assert ((copy[:, 1:] - exact).abs() <= allowed).all()
    compare(vanilla, engine, prompts)

    spec = speculative(model=demo_heads(tmp_path / "heads"))
    compare(vanilla, engines.get(target, dtype="bfloat16", speculative_config=spec), prompts)
