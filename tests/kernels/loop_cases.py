"""Cases of the draw, of deferred states and of the draft loop's bookkeeping."""

from __future__ import annotations

from typing import Any

import torch

from tests.kernels.head_cases import blocks, make_head, outputs
from tests.kernels.registry import BFLOAT16_STEP, EXACT, SUMS, Outputs, case, floats

SAMPLE = ("sampling._sample_partials_kernel", "sampling._merge_samples_kernel")
STORE, GATHER = "deferred._store_states_kernel", "deferred._gather_states_kernel"
STEP = "draft_step._draft_step_kernel"
PLAN = "verification_plan._verification_plan_kernel"


def sampling_inputs(rng: torch.Generator, num_rows: int) -> dict[str, Any]:
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


def sample_outputs(result: Any, vocab_size: int) -> Outputs:
    return {
        **outputs(result.head, vocab_size),
        "sampled": result.sampled,
        "log_prob": result.log_prob,
    }


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
    from vllm_adadecode.kernels.gate import live_first
    from vllm_adadecode.kernels.sampling import head_sample

    ids = torch.randperm(500, generator=rng)[:200].sort().values if draft else None
    head = make_head(rng, 200, 64, dtype, vocab_ids=ids, **(extra or {}))
    order = num_live = None
    if gate:
        order, num_live = live_first(torch.rand(num_rows, generator=rng), 0.4)
    cache = torch.full((24, 3, 500 if draft else 200), -torch.inf)
    result = head_sample(
        floats(rng, num_rows, 64),
        head,
        0.2,
        **sampling_inputs(rng, num_rows),
        logits_cache=cache,
        logits_cache_col=torch.tensor(1),
        other=floats(rng, num_rows) if draft else None,
        order=order,
        num_live=num_live,
        blocks=blocks(**(sizes or {})),
    )
    return {**sample_outputs(result, 500), "cache": cache}


@case(*SAMPLE, tolerance=BFLOAT16_STEP)
def draw_bfloat16(rng: torch.Generator) -> Outputs:
    """Drawn from the logits as the cache holds them."""
    from vllm_adadecode.kernels.sampling import head_sample

    cache = torch.zeros(24, 2, 200, dtype=torch.bfloat16)
    result = head_sample(
        floats(rng, 6, 64, dtype=torch.bfloat16),
        make_head(rng, 200, 64, torch.bfloat16),
        0.2,
        **sampling_inputs(rng, 6),
        logits_cache=cache,
        logits_cache_col=torch.tensor([0]),
    )
    return {**sample_outputs(result, 200), "cache": cache.float()}


@case(*SAMPLE, tolerance=SUMS)
def draw_without_cache(rng: torch.Generator) -> Outputs:
    """An infinite logit is drawn; a row without a finite one gives a valid token."""
    from vllm_adadecode.kernels.head_weight import HeadWeight
    from vllm_adadecode.kernels.sampling import head_sample

    weight = floats(rng, 100, 32)
    weight[:, 0], weight[60, 1] = 0.0, 1e30
    weight[:, 2] = 1e30
    x = floats(rng, 6, 32)
    x[:, :3] = 0.0
    x[4, 1], x[5, 2] = 1e30, -1e30
    result = head_sample(x, HeadWeight(weight), 0.2, **sampling_inputs(rng, 6))
    found = sample_outputs(result, 100)
    found["log_prob"] = found["log_prob"][:4]
    return found


@case(
    STORE,
    GATHER,
    tolerance=EXACT,
    plain={},
    padding={"padding": True},
    all_padding={"padding": True, "num_tokens": 1},
    strided={"strided": True},
    bfloat16={"dtype": torch.bfloat16, "hidden_size": 1100},
    one={"num_tokens": 1},
)
def deferred(
    rng: torch.Generator,
    num_tokens: int = 7,
    padding: bool = False,
    strided: bool = False,
    dtype: torch.dtype = torch.float32,
    hidden_size: int = 72,
) -> Outputs:
    from vllm_adadecode.kernels.deferred import DeferredStates

    states = DeferredStates(5, 4, hidden_size, dtype, torch.get_default_device())
    states.hidden.fill_(-3.0)
    states.residual.fill_(-4.0)
    where = torch.randperm(20, generator=rng)[:num_tokens]
    slots, offsets = where // 4, where % 4
    if padding:
        slots[::3] = -1
    width = 2 * hidden_size if strided else hidden_size
    hidden = floats(rng, num_tokens, width, dtype=dtype)[:, :hidden_size]
    residual = floats(rng, num_tokens, width, dtype=dtype)[:, :hidden_size]
    states.store(slots, offsets, hidden, residual)
    buffers = (
        torch.full((num_tokens + 3, hidden_size), -7.0, dtype=dtype),
        torch.full((num_tokens + 3, hidden_size), -8.0, dtype=dtype),
    )
    back = torch.randperm(num_tokens, generator=rng)
    states.gather(slots[back], offsets[back], out=buffers)
    return {
        "kept_hidden": states.hidden,
        "kept_residual": states.residual,
        "hidden": buffers[0],
        "residual": buffers[1],
    }


def block_tables(rng: torch.Generator, num_groups: int) -> tuple[Any, list[torch.Tensor]]:
    """KV blocks of 16 slots, as vLLM's BlockTables holds them; keep the tables while in use."""
    from vllm_adadecode.kernels.draft_state import KVBlocks

    tables = [
        torch.randperm(640, generator=rng)[: 16 * 40].view(16, 40).to(torch.int32)
        for _ in range(num_groups)
    ]
    # Only the first group has KV slots when there are two.
    enabled = torch.tensor([True, False][:num_groups])
    sizes = [torch.tensor([t.data_ptr() for t in tables], dtype=torch.uint64)]
    return KVBlocks(
        table_ptrs=sizes[0],
        table_strides=torch.tensor([t.stride(0) for t in tables]),
        block_sizes=torch.tensor([16, 32][:num_groups], dtype=torch.int32),
        enabled=enabled,
    ), tables


def round_of_steps(
    rng: torch.Generator, num_rows: int, max_drafts: int, num_exits: int, num_groups: int
) -> tuple[Any, Any, list[Outputs]]:
    """A whole round with random answers: the windows, and the inputs of every pass."""
    from vllm_adadecode.kernels.draft_state import DraftRows, PassInputs, RoundStatus
    from vllm_adadecode.kernels.draft_step import draft_step

    slots = torch.randperm(16, generator=rng)[:num_rows]
    if num_rows > 2:
        slots[2] = -1
    limits = torch.randint(0, max_drafts + 1, (num_rows,), generator=rng)
    limits[0] = max_drafts
    rows = DraftRows.begin(
        slots,
        torch.randint(0, 600, (num_rows,), generator=rng),
        limits,
        torch.randint(0, 99, (num_rows,), generator=rng),
        max_drafts,
        num_exits,
    )
    blocks, tables = block_tables(rng, num_groups)
    inputs = PassInputs.empty(num_rows, 1 + max_drafts, num_groups, torch.get_default_device())
    inputs.slot_mapping.fill_(-7)
    # One exit more than the rows use, and one less than there are in all.
    status = RoundStatus.empty(num_exits + 1, torch.get_default_device())
    status.allowed.fill_(max(1, num_exits - 1))
    passes: list[Outputs] = []

    def record() -> None:
        passes.append(
            {name: value.clone() for name, value in (vars(inputs) | vars(status)).items()}
        )

    draft_step(rows, inputs, blocks, status, exit_index=None, next_span=0)
    record()
    for _ in range(max_drafts):
        for exit_index in range(num_exits):
            draft_step(
                rows,
                inputs,
                blocks,
                status,
                exit_index=exit_index,
                next_span=(exit_index + 1) % num_exits,
                token=torch.randint(100, 999, (num_rows,), generator=rng),
                confident=torch.rand(num_rows, generator=rng) < 0.45,
            )
            record()
    del tables
    return rows, inputs, passes


@case(
    STEP,
    tolerance=EXACT,
    round={},
    one_row={"num_rows": 1},
    one_exit={"num_exits": 1},
    one_draft={"max_drafts": 1},
    two_groups={"num_groups": 2},
)
def draft_steps(
    rng: torch.Generator,
    num_rows: int = 9,
    max_drafts: int = 3,
    num_exits: int = 3,
    num_groups: int = 1,
) -> Outputs:
    rows, _, passes = round_of_steps(rng, num_rows, max_drafts, num_exits, num_groups)
    found = dict(vars(rows))
    for i, inputs in enumerate(passes):
        found.update({f"{name}_{i}": value for name, value in inputs.items()})
    return found


@case(
    PLAN,
    tolerance=EXACT,
    batch={},
    one={"num_reqs": 1},
    many={"num_rows": 15, "num_reqs": 15, "max_drafts": 6},
    one_exit={"num_exits": 1},
    # More than a program holds at once: windows this long come 32 at a time.
    blocks={"num_reqs": 37, "max_drafts": 36, "num_exits": 1},
    # Requests that are prefilled beside them, with more tokens than a window has.
    mixed={"every_prefilled": 2},
    blocks_mixed={"num_reqs": 37, "max_drafts": 36, "num_exits": 1, "every_prefilled": 3},
)
def verification_plan(
    rng: torch.Generator,
    num_rows: int = 9,
    num_reqs: int = 6,
    max_drafts: int = 3,
    num_exits: int = 3,
    every_prefilled: int | None = None,
) -> Outputs:
    """The windows of a round, in another order, scheduled as far as may be or less."""
    from vllm_adadecode.kernels.verification_plan import PassPlans, plan_verification

    rows, _, _ = round_of_steps(rng, num_rows, max_drafts, num_exits, num_groups=1)
    window = 1 + max_drafts
    row_of = torch.randperm(num_rows, generator=rng)
    row_of = row_of[rows.slots[row_of] >= 0].repeat(5)[:num_reqs].to(torch.int32)
    scheduled = torch.full((len(row_of),), window)
    scheduled[::2] = torch.randint(1, 1 + window, scheduled[::2].shape, generator=rng)
    if every_prefilled is not None:
        row_of[1::every_prefilled], scheduled[1::every_prefilled] = -1, 2 * window + 1
    most_rows = 5 * num_rows + 1
    query_start_loc = torch.full((most_rows,), int(scheduled.sum()), dtype=torch.int32)
    query_start_loc[: len(row_of) + 1] = torch.cat([torch.zeros(1), scheduled.cumsum(0)])
    num_tokens = int(scheduled.sum())
    most = most_rows * (2 * window + 1)
    plans = PassPlans.empty(1 + num_exits, most, most_rows, torch.get_default_device())
    plans.data.fill_(-7)
    found = {
        "input_ids": torch.full((most,), -7, dtype=torch.int32),
        "seq_lens": torch.full((most_rows,), -7, dtype=torch.int32),
        "is_padding": torch.zeros(most, dtype=torch.bool),
    }
    plan_verification(
        plans,
        rows,
        row_of=row_of,
        query_start_loc=query_start_loc,
        num_token_slots=num_tokens + 3,
        **found,
    )
    return found | {"plans": plans.data, "row_of": row_of, "query_start_loc": query_start_loc}


@case(
    "answer._note_answers_kernel",
    tolerance=EXACT,
    some={},
    nobody={"share": 0.0},
    one_row={"num_rows": 1, "share": 1.0},
    many={"num_rows": 300},
)
def answers(rng: torch.Generator, num_rows: int = 9, share: float = 0.6) -> Outputs:
    """Two heads one after the other, a row of NaN among them."""
    from vllm_adadecode.kernels.answer import note_answers

    kept = {
        "token_out": torch.full((num_rows,), -7),
        "confident": torch.ones(num_rows, dtype=torch.bool),
        "head_rows": torch.tensor([5, 6, 7]),
        "head_batches": torch.tensor([1, 2, 3]),
    }
    accept_above = torch.tensor([0.2, 0.5, 0.9])
    found: Outputs = {}
    for exit_index in (2, 1):
        p = torch.rand(num_rows, generator=rng)
        p[num_rows // 2 :][:1] = torch.nan
        note_answers(
            torch.randint(0, 99, (num_rows,), generator=rng),
            p,
            torch.rand(num_rows, generator=rng) < share,
            exit_index,
            accept_above=accept_above,
            **kept,
        )
        found |= {f"{name} {exit_index}": value.clone() for name, value in kept.items()}
    return found
