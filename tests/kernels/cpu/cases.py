"""Inputs for the comparison of replacements with the Triton kernels that they stand in for.

A case calls the function that vLLM wraps around a kernel, on inputs drawn from a fixed seed. So
grids, block sizes and the order of arguments are vLLM's own. ``compare.py`` runs every case twice.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from vllm.v1.worker.gpu.block_table import BlockTables
from vllm.v1.worker.gpu.buffer_utils import FusedStagedWriter, StagedWriteTensor
from vllm.v1.worker.gpu.input_batch import (
    combine_sampled_and_draft_tokens,
    expand_idx_mapping,
    get_num_sampled_and_rejected,
    post_update_num_computed_tokens,
    prepare_pos_seq_lens,
    prepare_prefill_inputs,
)
from vllm.v1.worker.gpu.input_batch import post_update as function
from vllm.v1.worker.gpu.metrics.logits import get_num_nans
from vllm.v1.worker.gpu.sample import gumbel
from vllm.v1.worker.gpu.sample.bad_words import apply_bad_words
from vllm.v1.worker.gpu.sample.gumbel import apply_temperature
from vllm.v1.worker.gpu.sample.logit_bias import apply_logit_bias
from vllm.v1.worker.gpu.sample.logprob import LogprobTokenIdsState, compute_topk_scores
from vllm.v1.worker.gpu.sample.min_p import apply_min_p
from vllm.v1.worker.gpu.sample.output import SamplingMaskTensors
from vllm.v1.worker.gpu.sample.penalties import apply_penalties, bincount
from vllm.v1.worker.gpu.sample.prompt_logprob import get_prompt_logprobs_token_ids
from vllm.v1.worker.gpu.sample.thinking_budget import apply_thinking_budget
from vllm.v1.worker.gpu.sample.trace_replay import apply_trace_tokens
from vllm.v1.worker.gpu.spec_decode import rejection_sampler
from vllm.v1.worker.gpu.spec_decode.rejection_sampler import gather_draft_sampled
from vllm.v1.worker.gpu.spec_decode.rejection_sampler_utils import rejection_sample
from vllm.v1.worker.gpu.structured_outputs import StructuredOutputsWorker

from tests.kernels.registry import SUMS, Cases, Outputs, floats
from vllm_adadecode.cpu.memory import note_tables

# vLLM 0.33 or later.
IS_033 = hasattr(gumbel, "spec_step_seed")

CASES = Cases()
case = CASES.declare


def ints(rng: torch.Generator, low: int, high: int, *shape: int, dtype: Any = torch.int32) -> Any:
    return torch.randint(low, high, shape, generator=rng, dtype=dtype)


def slots(rng: torch.Generator, num_reqs: int, max_num_reqs: int = 12) -> torch.Tensor:
    """Distinct request slots in no order, as vLLM's idx_mapping."""
    return torch.randperm(max_num_reqs, generator=rng)[:num_reqs]


def cumulative(lengths: list[int], padding: int = 0) -> torch.Tensor:
    """[len + 1 + padding] int32, padded with the total."""
    ends = np.cumsum([0, *lengths]).tolist()
    return torch.tensor(ends + [ends[-1]] * padding, dtype=torch.int32)


# --- input_batch ---------------------------------------------------------------------------------


@case("input_batch._prepare_prefill_inputs_kernel", one={"lookahead": 1}, three={"lookahead": 3})
def prefill_inputs(rng: torch.Generator, lookahead: int) -> Outputs:
    # A decode row, a chunk in the middle, one that ends the prompt, a long one, a resumed one.
    lengths, computed, prefill = [1, 7, 5, 1500, 2], [9, 4, 3, 0, 20], [9, 40, 8, 1501, 23]
    idx = slots(rng, 5)
    num_computed, prefill_len = torch.zeros(2, 12, dtype=torch.int32)
    num_computed[idx] = torch.tensor(computed, dtype=torch.int32)
    prefill_len[idx] = torch.tensor(prefill, dtype=torch.int32)
    input_ids = torch.full((1600,), -7, dtype=torch.int32)
    next_tokens = torch.full((lookahead, 12), -7, dtype=torch.int32)
    all_token_ids = ints(rng, 0, 1000, 12, 2048)
    prepare_prefill_inputs(
        input_ids,
        next_tokens,
        idx,
        cumulative(lengths, 3),
        all_token_ids,
        prefill_len,
        num_computed,
    )
    return {"input_ids": input_ids, "next_tokens": next_tokens}


@case(
    "input_batch._prepare_pos_seq_lens_kernel",
    decode={"lengths": [1, 1, 1]},
    mixed={"lengths": [1, 4, 1200, 2]},
    single={"lengths": [1]},
)
def pos_seq_lens(rng: torch.Generator, lengths: list[int]) -> Outputs:
    pos = torch.full((1300,), -7, dtype=torch.int64)
    seq_lens = torch.full((12,), -7, dtype=torch.int32)
    idx = slots(rng, len(lengths))
    num_computed = ints(rng, 0, 500, 12)
    prepare_pos_seq_lens(idx, cumulative(lengths, 2), num_computed, pos, seq_lens)
    return {"pos": pos, "seq_lens": seq_lens}


@case(
    "input_batch._combine_sampled_and_draft_tokens_kernel",
    decode={"drafts": [0, 0, 0, 0], "queries": [1, 1, 1, 1]},
    drafts={"drafts": [0, 4, 2, 1], "queries": [1, 5, 3, 2]},
    mixed={"drafts": [0, 3, 0, 0], "queries": [1, 4, 9, 30]},
    no_new={"drafts": [0, 3, 1, 4], "queries": [3, 3, 1, 4], "num_new": 0},
)
def combine(
    rng: torch.Generator, drafts: list[int], queries: list[int], num_new: int = 1
) -> Outputs:
    idx = slots(rng, 4)
    # Row 0 decodes, row 1 has one draft before the end of its prefill, row 2 ends its prefill,
    # row 3 is in the middle of it.
    seq_lens = torch.tensor([20, 30, 9, 30], dtype=torch.int32)
    prefill_len = torch.zeros(12, dtype=torch.int32)
    prefill_len[idx] = torch.tensor([10, 27, 9, 50], dtype=torch.int32)
    input_ids = ints(rng, 0, 99, 64)
    cu_num_logits = cumulative([d + num_new for d in drafts])
    logits_indices = combine_sampled_and_draft_tokens(
        input_ids,
        idx,
        ints(rng, 100, 200, 12, 1, dtype=torch.int64),
        cumulative(queries, 2),
        torch.cat((seq_lens, torch.zeros(2, dtype=torch.int32))),
        prefill_len,
        ints(rng, 200, 300, 12, 4, dtype=torch.int64),
        cu_num_logits,
        int(cu_num_logits[-1]),
        num_new,
    )
    return {"input_ids": input_ids, "logits_indices": logits_indices}


@case("input_batch._get_num_sampled_and_rejected_kernel")
def num_sampled_and_rejected(rng: torch.Generator) -> Outputs:
    idx = slots(rng, 4)
    prefill_len = ints(rng, 5, 15, 12)
    sampled, rejected = get_num_sampled_and_rejected(
        torch.tensor([1, 3, 2, 1], dtype=torch.int32),
        torch.tensor([4, 20, 20, 5, 0, 0], dtype=torch.int32),
        cumulative([1, 5, 2, 1]),
        idx,
        prefill_len,
    )
    return {"sampled": sampled, "rejected": rejected}


@case(
    "input_batch._post_update_kernel",
    plain={"width": 1},
    drafts={"width": 5},
    sentinel={"width": 5, "sentinel": True},
    no_counts={"width": 5, "counts": False, "starts": False},
)
def post_update(
    rng: torch.Generator,
    width: int,
    sentinel: bool = False,
    counts: bool = True,
    starts: bool = True,
) -> Outputs:
    idx = slots(rng, 5)
    if sentinel:
        idx[[1, 4]] = -1
    num_computed, total_len = ints(rng, 5, 20, 12), ints(rng, 20, 30, 12)
    last_sampled = ints(rng, 0, 50, 12, 1, dtype=torch.int64)
    bin_counts = ints(rng, 0, 3, 12, 50) if counts else None
    all_token_ids = torch.full((12, 64), -7, dtype=torch.int32)
    sampled = ints(rng, 0, 50, 5, width, dtype=torch.int64)
    sampled[0] = 3  # The same token twice in one request.
    num_sampled = ints(rng, 0, width + 1, 5)
    num_sampled[0] = width
    function(
        idx,
        num_computed,
        last_sampled,
        bin_counts,
        sampled,
        num_sampled,
        width - num_sampled,
        cumulative([width, 9, width, width, 1], 3) if starts else None,
        all_token_ids,
        total_len,
    )
    outputs = {
        "num_computed": num_computed,
        "last_sampled": last_sampled,
        "all_token_ids": all_token_ids,
        "total_len": total_len,
    }
    return outputs if bin_counts is None else {**outputs, "bin_counts": bin_counts}


@case("input_batch._post_update_num_computed_tokens_kernel")
def post_update_num_computed(rng: torch.Generator) -> Outputs:
    num_computed = ints(rng, 5, 20, 12)
    post_update_num_computed_tokens(slots(rng, 3), num_computed, cumulative([1, 5, 3], 2))
    return {"num_computed": num_computed}


@case("input_batch._expand_idx_mapping_kernel")
def expand(rng: torch.Generator) -> Outputs:
    idx, local_pos = expand_idx_mapping(slots(rng, 4), 11, cumulative([1, 5, 2, 3]), 5)
    return {"idx": idx, "local_pos": local_pos}


# --- buffer_utils, block_table -------------------------------------------------------------------


@case("buffer_utils._apply_write_kernel")
def staged_writes(rng: torch.Generator) -> Outputs:
    device = torch.device("cpu")
    table = StagedWriteTensor((6, 2000), torch.int32, device, uva_instead_of_gpu=True)
    table.stage_write(4, 0, ints(rng, 0, 99, 1500).tolist())
    table.stage_write(1, 7, [1, 2, 3])
    table.stage_write(1, 10, [4])
    table.apply_write()
    vector = StagedWriteTensor(6, torch.float32, device)
    vector.stage_write_elem(5, 2)
    vector.stage_write_elem(0, 3)
    vector.apply_write()

    groups = [StagedWriteTensor((6, n), torch.int32, device) for n in (8, 16)]
    groups[0].stage_write(2, 1, [5, 6])
    groups[1].stage_write(5, 3, [7, 8, 9])
    groups[1].stage_write(0, 0, [1])
    note_tables(t.gpu for t in groups)
    FusedStagedWriter(device, 12).apply(
        groups,
        torch.tensor([t.gpu.data_ptr() for t in groups], dtype=torch.uint64),
        torch.tensor([t.gpu.stride(0) for t in groups], dtype=torch.int64),
    )
    return {
        "table": table.gpu,
        "vector": vector.gpu,
        "group0": groups[0].gpu,
        "group1": groups[1].gpu,
    }


@case(
    "block_table._gather_block_tables_kernel",
    "block_table._compute_slot_mappings_kernel",
    "buffer_utils._apply_write_kernel",
    decode={"lengths": [1, 1, 1]},
    mixed={"lengths": [1, 40, 3]},
    groups={"lengths": [1, 40, 3], "num_groups": 2},
    sentinel={"lengths": [2, 1, 5], "sentinel": True},
    windows={"lengths": [1, 1, 1], "num_groups": 2, "reach": 40 if IS_033 else 0},
)
def block_tables(
    rng: torch.Generator,
    lengths: list[int],
    num_groups: int = 1,
    sentinel: bool = False,
    reach: int = 0,
) -> Outputs:
    windows = {"sliding_window_reach": [reach, 0]} if reach else {}
    tables = BlockTables(
        block_sizes=[16, 32][:num_groups],
        max_num_reqs=8,
        max_num_batched_tokens=100,
        max_num_blocks_per_group=[12, 6][:num_groups],
        device=torch.device("cpu"),
        slot_mapping_enabled=[True, False][:num_groups],
        **windows,
    )
    idx = slots(rng, 3, 8)
    for slot in idx.tolist():
        blocks = tuple(ints(rng, 1, 90, 12 // (g + 1)).tolist() for g in range(num_groups))
        tables.append_block_ids(slot, blocks, overwrite=True)
    tables.apply_staged_writes()
    for table in tables.input_block_tables:
        table.fill_(77)
    computed = {"num_computed_tokens": ints(rng, 30, 150, 8)} if reach else {}
    gathered = tables.gather_block_tables(idx, num_reqs_padded=6, **computed)
    if sentinel:
        idx[1] = -1
    num_tokens = sum(lengths)
    tables.slot_mappings.fill_(-7)
    mappings = tables.compute_slot_mappings(
        idx,
        cumulative(lengths, 2),
        ints(rng, 0, 190, 100, dtype=torch.int64),
        num_tokens_padded=num_tokens + 3,
    )
    return {
        **{f"table{i}": table for i, table in enumerate(gathered)},
        "slots": mappings,
        "all_slots": tables.slot_mappings,
    }


# --- sampling ------------------------------------------------------------------------------------


@case("sample.gumbel._temperature_kernel")
def temperature(rng: torch.Generator) -> Outputs:
    logits = floats(rng, 5, 300)
    temperatures = torch.tensor([0.0, 1.0, 0.7, 3.0] * 3)
    apply_temperature(logits, slots(rng, 5), temperatures)
    return {"logits": logits}


@case(
    "sample.gumbel._gumbel_sample_kernel",
    tolerance=SUMS,
    greedy={"temperatures": [0.0]},
    greedy_bf16={"temperatures": [0.0], "dtype": torch.bfloat16},
    one_block={"temperatures": [0.8], "vocab_size": 300},
    mixed={"temperatures": [0.0, 0.7, 1.3]},
    sentinel={"temperatures": [0.0, 0.7, 1.3], "sentinel": True},
    fp64={"temperatures": [0.0, 0.7], "use_fp64": True},
    drafting={"temperatures": [0.9, 0.0], "drafting": True, "scale": True},
    cache_column={"temperatures": [0.9, 0.0], "drafting": True, "scale": True, "cache": "scalar"},
    cache_columns={
        "temperatures": [0.9, 0.0],
        "drafting": True,
        "cache": "vector",
        "sentinel": True,
        "dtype": torch.bfloat16,
    },
)
def gumbel_sample(
    rng: torch.Generator,
    temperatures: list[float],
    vocab_size: int = 2500,
    dtype: torch.dtype = torch.float32,
    sentinel: bool = False,
    use_fp64: bool = False,
    drafting: bool = False,
    scale: bool = False,
    cache: str | None = None,
) -> Outputs:
    idx = slots(rng, 6)
    if sentinel:
        idx[[2, 5]] = -1
    logits = floats(rng, 6, vocab_size, scale=3).to(dtype)
    logits[:, 10:20] = float("-inf")
    before = logits.clone()
    logits_cache = torch.zeros(12, 4, vocab_size + 3, dtype=dtype) if cache else None
    columns = {
        None: None,
        "scalar": torch.tensor(2),
        "vector": ints(rng, 0, 4, 6, dtype=torch.int64),
    }
    # The maxima by block are not returned, so look at them on their way.
    local_max: list[torch.Tensor] = []
    kernel = gumbel._gumbel_sample_kernel

    class Spy:
        def __getitem__(self, grid: Any) -> Any:
            def launch(*args: Any, **kwargs: Any) -> None:
                kernel[grid](*args, **kwargs)
                local_max.append(args[2])

            return launch

    gumbel._gumbel_sample_kernel = Spy()
    try:
        sampled = gumbel.gumbel_sample(
            logits,
            idx,
            torch.tensor(temperatures * 12)[:12],
            torch.randint(-(2**62), 2**62, (12,), generator=rng),
            ints(rng, 0, 2**20, 6, dtype=torch.int64),
            apply_temperature=scale,
            is_drafting=drafting,
            logits_cache=logits_cache,
            logits_cache_col=columns[cache],
            use_fp64=use_fp64,
        )
    finally:
        gumbel._gumbel_sample_kernel = kernel
    assert torch.equal(logits, before), "sampling must not change the logits"
    outputs = {"sampled": sampled, "local_max": local_max[0]}
    return outputs if logits_cache is None else {**outputs, "cache": logits_cache}


@case("sample.min_p._min_p_kernel")
def min_p(rng: torch.Generator) -> Outputs:
    logits = floats(rng, 5, 2500, scale=3)
    apply_min_p(logits, slots(rng, 5), torch.tensor([0.0, 0.05, 0.5, 1.0] * 3))
    return {"logits": logits}


@case(
    "sample.penalties._penalties_kernel",
    "sample.penalties._bincount_kernel",
    tolerance=1e-6,
    plain={"drafts": [0, 0, 0, 0]},
    drafts={"drafts": [0, 3, 2, 4]},
)
def penalties(rng: torch.Generator, drafts: list[int]) -> Outputs:
    vocab_size = 333
    idx = slots(rng, 4)
    prompt_len, prefill_len = ints(rng, 1, 1500, 12), torch.zeros(12, dtype=torch.int32)
    # One was preempted, and resumes with tokens of its own output.
    prefill_len[:] = prompt_len + torch.tensor([0, 40] * 6)
    mask = ints(rng, -99, 99, 12, -(-vocab_size // 32))
    counts = ints(rng, 0, 3, 12, vocab_size)
    bincount(idx, ints(rng, 0, vocab_size, 12, 2048), prompt_len, prefill_len, mask, counts, 1540)
    counted = counts.clone()
    num_logits = [d + 1 for d in drafts]
    expanded, local_pos = expand_idx_mapping(idx, sum(num_logits), cumulative(num_logits), 5)
    logits = floats(rng, sum(num_logits), vocab_size, scale=3)
    logits[:, 5] = float("-inf")
    apply_penalties(
        logits,
        expanded,
        ints(rng, 0, vocab_size, sum(num_logits)),
        local_pos,
        torch.tensor([1.0, 1.3, 0.8] * 4),
        torch.tensor([0.0, 0.4] * 6),
        torch.tensor([0.0, 0.0, 0.0, 0.6, -0.5, 0.1] * 2),
        mask,
        counts,
    )
    return {"logits": logits, "mask": mask, "counts": counted}


@case(
    "sample.logit_bias._bias_kernel",
    plain={"restore": False},
    restore={"restore": True},
)
def logit_bias(rng: torch.Generator, restore: bool) -> Outputs:
    vocab_size, width = 500, 8
    token_ids = torch.stack([torch.randperm(vocab_size, generator=rng)[:width] for _ in range(36)])
    allowed, biased, stops = token_ids.to(torch.int32).reshape(3, 12, width)
    idx = slots(rng, 12)
    logits = floats(rng, 12, vocab_size)
    # A grammar left two rows nothing but stop tokens.
    for row in (3, 7):
        only = logits[row, stops[idx[row]].long()]
        logits[row] = float("-inf")
        logits[row, stops[idx[row]].long()] = only
    apply_logit_bias(
        logits,
        idx,
        ints(rng, 0, 20, 12, dtype=torch.int64),
        torch.tensor([0, 0, 5] * 4, dtype=torch.int32),
        allowed,
        torch.tensor([0, 3] * 6, dtype=torch.int32),
        biased,
        floats(rng, 12, width),
        torch.tensor([0, 10, 99] * 4, dtype=torch.int32),
        torch.tensor([8, 8, 0, 3] * 3, dtype=torch.int32),
        torch.ones(12, dtype=torch.int32),
        stops,
        restore,
    )
    return {"logits": logits}


@case("sample.bad_words._bad_words_kernel")
def bad_words(rng: torch.Generator) -> Outputs:
    # A small alphabet, so that prefixes do match, in committed tokens and across drafts.
    vocab_size, num_logits = 4, [1, 4, 2, 5]
    idx = slots(rng, 4)
    expanded, local_pos = expand_idx_mapping(idx, 12, cumulative(num_logits), 5)
    offsets = torch.tensor([0, 1, 3, 6, 8, 8]).repeat(12, 1).to(torch.int32)
    logits = floats(rng, 12, vocab_size)
    prompt_len = ints(rng, 2, 6, 12)
    apply_bad_words(
        logits,
        expanded,
        ints(rng, 0, vocab_size, 12, 8),
        offsets,
        torch.tensor([4, 3, 4, 0, 4, 2] * 2, dtype=torch.int32),
        ints(rng, 0, vocab_size, 12, 40),
        prompt_len,
        prompt_len + ints(rng, 0, 8, 12),
        ints(rng, 0, vocab_size, 12),
        local_pos,
        4,
    )
    return {"logits": logits}


@case(
    "sample.thinking_budget._update_committed_marker_cache_kernel",
    "sample.thinking_budget._thinking_budget_kernel",
    short={"markers": ([1], [2], [2])},
    long={"markers": ([1, 2], [3, 1], [3, 3, 1])},
)
def thinking_budget(
    rng: torch.Generator, markers: tuple[list[int], list[int], list[int]]
) -> Outputs:
    start, natural_end, end = (torch.tensor(m, dtype=torch.int32) for m in markers)
    vocab_size, num_logits = 4, [1, 4, 2, 5]
    all_token_ids = ints(rng, 0, vocab_size, 12, 3000)
    # Long stretches without a marker, so that a cold scan goes back over blocks.
    all_token_ids[::2, 50:2500] = 0
    total_len = ints(rng, 1, 2900, 12)
    cached = [torch.full((12,), first, dtype=torch.int32) for first in (-1, -1, 0)]
    idx = slots(rng, 4)
    expanded, local_pos = expand_idx_mapping(idx, 12, cumulative(num_logits), 5)
    logits = torch.zeros(4, 12, vocab_size)
    # A cold scan, two steps on from it, and another request in the slots.
    for step, growth in enumerate((0, 1, 6, -3000)):
        total_len = (total_len + growth).clamp_(3)
        apply_thinking_budget(
            logits[step],
            idx,
            expanded,
            torch.tensor([-1, 0, 1, 3, 50, 1000] * 2, dtype=torch.int32),
            all_token_ids,
            total_len,
            ints(rng, 0, vocab_size, 12),
            local_pos,
            *cached,
            start,
            natural_end,
            end,
        )
    return {"logits": logits, "starts": cached[0], "ends": cached[1], "scanned": cached[2]}


@case("structured_outputs._apply_grammar_bitmask_kernel")
def grammar_bitmask(rng: torch.Generator) -> Outputs:
    # 3000 is no multiple of 32: the mask's last word is padded.
    vocab_size = 3000
    # From vLLM 0.33 on each request has as many rows as it may have tokens.
    bonus, num_rows = ((), 10) if IS_033 else ((1,), 6)
    worker = StructuredOutputsWorker(16, vocab_size, torch.device("cpu"), 5, *bonus)
    batch = SimpleNamespace(
        req_ids=["a", "b", "c"],
        cu_num_logits_np=np.array([0, 1, 5, 7]),
        cu_num_logits=cumulative([1, 4, 2]),
        num_draft_tokens_per_req=np.array([0, 3, 1]),
    )
    logits = floats(rng, 7, vocab_size)
    bitmask = ints(rng, -(2**31), 2**31 - 1, num_rows, 94)
    worker.apply_grammar_bitmask(logits, batch, ["c", "b"], bitmask.numpy())
    return {"logits": logits}


# --- outputs -------------------------------------------------------------------------------------


@case(
    "sample.logprob._topk_log_softmax_kernel",
    "sample.logprob._ranks_kernel",
    tolerance=SUMS,
    fp32={"dtype": torch.float32},
    bf16={"dtype": torch.bfloat16},
    sampled_only={"dtype": torch.float32, "num_logprobs": 0},
)
def topk_scores(rng: torch.Generator, dtype: torch.dtype, num_logprobs: int = 5) -> Outputs:
    logits = floats(rng, 4, 2500, scale=3).to(dtype)
    scores = compute_topk_scores(logits, num_logprobs, ints(rng, 0, 2500, 4, dtype=torch.int64))
    outputs = {"logprobs": scores.logprobs}
    if dtype != torch.bfloat16:
        # Triton's interpreter compares bfloat16 by their bits.
        outputs["ranks"] = scores.selected_token_ranks
    return outputs


@case(
    "sample.logprob._topk_log_softmax_kernel",
    "sample.logprob._ranks_kernel",
    "sample.logprob._fill_logprob_token_ids_kernel",
    tolerance=SUMS,
    with_topk={"num_logprobs": 3},
    alone={"num_logprobs": 0},
)
def logprob_token_ids(rng: torch.Generator, num_logprobs: int) -> Outputs:
    state = LogprobTokenIdsState(12, torch.device("cpu"))
    idx = slots(rng, 4)
    for slot, tokens in zip(idx.tolist(), ([1, 2, 3, 4, 5], [], [7], []), strict=True):
        state.add_request(slot, SimpleNamespace(logprob_token_ids=tokens))
    state.token_ids.gpu.copy_(ints(rng, 0, 2500, *state.token_ids.gpu.shape))
    state.num_token_ids.copy_to_uva()
    # More rows than slots, as in a verification.
    scores = compute_topk_scores(
        floats(rng, 16, 2500, scale=3),
        num_logprobs,
        ints(rng, 0, 2500, 16, dtype=torch.int64),
        logprob_token_ids_state=state,
        expanded_idx_mapping=idx.repeat_interleave(4),
        max_per_req_token_ids=5,
    )
    return {"token_ids": scores.logprob_token_ids, "logprobs": scores.logprobs}


@case("sample.prompt_logprob._prompt_logprobs_token_ids_kernel")
def prompt_token_ids(rng: torch.Generator) -> Outputs:
    idx, num_computed = slots(rng, 3), ints(rng, 0, 5, 12)
    token_ids = get_prompt_logprobs_token_ids(
        1213, cumulative([1, 1200, 12], 2), idx, num_computed, ints(rng, 0, 99, 12, 1300)
    )
    return {"token_ids": token_ids}


@case(
    "sample.output._compact_sampling_mask_kernel",
    one={"rows": 1},
    drafts={"rows": 4},
)
def sampling_mask(rng: torch.Generator, rows: int) -> Outputs:
    logits = floats(rng, 3 * rows, 1003)
    logits[logits < 1.5] = float("-inf")
    num_sampled = torch.tensor([rows, 0, 1], dtype=torch.int32)
    masks = SamplingMaskTensors.from_logits(logits, cumulative([rows] * 3), num_sampled, 60, rows)
    used = masks.counts > 0
    # Past its count, and in rows without a token, a row is left as it was allocated.
    kept = torch.arange(60) < masks.counts[:, None]
    return {
        "counts": masks.counts,
        "token_ids": masks.token_ids[kept],
        "packed": masks.packed_mask[used],
    }


@case("sample.trace_replay._trace_replay_kernel")
def trace_replay(rng: torch.Generator) -> Outputs:
    idx = slots(rng, 6)
    idx[2] = -1
    sampled = ints(rng, 0, 99, 6, dtype=torch.int64)
    prompt_len = ints(rng, 0, 9, 12)
    apply_trace_tokens(
        sampled,
        idx,
        ints(rng, 100, 200, 12, 30),
        torch.tensor([0, 5, 2, 30] * 3, dtype=torch.int32),
        prompt_len + ints(rng, -1, 6, 12),
        prompt_len,
    )
    return {"sampled": sampled}


@case("metrics.logits._num_nans_kernel")
def nans(rng: torch.Generator) -> Outputs:
    logits = floats(rng, 3, 9000)
    logits[1, ::7] = float("nan")
    return {"nans": get_num_nans(logits)}


# --- verification of drafts ----------------------------------------------------------------------

_UTILS = "spec_decode.rejection_sampler_utils"


@case("spec_decode.rejection_sampler._gather_draft_sampled_kernel")
def draft_sampled(rng: torch.Generator) -> Outputs:
    idx = slots(rng, 4)
    expanded, local_pos = expand_idx_mapping(idx, 12, cumulative([1, 4, 2, 5]), 5)
    tokens, pos = gather_draft_sampled(
        ints(rng, 0, 99, 64),
        ints(rng, 0, 30, 64, dtype=torch.int64),
        torch.randperm(64, generator=rng)[:12],
        expanded,
        local_pos,
        ints(rng, 5, 20, 12),
    )
    return {"tokens": tokens, "pos": pos}


@case("spec_decode.rejection_sampler._flatten_sampled_kernel")
def flatten(rng: torch.Generator) -> Outputs:
    flat = torch.zeros(12, dtype=torch.int64)
    sampled = ints(rng, 1, 99, 4, 5, dtype=torch.int64)
    num_sampled = torch.tensor([1, 4, 0, 3], dtype=torch.int32)
    rejection_sampler._flatten_sampled_kernel[(4,)](
        flat, sampled, sampled.stride(0), num_sampled, cumulative([1, 4, 2, 5]), num_warps=1
    )
    return {"flat": flat}


_REJECTION_KERNELS = (
    f"{_UTILS}._compute_local_logits_stats_kernel",
    f"{_UTILS}._rejection_kernel",
    f"{_UTILS}._resample_kernel",
    f"{_UTILS}._insert_resampled_kernel",
)
_BLOCK_KERNELS = (f"{_UTILS}._compute_cumulative_log_p_kernel",)


def rejection(
    rng: torch.Generator,
    temperatures: list[float],
    vocab_size: int = 50,
    draft_logits: bool = False,
    placeholders: bool = False,
    synthetic: bool = False,
    block: bool = False,
    use_fp64: bool = False,
) -> Outputs:
    steps, num_logits = 4, [5, 1, 3, 5, 2, 5, 4, 5, 5, 5]
    total = sum(num_logits)
    idx = slots(rng, len(num_logits))
    expanded, local_pos = expand_idx_mapping(idx, total, cumulative(num_logits), steps + 1)
    temperature = torch.tensor(temperatures * 12)[:12]
    target = floats(rng, total, vocab_size, scale=2)
    target[:, 7] = float("-inf")
    # Drafts that agree with the target now and then, at any temperature.
    drafts = torch.full((total,), 3, dtype=torch.int32)
    guessed = (target + floats(rng, total, vocab_size)).argmax(-1).to(torch.int32)
    drafts[1:] = guessed[:-1]
    cache = None
    if draft_logits:
        cache = floats(rng, 12, steps, vocab_size, scale=2)
        for i in range(total):
            if local_pos[i] < steps:
                cache[expanded[i], local_pos[i]] += target[i].clamp(min=-20)
    if placeholders:
        drafts[torch.rand(total, generator=rng) < 0.3] = -1
    sampled, num_sampled = rejection_sample(
        target,
        cache,
        drafts,
        cumulative(num_logits),
        ints(rng, 0, 999, total, dtype=torch.int64),
        idx,
        expanded,
        local_pos,
        temperature,
        torch.randint(-(2**62), 2**62, (12,), generator=rng),
        steps,
        torch.tensor([0.9, 0.6, 0.5, 0.3]) if synthetic else None,
        use_fp64=use_fp64,
        use_block_verification=block,
    )
    kept = torch.arange(steps + 1) < num_sampled[:, None]
    return {"num_sampled": num_sampled, "sampled": sampled[kept]}


RANDOM = [0.0, 0.7, 1.0, 1.5]

case(
    *_REJECTION_KERNELS,
    greedy={"temperatures": [0.0]},
    greedy_blocks={"temperatures": [0.0], "vocab_size": 9000},
    greedy_placeholders={"temperatures": [0.0], "placeholders": True},
    greedy_synthetic={"temperatures": [0.0], "synthetic": True},
    one_hot={"temperatures": RANDOM},
    one_hot_blocks={"temperatures": RANDOM, "vocab_size": 9000},
    one_hot_placeholders={"temperatures": RANDOM, "placeholders": True},
    one_hot_fp64={"temperatures": RANDOM, "use_fp64": True},
    one_hot_synthetic={"temperatures": RANDOM, "synthetic": True},
    draft_logits={"temperatures": RANDOM, "draft_logits": True},
    draft_logits_blocks={"temperatures": RANDOM, "draft_logits": True, "vocab_size": 9000},
    draft_logits_placeholders={
        "temperatures": RANDOM,
        "draft_logits": True,
        "placeholders": True,
    },
)(rejection)
case(
    *_REJECTION_KERNELS,
    *_BLOCK_KERNELS,
    block_one_hot={"temperatures": RANDOM, "block": True},
    block_placeholders={"temperatures": RANDOM, "block": True, "placeholders": True},
)(rejection)
case(
    *_REJECTION_KERNELS,
    *_BLOCK_KERNELS,
    f"{_UTILS}._compute_local_residual_mass_kernel",
    block_draft_logits={"temperatures": RANDOM, "block": True, "draft_logits": True},
    block_draft_logits_blocks={
        "temperatures": RANDOM,
        "block": True,
        "draft_logits": True,
        "placeholders": True,
        "vocab_size": 9000,
    },
)(rejection)
