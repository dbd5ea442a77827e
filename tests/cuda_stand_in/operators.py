"""Operators of vLLM's CUDA build that a Llama model calls, in PyTorch, under the schemas they have.

FlashAttention 3 splits its work by a schedule, which an operator of its own makes from the lengths
of the batch. Here a schedule *is* those lengths, and attention refuses one that is not of its own
batch: on a GPU that would be wrong results, or none.
"""

from collections import Counter
from types import ModuleType
from typing import Any

import torch

# Looked up when vLLM's compiler passes are imported; not called without quantisation.
NEVER_CALLED = (
    "rms_norm_static_fp8_quant",
    "fused_add_rms_norm_static_fp8_quant",
    "rms_norm_dynamic_per_token_quant",
    "fused_qk_norm_rope",
    "silu_and_mul_quant",
    "silu_and_mul_per_block_quant",
)
SCHEDULE = (
    "get_scheduler_metadata(int batch_size, int max_seqlen_q, int max_seqlen_k, int num_heads, "
    "int num_heads_k, int headdim, int headdim_v, ScalarType qkv_dtype, Tensor seqused_k, "
    "Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, Tensor? cu_seqlens_k_new, Tensor? seqused_q, "
    "Tensor? leftpad_k, int? page_size, int max_seqlen_k_new, bool is_causal, "
    "int window_size_left, int window_size_right, bool has_softcap, int num_splits, "
    "bool? pack_gqa, int sm_margin) -> Tensor"
)
ATTENTION = (
    "fwd(Tensor q, Tensor k, Tensor v, Tensor? k_new, Tensor? v_new, Tensor? q_v, "
    "Tensor(a!)? out, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, Tensor? cu_seqlens_k_new, "
    "Tensor? seqused_q, Tensor? seqused_k, int? max_seqlen_q, int? max_seqlen_k, "
    "Tensor? page_table, Tensor? kv_batch_idx, Tensor? leftpad_k, Tensor? rotary_cos, "
    "Tensor? rotary_sin, Tensor? seqlens_rotary, Tensor? q_descale, Tensor? k_descale, "
    "Tensor? v_descale, float softmax_scale, bool is_causal, int window_size_left, "
    "int window_size_right, float softcap, bool is_rotary_interleaved, "
    "Tensor? scheduler_metadata, int num_splits, bool? pack_gqa, int sm_margin, Tensor? s_aux, "
    "int cp_world_size, int cp_rank, Tensor? cp_tot_seqused_k) -> Tensor[]"
)
CACHE = (
    "reshape_and_cache_flash(Tensor key, Tensor value, Tensor(a!) key_cache, "
    "Tensor(b!) value_cache, Tensor slot_mapping, str kv_cache_dtype, Tensor k_scale, "
    "Tensor v_scale) -> ()"
)

# Calls of attention, by whether they came with a schedule.
CALLS: Counter[str] = Counter()
_libraries: list[torch.library.Library] = []


def define() -> list[tuple[str, ModuleType]]:
    """Define what vLLM's CPU build has not.

    Returns:
        Modules by name that stand for the shared libraries which bring them.
    """
    for namespace, schema, function in (
        ("_vllm_fa3_C", SCHEDULE, _schedule),
        ("_vllm_fa3_C", ATTENTION, _attention),
        ("_C_cache_ops", CACHE, _cache),
        *(("_C", f"{name}() -> ()", None) for name in NEVER_CALLED),
    ):
        library = torch.library.Library(namespace, "FRAGMENT")
        library.define(schema)
        if function is not None:
            library.impl(schema.split("(")[0], function, "CompositeExplicitAutograd")
        # What a library defines goes with it.
        _libraries.append(library)
    names = ("vllm._C_stable_libtorch", "vllm.vllm_flash_attn._vllm_fa3_C")
    return [(name, ModuleType(name)) for name in names]


def _lengths(
    # int32 [batch_size + 1]
    cu_seqlens_q: torch.Tensor,
    # int32 [batch_size]
    seqused_k: torch.Tensor,
    max_seqlen_q: int,
) -> torch.Tensor:
    """int32, as long as FlashAttention's: four numbers for each of a multiple of four rows, one."""
    rows = len(seqused_k)
    padded = (rows + 3) // 4 * 4
    schedule = torch.zeros(4 * padded + 1, dtype=torch.int32)
    schedule[:rows] = cu_seqlens_q.diff()
    schedule[padded : padded + rows] = seqused_k
    schedule[-1] = max_seqlen_q
    return schedule


def _schedule(batch_size: int, max_seqlen_q: int, max_seqlen_k: int, *rest: Any) -> torch.Tensor:
    seqused_k, cu_seqlens_q = rest[5:7]
    assert batch_size == len(seqused_k) == len(cu_seqlens_q) - 1
    return _lengths(cu_seqlens_q, seqused_k, max_seqlen_q)


def _attention(
    # [num_tokens, num_heads, head_size]
    q: torch.Tensor,
    # [num_blocks, block_size, num_kv_heads, head_size]
    k: torch.Tensor,
    v: torch.Tensor,
    *rest: Any,
) -> list[torch.Tensor]:
    out, cu_seqlens_q = rest[3:5]
    seqused_k, max_seqlen_q, max_seqlen_k, page_table = rest[8:12]
    scale, is_causal, left, _, softcap = rest[20:25]
    schedule = rest[26]
    assert is_causal
    assert left < 0
    assert not softcap
    rows = len(seqused_k)
    assert len(cu_seqlens_q) == rows + 1
    assert len(page_table) >= rows
    CALLS["scheduled" if schedule is not None else "not scheduled"] += 1
    if schedule is not None:
        wanted = _lengths(cu_seqlens_q, seqused_k, max_seqlen_q)
        assert torch.equal(schedule, wanted), "a stale schedule"
    block_size, group = k.shape[1], q.shape[1] // k.shape[2]
    starts, lengths = cu_seqlens_q.tolist(), seqused_k.tolist()
    for row, (length, first, end) in enumerate(zip(lengths, starts[:-1], starts[1:], strict=True)):
        assert end - first <= max_seqlen_q
        assert length <= max_seqlen_k
        if first == end:
            continue
        blocks = page_table[row, : -(-length // block_size)].long()
        keys = k[blocks].flatten(0, 1)[:length].repeat_interleave(group, 1)
        values = v[blocks].flatten(0, 1)[:length].repeat_interleave(group, 1)
        scores = torch.einsum("qhd,khd->hqk", q[first:end], keys) * scale
        at = torch.arange(first - end, 0)[:, None] + length
        scores.masked_fill_(torch.arange(length) > at, float("-inf"))
        weights = scores.softmax(-1).nan_to_num()
        out[first:end] = torch.einsum("hqk,khd->qhd", weights, values)
    return [out, *(q.new_empty(0) for _ in range(3))]


def _cache(
    key: torch.Tensor,
    value: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    # int64 [num_tokens], -1 for padding
    slot_mapping: torch.Tensor,
    *_: Any,
) -> None:
    kept = slot_mapping >= 0
    slots, size = slot_mapping[kept], key_cache.shape[1]
    num_tokens = len(slot_mapping)
    key_cache[slots // size, slots % size] = key[:num_tokens][kept]
    value_cache[slots // size, slots % size] = value[:num_tokens][kept]
