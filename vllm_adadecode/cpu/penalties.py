"""Replacements of the kernels in ``gpu/sample/penalties.py``: repetition, frequency, presence."""
# ruff: noqa: N803 (arguments bear the kernels' names)

from __future__ import annotations

import numpy as np
import torch

from vllm_adadecode.cpu.registry import replacement
from vllm_adadecode.cpu.tokens import unpack_bits


@replacement("sample.penalties._penalties_kernel")
def penalties(
    logits_ptr: torch.Tensor,  # [num_tokens, vocab_size]
    logits_stride: int,
    expanded_idx_mapping_ptr: torch.Tensor,  # [num_tokens]
    token_ids_ptr: torch.Tensor,  # [num_tokens]
    expanded_local_pos_ptr: torch.Tensor,  # [num_tokens]
    repetition_penalty_ptr: torch.Tensor,  # [max_num_reqs]
    frequency_penalty_ptr: torch.Tensor,  # [max_num_reqs]
    presence_penalty_ptr: torch.Tensor,  # [max_num_reqs]
    prompt_bin_mask_ptr: torch.Tensor,  # [max_num_reqs, cdiv(vocab_size, 32)] bits
    prompt_bin_mask_stride: int,
    output_bin_counts_ptr: torch.Tensor,  # [max_num_reqs, vocab_size]
    output_bin_counts_stride: int,
    vocab_size: int,
    BLOCK_SIZE: int,
) -> None:
    req_idx = expanded_idx_mapping_ptr.numpy()
    repetition = repetition_penalty_ptr.numpy()[req_idx]
    frequency = frequency_penalty_ptr.numpy()[req_idx]
    presence = presence_penalty_ptr.numpy()[req_idx]
    token_ids, local_pos = token_ids_ptr.numpy(), expanded_local_pos_ptr.numpy()
    output_bin_counts = output_bin_counts_ptr.numpy()
    prompt_bin_mask = prompt_bin_mask_ptr.numpy()
    for row in np.flatnonzero((repetition != 1) | (frequency != 0) | (presence != 0)).tolist():
        counts = output_bin_counts[req_idx[row], :vocab_size]
        if num_drafts := int(local_pos[row]):
            counts = counts.copy()
            drafts = token_ids[row - num_drafts + 1 : row + 1]
            np.add.at(counts, drafts[(drafts >= 0) & (drafts < vocab_size)], 1)
        # Only tokens seen so far change, and those are few of a vocabulary.
        seen = np.flatnonzero(counts)
        if repetition[row] != 1:
            penalised = unpack_bits(prompt_bin_mask[req_idx[row]], vocab_size).copy()
            penalised[seen] = True
            tokens = torch.from_numpy(np.flatnonzero(penalised))
            values = logits_ptr[row, tokens].float()
            scale = float(repetition[row])
            inverse = float(np.float32(1) / repetition[row])
            logits_ptr[row, tokens] = (values * torch.where(values > 0, inverse, scale)).to(
                logits_ptr.dtype
            )
        # [num_seen]
        tokens = torch.from_numpy(seen)
        values = logits_ptr[row, tokens].float()
        values -= torch.from_numpy(frequency[row] * counts[seen].astype(np.float32))
        values -= float(presence[row])
        logits_ptr[row, tokens] = values.to(logits_ptr.dtype)


@replacement("sample.penalties._bincount_kernel")
def bincount(
    expanded_idx_mapping_ptr: torch.Tensor,  # [num_reqs]
    all_token_ids_ptr: torch.Tensor,  # [max_num_reqs, max_model_len]
    all_token_ids_stride: int,
    prompt_len_ptr: torch.Tensor,  # [max_num_reqs]
    prefill_len_ptr: torch.Tensor,  # [max_num_reqs]
    prompt_bin_mask_ptr: torch.Tensor,  # [max_num_reqs, cdiv(vocab_size, 32)] bits
    prompt_bin_mask_stride: int,
    output_bin_counts_ptr: torch.Tensor,  # [max_num_reqs, vocab_size]
    output_bin_counts_stride: int,
    BLOCK_SIZE: int,
) -> None:
    all_token_ids = all_token_ids_ptr.numpy()
    prompt_lens, prefill_lens = prompt_len_ptr.numpy(), prefill_len_ptr.numpy()
    prompt_bin_mask, output_bin_counts = prompt_bin_mask_ptr.numpy(), output_bin_counts_ptr.numpy()
    num_words = prompt_bin_mask.shape[1]
    for slot in expanded_idx_mapping_ptr.tolist():
        prompt_len, prefill_len = prompt_lens[slot], prefill_lens[slot]
        in_prompt = np.zeros(num_words * 32, dtype=np.bool_)
        in_prompt[all_token_ids[slot, :prompt_len]] = True
        prompt_bin_mask[slot] |= np.packbits(in_prompt, bitorder="little").view(np.int32)
        # After a preemption the prefill includes tokens that were sampled before.
        np.add.at(output_bin_counts[slot], all_token_ids[slot, prompt_len:prefill_len], 1)
