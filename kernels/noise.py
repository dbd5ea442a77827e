"""The random numbers of vLLM's samplers in NumPy, as functions of (seed, position, token id).

Nothing here depends on the batch, on a generator's state or on the machine, so a request's tokens
depend on its own seed alone. The integer streams equal those of the Triton kernels
(``gpu/sample/gumbel.py`` and Triton's Philox) bit for bit; the logarithms on top to rounding.
"""

from __future__ import annotations

from functools import cache, lru_cache

import numpy as np
import numpy.typing as npt
import torch

UInt32Array = npt.NDArray[np.uint32]

_MASK32 = 0xFFFFFFFF

# Added to the position when drafting: a draft and its verification must not share their noise.
DRAFT_NOISE_SALT = 1 << 30

# Second stream of the fp64 noise.
_FP64_DOMAIN = 0x9E3779B9

# The smallest positive value of Triton's fp32 rand.
_RAND_MIN = np.float32(4.6566127342e-10)


def _rotl32(value: int, shift: int) -> int:
    return (value << shift | value >> (32 - shift)) & _MASK32


def _murmur3_mix_key(key: int) -> int:
    return _rotl32(key * 0xCC9E2D51 & _MASK32, 15) * 0x1B873593 & _MASK32


def _murmur3_mix(h: int, key: int) -> int:
    return (_rotl32(h ^ _murmur3_mix_key(key), 13) * 5 + 0xE6546B64) & _MASK32


@lru_cache(maxsize=4)
def _mixed_token_ids(vocab_size: int) -> UInt32Array:
    """Every token id as murmur3 mixes it in: the part of the hash that is the same for all rows."""
    key = np.arange(vocab_size, dtype=np.uint32)
    key *= np.uint32(0xCC9E2D51)
    key = key << np.uint32(15) | key >> np.uint32(17)
    key *= np.uint32(0x1B873593)
    key.setflags(write=False)
    return key


def murmur3_hash(seed: int, pos: int, vocab_size: int, domain: int = 0) -> UInt32Array:
    """Uniform random words [vocab_size], one per token id."""
    prefix = domain
    for word in (seed, seed >> 32, pos):
        prefix = _murmur3_mix(prefix, word & _MASK32)
    h = _mixed_token_ids(vocab_size) ^ np.uint32(prefix)
    # In place from here on: one pass of a vocabulary is the unit of cost.
    high = h >> np.uint32(19)
    h <<= np.uint32(13)
    h |= high
    h *= np.uint32(5)
    h += np.uint32(0xE6546B64)
    h ^= np.uint32(16)
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        np.right_shift(h, np.uint32(shift), out=high)
        h ^= high
        h *= np.uint32(factor)
    np.right_shift(h, np.uint32(16), out=high)
    h ^= high
    return h


def gumbel_noise(seed: int, pos: int, vocab_size: int, use_fp64: bool) -> torch.Tensor:
    """Gumbel noise [vocab_size] of one position of one request."""
    if use_fp64:
        high = murmur3_hash(seed, pos, vocab_size, _FP64_DOMAIN).astype(np.uint64)
        low = murmur3_hash(seed, pos, vocab_size).astype(np.uint64)
        random53 = (high << np.uint64(32) | low) >> np.uint64(11)
        u64 = (random53.astype(np.float64) + 0.5) * 2.0**-53
        u64[u64 == 1.0] -= 2.0**-53
        return torch.from_numpy(u64).log_().neg_().log_().neg_()
    random32 = murmur3_hash(seed, pos, vocab_size)
    low16 = (random32 & np.uint32(0xFFFF)).astype(np.float32)
    low16 += np.float32(0.5)
    low16 *= np.float32(2.0**-32)
    random32 >>= np.uint32(16)
    u = random32.astype(np.float32)
    u *= np.float32(2.0**-16)
    u += low16
    # The winning tail is at u -> 0, where fp32 is fine; log1p keeps that precision. u == 1 is the
    # other end, where the noise must stay finite as in the kernel.
    np.minimum(u, np.float32(1 - 2.0**-24), out=u)
    return torch.from_numpy(u).neg_().log1p_().neg_().log_().neg_()


@cache
def draft_has_own_seed() -> bool:
    """Whether vLLM's samplers mix the number of a draft into its seed (from 0.33 on)."""
    from vllm.v1.worker.gpu.sample import gumbel

    return hasattr(gumbel, "spec_step_seed")


def draft_seed(seed: int, draft: int) -> int:
    """Seed of a request's draft ``0, 1, ...`` of a round."""
    return seed ^ draft << 32 if draft_has_own_seed() else seed


def philox_uniform(seed: int, offset: int) -> np.float32:
    """``tl.rand(seed, offset)`` of an int64 offset, kept above 0."""
    k0, k1 = seed & _MASK32, seed >> 32 & _MASK32
    c0, c1, c2, c3 = offset & _MASK32, offset >> 32 & _MASK32, 0, 0
    for _ in range(10):
        product0, product2 = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c2 = (product2 >> 32) ^ c1 ^ k0, (product0 >> 32) ^ c3 ^ k1
        c1, c3 = product2 & _MASK32, product0 & _MASK32
        k0, k1 = (k0 + 0x9E3779B9) & _MASK32, (k1 + 0xBB67AE85) & _MASK32
    magnitude = c0 if c0 < 1 << 31 else _MASK32 - c0
    return max(np.float32(magnitude) * np.float32(4.6566127342e-10), _RAND_MIN)
