"""Spans compiled as vLLM compiles models: each its own graph, and the same output."""

from typing import Any

import pytest
import torch
from torch import nn
from vllm.config import VllmConfig

from tests.support.engines import EnginePool, assert_same, generate, greedy, speculative, stats
from vllm_adadecode.model.target import make_span


@pytest.mark.slow
def test_compiled_output_equals_vanilla(engines: EnginePool, prompts: list[str]) -> None:
    vanilla = engines.get(enforce_eager=False)
    reference = generate(vanilla, prompts[:16], greedy(), batch=4)
    engine = engines.get(
        enforce_eager=False,
        max_num_seqs=4,
        speculative_config=speculative(exit_layers=[2, 4, 6], confidence_threshold=0.6),
    )
    assert_same(vanilla, generate(engine, prompts[:16], greedy()), reference)
    counts = stats(engine)
    assert counts["deferred_steps"] > 20
    assert counts["mixed_steps"] > 4

    def compiled(worker: Any) -> list[bool]:
        # Either kept in memory, or loaded from vLLM's cache on disk.
        return [
            span.compiled or getattr(span, "aot_compiled_fn", None) is not None
            for span in worker.model_runner.speculator.model.span_modules
        ]

    assert engine.collective_rpc(compiled) == [[True] * 4]


def test_spans_share_nothing_that_compiled_code_is_found_by() -> None:
    class Scale(nn.Module):
        def __init__(self, factor: float) -> None:
            super().__init__()
            self.factor = factor

        def forward(
            self, positions: torch.Tensor, hidden: torch.Tensor, residual: torch.Tensor | None
        ) -> tuple[torch.Tensor, torch.Tensor]:
            return hidden * self.factor, hidden

    spans = [make_span([Scale(f)], f"layers_{i}", VllmConfig()) for i, f in enumerate((2.0, 3.0))]
    assert len({type(span) for span in spans}) == 2
    assert len({type(span).forward.__code__ for span in spans}) == 2
    assert len({type(span).forward.__qualname__ for span in spans}) == 2
    x = torch.ones(1, 1)
    assert [float(span(torch.zeros(1), x, None)[0]) for span in spans] == [2.0, 3.0]
