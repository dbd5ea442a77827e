"""Cases of deferred states and of the draft loop's bookkeeping."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from tests.kernels.registry import Outputs, case, floats
from vllm_adadecode.kernels.deferred import DeferredStates
from vllm_adadecode.kernels.draft_state import DraftRows, KVBlocks, PassInputs, RoundStatus
from vllm_adadecode.kernels.draft_step import draft_step
from vllm_adadecode.kernels.head_results import record_head_results
from vllm_adadecode.kernels.verification_plan import PassPlans, plan_verification


@case(
    "deferred._move_states_kernel",
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
    states = DeferredStates(5, 4, hidden_size, dtype, torch.get_default_device())
    states.hidden.fill_(-3.0)
    states.residual.fill_(-4.0)
    where = torch.randperm(20, generator=rng)[:num_tokens]
    slots, offsets = where // 4, where % 4
    if padding:
        slots[::3] = -1
    width = 2 * hidden_size if strided else hidden_size
    states.store(
        slots,
        offsets,
        floats(rng, num_tokens, width, dtype=dtype)[:, :hidden_size],
        floats(rng, num_tokens, width, dtype=dtype)[:, :hidden_size],
    )
    hidden, residual = torch.full((2, num_tokens + 3, hidden_size), -7.0, dtype=dtype)
    back = torch.randperm(num_tokens, generator=rng)
    states.gather(slots[back], offsets[back], out=(hidden, residual))
    kept = {f"kept_{name}": value for name, value in vars(states).items()}
    return {**kept, "hidden": hidden, "residual": residual}


def block_tables(rng: torch.Generator, num_groups: int) -> tuple[KVBlocks, list[torch.Tensor]]:
    """KV blocks of 16 slots, as vLLM's BlockTables holds them; keep the tables while in use."""
    tables = [
        torch.randperm(640, generator=rng)[: 16 * 40].view(16, 40).to(torch.int32)
        for _ in range(num_groups)
    ]
    return KVBlocks(
        table_ptrs=torch.tensor([t.data_ptr() for t in tables], dtype=torch.uint64),
        table_strides=torch.tensor([t.stride(0) for t in tables]),
        block_sizes=torch.tensor([16, 32][:num_groups], dtype=torch.int32),
        # Only the first group has KV slots when there are two.
        enabled=torch.tensor([True, False][:num_groups]),
    ), tables


@dataclass
class Round:
    """A round that has run.

    Attributes:
        confident: by step with a head, which rows were.
        passes: by step, the inputs of the pass behind it.
        tables: the block tables of each group.
    """

    rows: DraftRows
    confident: list[torch.Tensor]
    passes: list[Outputs]
    tables: list[torch.Tensor]


def round_of_steps(
    rng: torch.Generator, num_rows: int, max_drafts: int, num_exits: int, num_groups: int
) -> Round:
    """A whole round with random results of heads."""
    device = torch.get_default_device()
    slots = torch.randperm(16, generator=rng)[:num_rows]
    if num_rows > 2:
        slots[2] = -1
    limits = torch.randint(0, max_drafts + 1, (num_rows,), generator=rng)
    limits[0] = max_drafts
    first_pos = torch.randint(0, 600, (num_rows,), generator=rng)
    last_sampled = torch.randint(0, 99, (num_rows,), generator=rng)
    rows = DraftRows.empty(num_rows, max_drafts, num_exits, device)
    rows.load(slots, first_pos, limits, last_sampled)
    blocks, tables = block_tables(rng, num_groups)
    inputs = PassInputs.empty(num_rows, 1 + max_drafts, num_groups, device)
    inputs.slot_mapping.fill_(-7)
    # One exit more than the rows use, and one less than there are in all.
    status = RoundStatus.empty(num_exits + 1, device)
    status.allowed.fill_(max(1, num_exits - 1))
    found = Round(rows, [], [], tables)

    def step(**arguments: Any) -> None:
        draft_step(rows, inputs, blocks, status, **arguments)
        found.passes.append({k: v.clone() for k, v in (vars(inputs) | vars(status)).items()})

    step(exit_index=None, next_span=0)
    for _ in range(max_drafts):
        for e in range(num_exits):
            token = torch.randint(100, 999, (num_rows,), generator=rng)
            found.confident.append(torch.rand(num_rows, generator=rng) < 0.45)
            results = {"token": token, "confident": found.confident[-1]}
            step(exit_index=e, next_span=(e + 1) % num_exits, **results)
    return found


@case(
    "draft_step._draft_step_kernel",
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
    done = round_of_steps(rng, num_rows, max_drafts, num_exits, num_groups)
    found = dict(vars(done.rows))
    for i, inputs in enumerate(done.passes):
        found.update({f"{name}_{i}": value for name, value in inputs.items()})
    return found


@case(
    "verification_plan._verification_plan_kernel",
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
    rows = round_of_steps(rng, num_rows, max_drafts, num_exits, num_groups=1).rows
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
    "head_results._record_head_results_kernel",
    some={},
    nobody={"share": 0.0},
    one_row={"num_rows": 1, "share": 1.0},
    many={"num_rows": 300},
)
def head_results(rng: torch.Generator, num_rows: int = 9, share: float = 0.6) -> Outputs:
    """Two heads one after the other, a row of NaN among them."""
    kept = {
        "token_out": torch.full((num_rows,), -7),
        "confident": torch.ones(num_rows, dtype=torch.bool),
        "heads_evaluated": torch.tensor([5, 6, 7]),
        "head_batches": torch.tensor([1, 2, 3]),
    }
    found: Outputs = {}
    for exit_index in (2, 1):
        p = torch.rand(num_rows, generator=rng)
        p[num_rows // 2 :][:1] = torch.nan
        record_head_results(
            torch.randint(0, 99, (num_rows,), generator=rng),
            p,
            torch.rand(num_rows, generator=rng) < share,
            exit_index,
            thresholds=torch.tensor([0.2, 0.5, 0.9]),
            **kept,
        )
        found |= {f"{name} {exit_index}": value.clone() for name, value in kept.items()}
    return found
