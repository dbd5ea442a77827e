"""What is asked of the kernels alone, not of their twins: run by compare.py."""

from __future__ import annotations

from collections.abc import Callable

import torch

from tests.kernels.head_cases import blocks, extreme_rows, make_head
from tests.kernels.loop_cases import sampling_inputs
from tests.kernels.registry import floats


def batch_invariance() -> str:
    """A row's result is the same to the bit alone, among others, and beside NaN and infinity."""
    from vllm_adadecode.kernels.confidence import head_confidence

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
    """The draw is what vLLM's own kernel draws from the stored logits."""
    from vllm.v1.worker.gpu.sample.gumbel import gumbel_sample

    from vllm_adadecode.kernels.projection_twin import head_logits
    from vllm_adadecode.kernels.sampling import head_sample

    rng = torch.Generator("cpu").manual_seed(3)
    head = make_head(rng, 1500, 32, torch.float32)
    inputs = sampling_inputs(rng, 20)
    x = floats(rng, 20, 32)
    ours = head_sample(x, head, 0.2, **inputs, blocks=blocks(BLOCK_V=256)).sampled
    theirs = gumbel_sample(
        head_logits(x, head),
        inputs["slots"],
        inputs["temperature"],
        inputs["seeds"],
        inputs["positions"],
        apply_temperature=True,
        is_drafting=True,
    )
    return "" if torch.equal(ours, theirs) else f"drew {ours.tolist()}, vLLM {theirs.tolist()}"


def dead_rows_load_nothing() -> str:
    """With no live row the LM head is not read: a bad address of it does no harm."""
    from vllm_adadecode.kernels.confidence import head_confidence
    from vllm_adadecode.kernels.gate import live_first

    rng = torch.Generator("cpu").manual_seed(4)
    head = make_head(rng, 100, 32, torch.float32)
    head.weight.fill_(torch.nan)
    order, num_live = live_first(torch.zeros(5), 0.5)
    result = head_confidence(floats(rng, 5, 32), head, 0.0, order=order, num_live=num_live)
    if result.p.any() or result.confident.any() or result.token.any():
        return f"dead rows have p {result.p.tolist()}"
    return ""


def never_confident() -> str:
    """At threshold 0 every row with a probability is confident, and no row with NaN or +inf."""
    from vllm_adadecode.kernels.confidence import head_confidence
    from vllm_adadecode.kernels.head_weight import HeadWeight

    x, weight = extreme_rows()
    found = head_confidence(x, HeadWeight(weight), 0.0).confident.tolist()
    expected = [True, False, True, False, False, False, True, False]
    return "" if found == expected else f"confident: {found}"


CHECKS: dict[str, Callable[[], str]] = {
    "batch_invariance": batch_invariance,
    "same_draw_as_vllm": same_draw_as_vllm,
    "dead_rows_load_nothing": dead_rows_load_nothing,
    "never_confident": never_confident,
}
