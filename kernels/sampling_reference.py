"""Torch reference of sampling.py, with the same noise from NumPy."""

from typing import Any

import torch

from vllm_adadecode.kernels.merge_reference import finish_in_torch, live_places, merged_tops
from vllm_adadecode.kernels.noise import DRAFT_NOISE_SALT, draft_seed, gumbel_noise
from vllm_adadecode.kernels.projection_reference import launched_logits, top_of, write_partials


def _temperatures(slots: torch.Tensor, temperature: torch.Tensor) -> torch.Tensor:
    found = temperature[slots.clamp(min=0).long()].float()
    return torch.where(slots >= 0, found, 0.0)


def sample_partials_reference(
    partials: torch.Tensor,
    x: torch.Tensor,
    x_stride: int,
    weight: torch.Tensor,
    weight_stride: int,
    row_scale: torch.Tensor | None,
    order: torch.Tensor | None,
    num_live: torch.Tensor | None,
    vocab_ids: torch.Tensor | None,
    slots: torch.Tensor,
    positions: torch.Tensor,
    temperature: torch.Tensor,
    seeds: torch.Tensor,
    cache: torch.Tensor | None,
    cache_stride_0: int,
    cache_stride_1: int,
    cache_col: torch.Tensor | None,
    num_rows: int,
    vocab_size: int,
    soft_cap: float,
    logit_scale: float,
    *,
    HAS_SOFT_CAP: bool,
    **options: Any,
) -> None:
    rows, logits = launched_logits(
        x,
        weight,
        row_scale,
        order,
        num_live,
        soft_cap if HAS_SOFT_CAP else None,
        logit_scale,
    )
    slots = slots[rows].long()
    temperatures = _temperatures(slots, temperature)
    tokens = torch.arange(vocab_size, device=x.device) if vocab_ids is None else vocab_ids
    column = None
    if cache is not None:
        assert cache_col is not None
        logits = logits.to(cache.dtype)
        column, real = int(cache_col), slots >= 0
        cache[slots[real][:, None], column, tokens[None, :]] = logits[real]
        logits = logits.float()
    top, token = top_of(logits)
    divisor = torch.where(temperatures == 0.0, 1.0, temperatures)
    values = logits / divisor[:, None]
    for i, row in enumerate(rows.tolist()):
        if temperatures[i] == 0.0:
            continue
        seed, pos = int(seeds[slots[i]]), int(positions[row]) + DRAFT_NOISE_SALT
        if column is not None:
            seed = draft_seed(seed, column)
        noise = gumbel_noise(seed, pos, int(tokens[-1]) + 1, use_fp64=False)
        values[i] += noise.to(values.device)[tokens]
    noised, chosen = top_of(values)
    above = logits - torch.where(top == -torch.inf, 0.0, top)[:, None]
    words = [
        top,
        torch.exp(above).sum(dim=-1),
        token,
        noised,
        chosen,
        logits.gather(1, chosen[:, None])[:, 0],
        torch.exp(above / divisor[:, None]).sum(dim=-1),
    ]
    write_partials(partials, len(top), words)
    partials[1:, : len(top), 3:5] = partials[1:, : len(top), 0:3:2]


def merge_samples_reference(
    partials: torch.Tensor,
    num_parts: int,
    num_rows: int,
    order: torch.Tensor | None,
    num_live: torch.Tensor | None,
    other: torch.Tensor | None,
    vocab_ids: torch.Tensor | None,
    slots: torch.Tensor,
    temperature: torch.Tensor,
    threshold: float,
    token: torch.Tensor,
    p: torch.Tensor,
    confident: torch.Tensor,
    sampled: torch.Tensor,
    log_prob: torch.Tensor,
    **options: Any,
) -> None:
    rows, count = live_places(num_rows, order, num_live)
    live = torch.arange(num_rows, device=p.device)[rows][:count]
    for out in (token, p, confident, sampled, log_prob):
        out.zero_()
    partials = partials[:, :count]
    top, top_id, total = merged_tops(partials)
    other = other[live] if other is not None else None
    result = finish_in_torch(top, top_id, total, other, vocab_ids, threshold)
    token[live], p[live], confident[live] = result.token, result.p, result.confident

    def float_word(word: int) -> torch.Tensor:
        return partials[..., word].view(torch.float32)

    part = top_of(float_word(3).T)[1][None]
    row = partials[..., 4].gather(0, part)[0].long()
    sampled[live] = row if vocab_ids is None else vocab_ids[row]
    temperatures = _temperatures(slots[live].long(), temperature)
    divisor = torch.where(temperatures == 0.0, 1.0, temperatures)
    shift = torch.where(top == -torch.inf, 0.0, top)
    tempered = (float_word(6) * torch.exp((float_word(0) - shift) / divisor)).sum(dim=0)
    value = (float_word(5).gather(0, part)[0] - shift) / divisor - tempered.log()
    log_prob[live] = torch.where(temperatures == 0.0, 0.0, value)
