"""Hand-made and random traces for the tests of evaluation."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from vllm_adadecode.evaluation.trace import Trace


def make_trace(
    confidence: ArrayLike,
    correct: ArrayLike,
    exit_layers: tuple[int, ...] = (2, 4),
    num_layers: int = 8,
    gate: ArrayLike | None = None,
) -> Trace:
    """A trace of [E, P] confidences and whether the heads are right; the target always says 7."""
    values = np.array(confidence, dtype=np.float32)
    generated = np.full(values.shape[1], 7)
    return Trace(
        exit_layers=exit_layers,
        num_layers=num_layers,
        generated=generated,
        final=generated,
        token=np.where(np.array(correct, dtype=bool), 7, 8),
        confidence=values,
        gate=np.ones_like(values) if gate is None else np.array(gate, dtype=np.float32),
    )


def random_trace(seed: int, positions: int, exit_layers: tuple[int, ...] = (2, 4, 6)) -> Trace:
    """Calibrated heads: right as often as they are confident."""
    rng = np.random.default_rng(seed)
    shape = (len(exit_layers), positions)
    confidence, gate = rng.random(shape), rng.random(shape)
    return make_trace(confidence, rng.random(shape) < confidence, exit_layers, 8, gate)
