"""Replacements of the kernels that rule tokens out or in before sampling, by editing logits.

They serve ``gpu/sample/{min_p,logit_bias,bad_words}.py`` and ``gpu/structured_outputs.py``.
"""
# ruff: noqa: N803 (arguments bear the kernels' names)

from __future__ import annotations

from itertools import pairwise

import torch

from vllm_adadecode.cpu.registry import replacement
from vllm_adadecode.cpu.tokens import effective_tokens, ends_with, unpack_bits

_NEG_INF = float("-inf")


@replacement("sample.min_p._min_p_kernel")
def min_p(
    logits_ptr: torch.Tensor,  # [num_tokens, vocab_size]
    logits_stride: int,
    expanded_idx_mapping_ptr: torch.Tensor,  # [num_tokens]
    min_p_ptr: torch.Tensor,  # [max_num_reqs]
    vocab_size: int,
    BLOCK_SIZE: int,
) -> None:
    # [num_tokens, 1]; log(0) = -inf keeps everything.
    threshold = min_p_ptr[expanded_idx_mapping_ptr].float().log_().unsqueeze_(1)
    threshold += logits_ptr.amax(-1, keepdim=True)
    logits_ptr.masked_fill_(logits_ptr < threshold, _NEG_INF)


@replacement("sample.logit_bias._bias_kernel")
def logit_bias(
    logits_ptr: torch.Tensor,  # [num_tokens, vocab_size]
    logits_stride: int,
    vocab_size: int,
    expanded_idx_mapping_ptr: torch.Tensor,  # [num_tokens]
    num_allowed_token_ids_ptr: torch.Tensor,  # [max_num_reqs]
    allowed_token_ids_ptr: torch.Tensor,  # [max_num_reqs, max_allowed]
    allowed_token_ids_stride: int,
    num_logit_bias_ptr: torch.Tensor,  # [max_num_reqs]
    bias_token_ids_ptr: torch.Tensor,  # [max_num_reqs, max_bias]
    bias_token_ids_stride: int,
    bias_ptr: torch.Tensor,  # [max_num_reqs, max_bias]
    bias_stride: int,
    pos_ptr: torch.Tensor,  # [num_tokens]
    min_lens_ptr: torch.Tensor,  # [max_num_reqs]
    num_stop_token_ids_ptr: torch.Tensor,  # [max_num_reqs]
    restore_when_all_masked_ptr: torch.Tensor,  # [max_num_reqs]
    stop_token_ids_ptr: torch.Tensor,  # [max_num_reqs, max_stop]
    stop_token_ids_stride: int,
    BLOCK_SIZE: int,
    LOGITS_BLOCK_SIZE: int,
    CHECK_ALL_MASKED_ROWS: bool,
) -> None:
    num_allowed = num_allowed_token_ids_ptr.numpy()
    num_bias = num_logit_bias_ptr.numpy()
    num_stop = num_stop_token_ids_ptr.numpy()
    min_lens = min_lens_ptr.numpy()
    positions = pos_ptr.numpy()
    for row, slot in enumerate(expanded_idx_mapping_ptr.tolist()):
        # [vocab_size]
        logits = logits_ptr[row]
        if n := int(num_allowed[slot]):
            token_ids = allowed_token_ids_ptr[slot, :n].long()
            allowed = logits[token_ids]
            logits.fill_(_NEG_INF)
            logits[token_ids] = allowed
        if n := int(num_bias[slot]):
            logits[bias_token_ids_ptr[slot, :n].long()] += bias_ptr[slot, :n]
        if (n := int(num_stop[slot])) and positions[row] + 1 < min_lens[slot]:
            token_ids = stop_token_ids_ptr[slot, :n].long()
            stops = logits[token_ids]
            logits[token_ids] = _NEG_INF
            # A grammar may leave nothing but the stop tokens; sampling needs one that is possible.
            restore = CHECK_ALL_MASKED_ROWS and bool(restore_when_all_masked_ptr[slot])
            if restore and float(logits.max()) == _NEG_INF:
                possible = stops.isfinite()
                logits[token_ids[possible]] = stops[possible]


@replacement("sample.bad_words._bad_words_kernel")
def bad_words(
    logits_ptr: torch.Tensor,  # [num_tokens, vocab_size]
    logits_stride: int,
    expanded_idx_mapping_ptr: torch.Tensor,  # [num_tokens]
    bad_word_token_ids_ptr: torch.Tensor,  # [max_num_reqs, max_total_tokens]
    bad_word_token_ids_stride: int,
    bad_word_offsets_ptr: torch.Tensor,  # [max_num_reqs, max_num_bad_words + 1]
    bad_word_offsets_stride: int,
    num_bad_words_ptr: torch.Tensor,  # [max_num_reqs]
    all_token_ids_ptr: torch.Tensor,  # [max_num_reqs, max_model_len]
    all_token_ids_stride: int,
    prompt_len_ptr: torch.Tensor,  # [max_num_reqs]
    total_len_ptr: torch.Tensor,  # [max_num_reqs]
    input_ids_ptr: torch.Tensor,  # [num_tokens]
    expanded_local_pos_ptr: torch.Tensor,  # [num_tokens]
) -> None:
    num_bad_words = num_bad_words_ptr.numpy()
    local_pos = expanded_local_pos_ptr.numpy()
    for row, slot in enumerate(expanded_idx_mapping_ptr.tolist()):
        count = int(num_bad_words[slot])
        if not count:
            continue
        output = effective_tokens(
            all_token_ids_ptr.numpy()[slot, : int(total_len_ptr[slot])],
            input_ids_ptr.numpy(),
            row,
            int(local_pos[row]),
            first=int(prompt_len_ptr[slot]),
        )
        tokens = bad_word_token_ids_ptr.numpy()[slot].tolist()
        offsets = bad_word_offsets_ptr.numpy()[slot, : count + 1].tolist()
        for start, end in pairwise(offsets):
            # The empty prefix of a word of one token ends every output.
            if ends_with(output, tokens[start : end - 1]):
                logits_ptr[row, tokens[end - 1]] = _NEG_INF


@replacement("structured_outputs._apply_grammar_bitmask_kernel")
def apply_grammar_bitmask(
    logits_ptr: torch.Tensor,  # [num_logits, vocab_size]
    logits_stride: int,
    logits_indices_ptr: torch.Tensor,  # [num_masks] request * MASK_STRIDE + position
    cu_num_logits_ptr: torch.Tensor,  # [num_reqs + 1]
    bitmask_ptr: torch.Tensor,  # [num_masks, cdiv(vocab_size, 32)]
    bitmask_stride: int,
    vocab_size: int,
    MASK_STRIDE: int,
    BLOCK_SIZE: int,
) -> None:
    cu_num_logits = cu_num_logits_ptr.tolist()
    bitmask = bitmask_ptr.numpy()
    for mask, mapping in enumerate(logits_indices_ptr.tolist()):
        req, position = divmod(mapping, MASK_STRIDE)
        row = cu_num_logits[req] + position
        if row >= cu_num_logits[req + 1]:
            continue
        forbidden = torch.from_numpy(unpack_bits(~bitmask[mask], vocab_size))
        logits_ptr[row, :vocab_size].masked_fill_(forbidden, _NEG_INF)
