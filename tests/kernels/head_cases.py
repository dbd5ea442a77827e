"""Cases of the fused head: projection, merge, gate and the draw."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch

from tests.kernels.registry import BFLOAT16_STEP, SUMS, Outputs, case, floats, numbers
from vllm_adadecode.heads.head import GATE_NORM_EPS
from vllm_adadecode.kernels import projection
from vllm_adadecode.kernels.confidence import head_confidence
from vllm_adadecode.kernels.gate import head_input, live_first
from vllm_adadecode.kernels.head_weight import HeadWeight
from vllm_adadecode.kernels.merge import merge_partials, merge_shards
from vllm_adadecode.kernels.merge_reference import HeadResult
from vllm_adadecode.kernels.sampling import SampledHead, head_sample
from vllm_adadecode.kernels.tuning import HeadBlocks
from vllm_adadecode.model.lm_head_rows import quantize_rows

HEAD = ("projection._head_partials_kernel", "merge._merge_partials_kernel")
GATE = ("gate._head_input_kernel", "gate._live_first_kernel")
SAMPLE = ("sampling._sample_partials_kernel", "sampling._merge_samples_kernel")


def outputs(result: HeadResult, head: HeadWeight) -> Outputs:
    vocab_size = head.vocab_size if head.vocab_ids is None else 1 + int(head.vocab_ids[-1])
    return {
        "token": numbers(result.token, result.p, vocab_size),
        "p": result.p,
        "confident": result.confident,
    }


def check(x: torch.Tensor, head: HeadWeight, threshold: float, **options: Any) -> Outputs:
    return outputs(head_confidence(x, head, threshold, **options), head)


def blocks(**changes: int) -> HeadBlocks:
    sizes = {"BLOCK_V": 64, "BLOCK_K": 32, "BLOCK_R": 16, "tiles_per_split": 1}
    return HeadBlocks(**{**sizes, "num_warps": 4, "num_stages": 2, **changes})


def make_head(
    rng: torch.Generator, vocab_size: int, hidden_size: int, dtype: torch.dtype, **extra: Any
) -> HeadWeight:
    """An LM head whose softmax is neither flat nor a single token."""
    weight = floats(rng, vocab_size, hidden_size, scale=2.0 * hidden_size**-0.5)
    if dtype == torch.int8:
        return HeadWeight(*quantize_rows(weight), **extra)
    return HeadWeight(weight.to(dtype), **extra)


# --- confidence ----------------------------------------------------------------------------------


@case(
    *HEAD,
    tolerance=SUMS,
    float32={"dtype": torch.float32},
    bfloat16={"dtype": torch.bfloat16},
    float16={"dtype": torch.float16},
    int8={"dtype": torch.int8},
    int8_float16={"dtype": torch.int8, "x_dtype": torch.float16},
    one_row={"num_rows": 1},
    two_row_tiles={"num_rows": 19, "sizes": {"BLOCK_R": 16}},
    wide_row_tile={"num_rows": 33},
    hidden_no_multiple={"hidden_size": 72},
    vocab_of_one_block={"vocab_size": 64},
    vocab_smaller_than_block={"vocab_size": 7},
    vocab_just_over_a_block={"vocab_size": 65},
    several_tiles_a_split={"sizes": {"tiles_per_split": 3}},
    last_split_beyond_vocab={"vocab_size": 200, "sizes": {"tiles_per_split": 4}},
    soft_cap={"extra": {"soft_cap": 3.0}},
    logit_scale={"extra": {"logit_scale": 0.25}},
    cap_and_scale={"extra": {"soft_cap": 30.0, "logit_scale": 2.0}},
    threshold_0={"threshold": 0.0},
    threshold_1={"threshold": 1.0},
)
def confidence(
    rng: torch.Generator,
    dtype: torch.dtype = torch.float32,
    x_dtype: torch.dtype | None = None,
    num_rows: int = 5,
    vocab_size: int = 300,
    hidden_size: int = 64,
    threshold: float = 0.2,
    sizes: dict[str, int] | None = None,
    extra: dict[str, Any] | None = None,
) -> Outputs:
    head = make_head(rng, vocab_size, hidden_size, dtype, **(extra or {}))
    x_dtype = x_dtype or (torch.bfloat16 if head.row_scale is not None else dtype)
    x = floats(rng, num_rows, hidden_size, dtype=x_dtype)
    cut = blocks(**sizes) if sizes is not None else None
    return check(x, head, threshold, blocks=cut)


@case(*HEAD, tolerance=SUMS, above_2_17={"vocab_size": 2**17 + 77})
def large_vocabulary(rng: torch.Generator, vocab_size: int) -> Outputs:
    head = make_head(rng, vocab_size, 16, torch.float32)
    # The most likely token of row 1 is the very last.
    head.weight[-1] = 9.0
    x = floats(rng, 2, 16)
    x[1] = 1.0
    return check(x, head, 0.5, blocks=blocks(BLOCK_V=4096, BLOCK_K=16))


@case(*HEAD, tolerance=SUMS, float32={"dtype": torch.float32}, bfloat16={"dtype": torch.bfloat16})
def equal_logits(rng: torch.Generator, dtype: torch.dtype) -> Outputs:
    """The lowest id wins, over blocks and splits; p is exactly 1/4 at a threshold of 1/4."""
    x = floats(rng, 3, 32, dtype=dtype)
    many = check(x, HeadWeight(floats(rng, 1, 32, dtype=dtype).repeat(200, 1)), 0.5)
    four = check(x, HeadWeight(floats(rng, 1, 32, dtype=dtype).repeat(4, 1)), 0.25)
    # Two equal maxima in different blocks.
    weight = torch.zeros(200, 32, dtype=dtype)
    weight[[70, 150]] = 1.0
    two = check(torch.ones(1, 32, dtype=dtype), HeadWeight(weight), 0.4)
    found = {"many": many, "four": four, "two": two}
    return {f"{name}_{k}": v for name, result in found.items() for k, v in result.items()}


def extreme_rows() -> tuple[torch.Tensor, torch.Tensor]:
    """x ``[8, 32]`` and weight ``[150, 32]`` whose logits are infinite or NaN in chosen places.

    Products overflow; 0 times a finite number keeps the other rows apart.
    """
    x, weight = torch.zeros(8, 32), torch.zeros(150, 32)
    weight[:, 0] = torch.linspace(-1.0, 1.0, 150)
    weight[100, 1] = weight[:, 2] = weight[100, 3] = 1e30
    weight[70, 4], weight[70, 5] = 1e30, -1e30
    weight[:70, 6] = 1e30
    x[:, 0] = 1.0
    x[1, 1] = 1e30  # one logit +inf
    x[2, 1] = -1e30  # one logit -inf
    x[3, 2] = -1e30  # all -inf
    x[4, 4] = x[4, 5] = 1e30  # one logit NaN
    x[5, 0] = torch.nan  # all NaN
    x[6, 6] = -1e30  # the first block, and more, -inf
    x[7, 2] = 1e30  # all +inf
    return x, weight


@case(
    *HEAD,
    tolerance=SUMS,
    default={},
    splits={"sizes": {"tiles_per_split": 2}},
    cap={"soft_cap": 5.0},
)
def infinite_and_nan(
    rng: torch.Generator, sizes: dict[str, int] | None = None, soft_cap: float | None = None
) -> Outputs:
    x, weight = extreme_rows()
    return check(x, HeadWeight(weight, soft_cap=soft_cap), 0.0, blocks=blocks(**(sizes or {})))


@case(*HEAD, tolerance=SUMS)
def float16_overflow(rng: torch.Generator) -> Outputs:
    """Products of float16 beyond 65504 are finite logits."""
    x = torch.full((2, 64), 200.0, dtype=torch.float16)
    weight = torch.full((100, 64), 200.0, dtype=torch.float16)
    weight[42, 0] = 200.125
    weight[43, :] = -200.0
    x[1] = -x[1]
    return check(x, HeadWeight(weight), 0.5)


@case(*HEAD, tolerance=SUMS, columns={"columns": True}, rows={"columns": False})
def strided_input(rng: torch.Generator, columns: bool) -> Outputs:
    head = make_head(rng, 100, 64, torch.float32)
    wide = floats(rng, 8, 128)
    return check(wide[:, 32:96] if columns else wide[::2, ::2], head, 0.2)


@case(
    *HEAD,
    tolerance=SUMS,
    ids={},
    other={"other": True},
    one={"size": 1},
    one_other={"size": 1, "other": True},
)
def draft_vocabulary(rng: torch.Generator, size: int = 90, other: bool = False) -> Outputs:
    ids = torch.randperm(1000, generator=rng)[:size].sort().values
    head = make_head(rng, size, 64, torch.float32, vocab_ids=ids)
    logit = floats(rng, 6, scale=4.0) if other else None
    if logit is not None:
        logit[:3] = torch.tensor([torch.inf, -torch.inf, torch.nan])
    return check(floats(rng, 6, 64), head, 0.3, other=logit)


@case(*HEAD, tolerance=SUMS, plain={}, gate={"gate": True}, draft={"draft": True})
def shards(rng: torch.Generator, gate: bool = False, draft: bool = False) -> Outputs:
    """A vocabulary over four ranks, the third with one token: as the whole one."""
    ids = torch.arange(0, 600, 2) if draft else None
    head = make_head(rng, 300, 64, torch.float32, vocab_ids=ids)
    # Equal maxima on two ranks: the lower id wins.
    head.weight[[20, 250]] = 1.0
    x = floats(rng, 19, 64)
    x[0] = 1.0
    x[1] = torch.nan
    rows: dict[str, torch.Tensor] = {}
    if gate:
        rows["order"], rows["num_live"] = live_first(torch.rand(19, generator=rng) > 0.4)
    parts = []
    for begin, end in pairwise([0, 100, 150, 151, 300]):
        shard = HeadWeight(head.weight[begin:end], vocab_ids=ids, first_id=begin)
        partials = projection.head_partials(x, shard, **rows, blocks=blocks())
        parts.append(merge_partials(partials, **rows))
    sharded = merge_shards(parts[0], 0.2, lambda _: torch.cat(parts), **rows, vocab_ids=ids)
    whole = head_confidence(x, head, 0.2, **rows)
    torch.testing.assert_close(sharded.p, whole.p, rtol=2e-5, atol=0.0, equal_nan=True)
    numeric = ~whole.p.isnan()
    assert torch.equal(sharded.token[numeric], whole.token[numeric])
    assert torch.equal(sharded.confident, whole.confident)
    return outputs(sharded, head)


# --- gate ----------------------------------------------------------------------------------------


@case(
    *HEAD,
    *GATE,
    tolerance=SUMS,
    some={"threshold": 0.5},
    all={"threshold": -1.0},
    none={"threshold": 0.999},
)
def gated(rng: torch.Generator, threshold: float) -> Outputs:
    """Norm, gate, order, and a head that leaves out rows: results are by row."""
    x, gate = head_input(
        floats(rng, 21, 64),
        floats(rng, 21, 64),
        norm_weight=floats(rng, 64).abs(),
        norm_eps=1e-5,
        gate_weight=floats(rng, 64, scale=0.2),
        gate_bias=torch.zeros(1),
        gate_eps=GATE_NORM_EPS,
    )
    assert gate is not None
    order, num_live = live_first(gate > threshold)
    head = make_head(rng, 150, 64, torch.float32)
    result = check(x, head, 0.2, order=order, num_live=num_live, blocks=blocks())
    return {**result, "x": x, "gate": gate, "order": order, "num_live": num_live}


@case(
    "gate._head_input_kernel",
    tolerance=2**-7,
    bfloat16={"dtype": torch.bfloat16},
    no_norm={"norm": False},
    hidden_no_power_of_two={"hidden_size": 72},
    strided={"strided": True},
    # Small enough for the epsilons to count.
    small={"scale": 1e-3},
)
def head_inputs(
    rng: torch.Generator,
    dtype: torch.dtype = torch.float32,
    norm: bool = True,
    hidden_size: int = 64,
    strided: bool = False,
    scale: float = 1.0,
) -> Outputs:
    hidden = floats(rng, 5, hidden_size * 2, dtype=dtype, scale=scale)
    hidden = hidden[:, :hidden_size] if strided else hidden[:, :hidden_size].contiguous()
    before = hidden.clone()
    x, gate = head_input(
        hidden,
        floats(rng, 5, hidden_size, dtype=dtype, scale=scale),
        norm_weight=floats(rng, hidden_size, dtype=dtype) if norm else None,
        norm_eps=1e-5,
        gate_weight=floats(rng, hidden_size, scale=0.3),
        gate_bias=torch.tensor([0.1]),
        gate_eps=GATE_NORM_EPS,
    )
    assert gate is not None
    # The residual stream goes on to the next span as it was.
    return {"x": x, "gate": gate, "hidden_changed": hidden != before}


@case("gate._live_first_kernel", many={"num_rows": 300}, one={"num_rows": 1})
def row_order(rng: torch.Generator, num_rows: int) -> Outputs:
    order, num_live = live_first(torch.rand(num_rows, generator=rng) > 0.6)
    return {"order": order, "num_live": num_live}


# --- draw ----------------------------------------------------------------------------------------


def sampling_inputs(rng: torch.Generator, num_rows: int) -> dict[str, torch.Tensor]:
    """Requests at several temperatures, one of them greedy, and a padding row."""
    slots = torch.randperm(24, generator=rng)[:num_rows]
    slots[2] = -1
    temperature = torch.rand(24, generator=rng) + 0.3
    temperature[slots[0]] = 0.0
    temperature[slots[1]] = 1.0
    return {
        "slots": slots,
        "positions": torch.randint(0, 5000, (num_rows,), generator=rng),
        "temperature": temperature,
        "seeds": torch.randint(-(2**62), 2**62, (24,), generator=rng),
    }


def sample_outputs(result: SampledHead, head: HeadWeight) -> Outputs:
    found = outputs(result.head, head)
    return {**found, "sampled": result.sampled, "log_prob": result.log_prob}


@case(
    *SAMPLE,
    tolerance=1e-4,
    plain={},
    two_row_tiles={"num_rows": 18},
    splits={"sizes": {"tiles_per_split": 3}},
    gate={"gate": True},
    draft={"draft": True},
    cap={"extra": {"soft_cap": 3.0, "logit_scale": 0.5}},
    int8={"dtype": torch.int8},
)
def draw(
    rng: torch.Generator,
    num_rows: int = 6,
    sizes: dict[str, int] | None = None,
    gate: bool = False,
    draft: bool = False,
    extra: dict[str, Any] | None = None,
    dtype: torch.dtype = torch.float32,
) -> Outputs:
    ids = torch.randperm(500, generator=rng)[:200].sort().values if draft else None
    head = make_head(rng, 200, 64, dtype, vocab_ids=ids, **(extra or {}))
    rows: dict[str, torch.Tensor] = {}
    if gate:
        rows["order"], rows["num_live"] = live_first(torch.rand(num_rows, generator=rng) > 0.4)
    cache = torch.full((24, 3, 500 if draft else 200), -torch.inf)
    result = head_sample(
        floats(rng, num_rows, 64),
        head,
        0.2,
        **sampling_inputs(rng, num_rows),
        logits_cache=cache,
        logits_cache_col=torch.tensor(1),
        other=floats(rng, num_rows) if draft else None,
        **rows,
        blocks=blocks(**(sizes or {})),
    )
    return {**sample_outputs(result, head), "cache": cache}


@case(*SAMPLE, tolerance=BFLOAT16_STEP)
def draw_bfloat16(rng: torch.Generator) -> Outputs:
    """Drawn from the logits as the cache holds them."""
    cache = torch.zeros(24, 2, 200, dtype=torch.bfloat16)
    x, head = floats(rng, 6, 64, dtype=torch.bfloat16), make_head(rng, 200, 64, torch.bfloat16)
    column = torch.tensor([0])
    result = head_sample(
        x, head, 0.2, **sampling_inputs(rng, 6), logits_cache=cache, logits_cache_col=column
    )
    return {**sample_outputs(result, head), "cache": cache.float()}


@case(*SAMPLE, tolerance=SUMS)
def draw_without_cache(rng: torch.Generator) -> Outputs:
    """An infinite logit is drawn; a row without a finite one gives a valid token."""
    weight = floats(rng, 100, 32)
    weight[:, 0], weight[60, 1] = 0.0, 1e30
    weight[:, 2] = 1e30
    x = floats(rng, 6, 32)
    x[:, :3] = 0.0
    x[4, 1], x[5, 2] = 1e30, -1e30
    head = HeadWeight(weight)
    found = sample_outputs(head_sample(x, head, 0.2, **sampling_inputs(rng, 6)), head)
    return {**found, "log_prob": found["log_prob"][:4]}
