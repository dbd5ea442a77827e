"""What is asked of the kernels alone, not of their references: run by compare.py."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import torch

from tests.kernels.head_cases import blocks, extreme_rows, make_head, sampling_inputs
from tests.kernels.registry import floats
from vllm_adadecode.kernels.confidence import head_confidence
from vllm_adadecode.kernels.gate import live_first
from vllm_adadecode.kernels.head_weight import HeadWeight
from vllm_adadecode.kernels.projection_reference import project
from vllm_adadecode.kernels.sampling import head_sample


def batch_invariance() -> str:
    """A row's result is the same to the bit alone, among others, and beside NaN and infinity."""
    rng = torch.Generator("cpu").manual_seed(2)
    for dtype in (torch.float32, torch.bfloat16):
        head = make_head(rng, 300, 64, dtype)
        x = floats(rng, 40, 64, dtype=dtype)
        broken = x.clone()
        broken[1::2] = torch.nan
        broken[3] = torch.inf
        for cut in (blocks(), blocks(tiles_per_split=2)):
            whole = head_confidence(x, head, 0.2, blocks=cut)
            beside = head_confidence(broken, head, 0.2, blocks=cut)
            for row in (0, 18, 38):
                alone = head_confidence(x[row : row + 1], head, 0.2, blocks=cut)
                for other in (whole, beside):
                    same = torch.equal(alone.p, other.p[row : row + 1])
                    if not same or alone.token[0] != other.token[row]:
                        return f"{dtype} row {row}: {alone.p[0]} alone, {other.p[row]} in a batch"
    return ""


def same_draw_as_vllm() -> str:
    """The draw is what vLLM's own kernel draws from the stored logits, whichever draft it is."""
    from vllm.v1.worker.gpu.sample.gumbel import gumbel_sample

    rng = torch.Generator("cpu").manual_seed(3)
    head = make_head(rng, 1500, 32, torch.float32)
    inputs = sampling_inputs(rng, 20)
    x = floats(rng, 20, 32)
    for column in (None, 0, 2):
        cached: dict[str, torch.Tensor] = {}
        if column is not None:
            cached["logits_cache"] = torch.zeros(24, 3, 1500)
            cached["logits_cache_col"] = torch.tensor(column)
        ours = head_sample(x, head, 0.2, **inputs, **cached, blocks=blocks(BLOCK_V=256)).sampled
        theirs = gumbel_sample(
            project(x, head.weight),
            inputs["slots"],
            inputs["temperature"],
            inputs["seeds"],
            inputs["positions"],
            apply_temperature=True,
            is_drafting=True,
            **cached,
        )
        if not torch.equal(ours, theirs):
            return f"draft {column}: drew {ours.tolist()}, vLLM {theirs.tolist()}"
    return ""


def dead_rows_load_nothing() -> str:
    """Only row tiles with a live row load weights; counted in the interpreter's memory."""
    from triton.runtime.interpreter import InterpreterBuilder

    rng = torch.Generator("cpu").manual_seed(4)
    head = make_head(rng, 100, 32, torch.float32)
    first = head.weight.data_ptr()
    last = first + head.weight.nbytes
    load = InterpreterBuilder.create_masked_load
    counted = 0

    def counting(self: Any, pointers: Any, *rest: Any) -> Any:
        nonlocal counted
        counted += bool(((pointers.data >= first) & (pointers.data < last)).any())
        return load(self, pointers, *rest)

    loads = []
    with patch.object(InterpreterBuilder, "create_masked_load", counting):
        for live in (0, 1, 16, 17, 40):
            counted = 0
            order, num_live = live_first(torch.arange(40) < live)
            x = floats(rng, 40, 32)
            head_confidence(x, head, 0.0, order=order, num_live=num_live, blocks=blocks())
            loads.append(counted)
    tile = loads[1]
    good = tile > 0 and loads == [0, tile, tile, 2 * tile, 3 * tile]
    return "" if good else f"loads of weights with 0, 1, 16, 17, 40 live rows of 40: {loads}"


def never_confident() -> str:
    """At threshold 0 every row with a probability is confident, and no row with NaN or +inf."""
    x, weight = extreme_rows()
    found = head_confidence(x, HeadWeight(weight), 0.0).confident.tolist()
    expected = [True, False, True, False, False, False, True, False]
    return "" if found == expected else f"confident: {found}"


CHECKS: dict[str, Callable[[], str]] = {
    "batch_invariance": batch_invariance,
    "same_draw_as_vllm": same_draw_as_vllm,
    "never_confident": never_confident,
}

# These look into the interpreter itself.
INTERPRETER_CHECKS: dict[str, Callable[[], str]] = {
    "dead_rows_load_nothing": dead_rows_load_nothing,
}
